import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from experts.bundles.bundle import Bundle
from experts.bundles.layout import expert_tensor, gate_tensor
from experts.bundles.manifest import FileEntry, Manifest
from experts.bundles.safetensors_reader import SafetensorsFile
from experts.bundles.writer import derive_bundle, write_bundle
from experts.errors import InvalidBundleError
from tests.experts.bad_bundles import BAD_BUNDLES, SMALL, change_tensor, small_bundle

MakeBundle = Callable[..., Path]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_what_is_written_is_read(dtype: str, make_bundle: MakeBundle, describe: Any, make_tensors: Any) -> None:
    changes = {"dtype": dtype, "gate_dtype": "float32", "has_prototype": True}
    bundle = Bundle.open(make_bundle(**changes))
    bundle.verify(finite=True)
    tensors = make_tensors(describe(**changes))
    for layer in range(2):
        weights = bundle.load_layer(layer)
        assert weights.num_experts == 3
        for projection, stacked in (("gate", weights.gate_EFD), ("up", weights.up_EFD), ("down", weights.down_EDF)):
            for expert in range(3):
                assert torch.equal(stacked[expert], tensors[expert_tensor(layer, expert, projection)])  # type: ignore[arg-type]
        assert torch.equal(bundle.gate_ED(layer), tensors[gate_tensor(layer)])
    prototype = bundle.prototype()
    assert prototype is not None
    assert torch.equal(prototype, tensors["prototype"])


def test_the_library_reads_a_bundles_files(make_bundle: MakeBundle, describe: Any, make_tensors: Any) -> None:
    directory = make_bundle()
    found = {**load_file(directory / "experts.safetensors"), **load_file(directory / "gate.safetensors")}
    expected = make_tensors(describe())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_layers_are_views_of_the_file(make_bundle: MakeBundle) -> None:
    bundle = Bundle.open(make_bundle())
    first, second = bundle.load_layer(1), bundle.load_layer(1)
    assert first.up_EFD.data_ptr() == second.up_EFD.data_ptr()


def test_experts_may_be_spread_over_files(
    make_bundle: MakeBundle, describe: Any, make_tensors: Any, tmp_path: Path
) -> None:
    description = describe()
    tensors = make_tensors(description)
    stack_bytes = 3 * 16 * 24 * 4
    directory = tmp_path / "sharded"
    manifest = write_bundle(directory, description, tensors.__getitem__, max_file_bytes=2 * stack_bytes)
    assert [entry.path for entry in manifest.files] == [
        "experts-00001-of-00003.safetensors",
        "experts-00002-of-00003.safetensors",
        "experts-00003-of-00003.safetensors",
        "gate.safetensors",
    ]
    bundle = Bundle.open(directory)
    bundle.verify()
    whole = Bundle.open(make_bundle("whole"))
    for layer in range(2):
        assert torch.equal(bundle.load_layer(layer).down_EDF, whole.load_layer(layer).down_EDF)


def test_each_tensor_is_asked_for_once_and_in_order(describe: Any, make_tensors: Any, tmp_path: Path) -> None:
    tensors = make_tensors(describe())
    asked: list[str] = []

    def source(name: str) -> torch.Tensor:
        asked.append(name)
        return tensors[name]  # type: ignore[no-any-return]

    write_bundle(tmp_path / "b", describe(), source)
    assert sorted(asked) == sorted(tensors)
    assert asked[:4] == [
        "layers.0.experts.0.gate_proj.weight",
        "layers.0.experts.1.gate_proj.weight",
        "layers.0.experts.2.gate_proj.weight",
        "layers.0.experts.0.up_proj.weight",
    ]


def test_a_write_that_fails_leaves_nothing(describe: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="announced as"):
        write_bundle(tmp_path / "b", describe(), lambda name: torch.zeros(1))
    assert list(tmp_path.iterdir()) == []


def test_a_bundle_is_never_overwritten(make_bundle: MakeBundle) -> None:
    make_bundle()
    with pytest.raises(FileExistsError, match="never changed in place"):
        make_bundle()


def test_a_derived_bundle_shares_its_files(make_bundle: MakeBundle, tmp_path: Path) -> None:
    source = Bundle.open(make_bundle())
    manifest = derive_bundle(tmp_path / "liver", source, {"organ": "liver", "name": "liver experts"})
    derived = Bundle.open(tmp_path / "liver")
    derived.verify()
    assert derived.digest == manifest.digest != source.digest
    assert (manifest.organ, manifest.files) == ("liver", source.manifest.files)
    assert os.path.samefile(tmp_path / "liver" / "experts.safetensors", tmp_path / "bundle" / "experts.safetensors")
    with pytest.raises(ValueError, match="dtype, num_experts cannot differ"):
        derive_bundle(tmp_path / "x", source, {"num_experts": 2, "dtype": "float16"})
    with pytest.raises(ValueError, match="organ"):
        derive_bundle(tmp_path / "x", source, {"organ": "No Organ"})


def test_layers_that_do_not_exist(make_bundle: MakeBundle) -> None:
    bundle = Bundle.open(make_bundle())
    for layer in (-1, 2):
        with pytest.raises(IndexError, match="layers 0 to 1"):
            bundle.load_layer(layer)
        with pytest.raises(IndexError, match="layers 0 to 1"):
            bundle.gate_ED(layer)
    assert bundle.prototype() is None


@pytest.mark.parametrize("kind", BAD_BUNDLES)
def test_damage_is_refused_with_its_own_reason(kind: str, make_bundle: MakeBundle) -> None:
    damage, reason = BAD_BUNDLES[kind]
    directory = make_bundle()
    Bundle.open(directory).verify(finite=True)
    damage(directory)
    with pytest.raises(InvalidBundleError, match=reason):
        Bundle.open(directory).verify(finite=True)


def test_looking_at_finite_values_is_a_choice(make_bundle: MakeBundle) -> None:
    directory = make_bundle()
    change_tensor("gate.safetensors", gate_tensor(0), lambda gate: gate.fill_(float("inf")))(directory)
    Bundle.open(directory).verify()


def test_a_folder_without_a_manifest_is_no_bundle(make_bundle: MakeBundle, tmp_path: Path) -> None:
    with pytest.raises(InvalidBundleError, match="is no bundle"):
        Bundle.open(tmp_path)
    directory = make_bundle()
    (directory / "manifest.json").rename(tmp_path / "manifest.json")
    (directory / "manifest.json").symlink_to(tmp_path / "manifest.json")
    with pytest.raises(InvalidBundleError, match="is no bundle"):
        Bundle.open(directory)


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """Bytes changed, cut out, doubled or put in, a few times."""
    result = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        position = draw(st.integers(0, len(result)))
        action = draw(st.sampled_from(["change", "cut", "insert", "truncate"]))
        if action == "change" and position < len(result):
            result[position] = draw(st.integers(0, 255))
        elif action == "cut":
            del result[position : position + draw(st.integers(1, 20))]
        elif action == "insert":
            result[position:position] = draw(st.binary(min_size=1, max_size=20))
        else:
            del result[position:]
    return bytes(result)


def only_refused(directory: Path) -> None:
    """Opens and uses all of a bundle; anything but a refusal or success fails the test."""
    try:
        bundle = Bundle.open(directory)
        bundle.verify(digests=False, finite=True)
        bundle.load_layer(0)
        bundle.gate_ED(0)
    except InvalidBundleError as error:
        str(error).encode()


@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_whatever_a_manifest_is_it_is_read_or_refused(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        directory = small_bundle(folder)
        path = directory / "manifest.json"
        content = path.read_bytes()
        path.write_bytes(data.draw(damaged(content) | st.binary(max_size=200)))
        only_refused(directory)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=5), children, max_size=3),
    max_leaves=5,
)


@given(field=st.sampled_from(sorted(Manifest.model_fields)), value=JSON)
@settings(max_examples=200, deadline=None)
def test_whatever_a_field_is_it_is_read_or_refused(field: str, value: Any) -> None:
    files = [FileEntry(path=f"{name}.safetensors", sha256="0" * 64, size=1) for name in "ab"]
    good = Manifest(format="echovlm-experts-1", files=tuple(files), **SMALL.model_dump()).model_dump(mode="json")
    try:
        Manifest.from_json(json.dumps({**good, field: value}).encode(), "manifest.json")
    except InvalidBundleError as error:
        str(error).encode()


@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_whatever_a_header_is_it_is_read_or_refused(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        directory = small_bundle(folder)
        path = directory / data.draw(st.sampled_from(["experts.safetensors", "gate.safetensors"]))
        content = path.read_bytes()
        length = int.from_bytes(content[:8], "little")
        header = data.draw(damaged(content[8 : 8 + length]))
        # Mostly with a length that fits, or nothing but the length would ever be looked at.
        prefix = data.draw(st.just(len(header).to_bytes(8, "little")) | st.binary(min_size=8, max_size=8))
        path.write_bytes(prefix + header + content[8 + length :])
        manifest = json.loads((directory / "manifest.json").read_bytes())
        for file in manifest["files"]:
            file["size"] = (directory / file["path"]).stat().st_size
        (directory / "manifest.json").write_text(json.dumps(manifest))
        only_refused(directory)


@given(content=st.binary(max_size=300))
@settings(max_examples=200, deadline=None)
def test_whatever_a_file_is_it_is_read_or_refused(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.safetensors"
        path.write_bytes(content)
        try:
            SafetensorsFile(path)
        except InvalidBundleError as error:
            str(error).encode()
