import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from experts.bundle import Bundle, file_sha256
from experts.bundle_layout import expert_tensor, gate_tensor
from experts.bundle_writer import derive_bundle, write_bundle
from experts.errors import InvalidBundleError

MakeBundle = Callable[..., Path]


def declare(directory: Path, **changes: Any) -> None:
    """Makes the manifest agree with the files as they are now."""
    path = directory / "manifest.json"
    content = json.loads(path.read_bytes())
    for file in content["files"]:
        where = directory / file["path"]
        file.update(sha256=file_sha256(where), size=where.stat().st_size)
    path.write_text(json.dumps({**content, **changes}))


def replace_tensors(directory: Path, file: str, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(directory / file).items()}
    change(tensors)
    save_file(tensors, directory / file)
    declare(directory)


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


def flip_last_byte(directory: Path) -> None:
    path = directory / "experts.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def truncate(directory: Path) -> None:
    os.truncate(directory / "experts.safetensors", 1000)


def truncate_and_declare(directory: Path) -> None:
    truncate(directory)
    declare(directory)


def replace_by_link(directory: Path) -> None:
    path = directory / "experts.safetensors"
    path.rename(directory.parent / "elsewhere")
    path.symlink_to(directory.parent / "elsewhere")


def replace_by_pipe(directory: Path) -> None:
    (directory / "gate.safetensors").unlink()
    os.mkfifo(directory / "gate.safetensors")


def replace_by_pickle(directory: Path) -> None:
    torch.save({"layers.0.gate.weight": torch.zeros(3, 16)}, directory / "gate.safetensors")
    declare(directory)


def repeat_a_tensor(directory: Path) -> None:
    extra = load_file(directory / "gate.safetensors")[gate_tensor(0)]
    replace_tensors(directory, "experts.safetensors", lambda tensors: tensors.update({gate_tensor(0): extra}))


def lose_a_tensor(directory: Path) -> None:
    def lose(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[gate_tensor(1)]

    replace_tensors(directory, "gate.safetensors", lose)


def change_tensor(file: str, name: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    return lambda directory: replace_tensors(
        directory, file, lambda tensors: tensors.update({name: make(tensors[name])})
    )


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (
            lambda directory: (directory / "gate.safetensors").unlink(),
            "gate.safetensors: named by the manifest and missing",
        ),
        (lambda directory: (directory / "extra.safetensors").touch(), "extra.safetensors: is not in the manifest"),
        (lambda directory: (directory / "code.py").touch(), "code.py: is not in the manifest"),
        (lambda directory: (directory / "folder").mkdir(), "folder: is not in the manifest"),
        (truncate, "experts.safetensors: has 1000 bytes, the manifest says"),
        (flip_last_byte, "experts.safetensors: is damaged"),
        (replace_by_link, "experts.safetensors: is a link"),
        (replace_by_pipe, "gate.safetensors: .*no plain file"),
        (replace_by_pickle, "gate.safetensors: is truncated or no safetensors file"),
        (truncate_and_declare, "experts.safetensors: .*truncated"),
        (repeat_a_tensor, "gate.safetensors: tensor layers.0.gate.weight is also in experts.safetensors"),
        (
            lose_a_tensor,
            "1 tensors are missing, the first is layers.1.gate.weight",
        ),
        (
            lambda directory: replace_tensors(
                directory, "gate.safetensors", lambda tensors: tensors.update(surprise=torch.zeros(1))
            ),
            "gate.safetensors: 1 unexpected tensors, the first is surprise",
        ),
        (
            change_tensor("gate.safetensors", gate_tensor(0), lambda gate: gate[:2].clone()),
            r"layers.0.gate.weight has the shape \[2, 16\], the manifest's sizes make it \[3, 16\]",
        ),
        (
            change_tensor("experts.safetensors", expert_tensor(1, 2, "down"), lambda down: down.T.contiguous()),
            r"layers.1.experts.2.down_proj.weight has the shape \[24, 16\]",
        ),
        (
            change_tensor("experts.safetensors", expert_tensor(0, 0, "up"), lambda up: up.half()),
            "layers.0.experts.0.up_proj.weight is torch.float16, the manifest says torch.float32",
        ),
        (
            change_tensor("experts.safetensors", expert_tensor(0, 1, "up"), lambda up: up.fill_(float("nan"))),
            "layers.0.experts.1.up_proj.weight has values that are infinite",
        ),
        (lambda directory: declare(directory, num_experts=4), "6 tensors are missing"),
        (lambda directory: declare(directory, has_prototype=True), "missing, the first is prototype"),
    ],
)
def test_damage_is_refused_with_its_own_reason(
    damage: Callable[[Path], None], reason: str, make_bundle: MakeBundle
) -> None:
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
