"""Bundles of another floating dtype than the backbone's: converted when they load, or refused; both ways round."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from experts.bundles.bundle import Bundle
from experts.bundles.convert import OtherDtype
from experts.bundles.manifest import BundleDescription, DTypeName
from experts.bundles.probe import probe_sizes
from experts.bundles.writer import write_bundle
from experts.checks.check import CheckRequest, check
from experts.errors import ExpertCapacityError, InvalidBundleError
from experts.group import ExpertGroup
from experts.kernels.registry import get_kernel
from experts.registry.registry import Registry
from experts.registry.source import BundleSource
from router.gating.expert_gates import BundleGates, ExpertGates
from router.gating.expert_set import ExpertSet, ExpertSetMember

MakeBundle = Callable[..., Path]
DTYPES: dict[DTypeName, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
PARAMETERS = 2 * 3 * 3 * 16 * 24


def group_of(registry: Registry, dtype: torch.dtype, kernel: str = "auto", **options: Any) -> ExpertGroup:
    options = {"max_resident_bytes": 10**8, **options}
    return ExpertGroup("breast", registry, get_kernel(kernel), device="cpu", dtype=dtype, top_k=2, **options)


@pytest.mark.parametrize("kernel", ["auto", "reference", "torch_grouped"])
@pytest.mark.parametrize("backbone", DTYPES)
@pytest.mark.parametrize("packed", DTYPES)
def test_a_bundle_of_any_dtype_computes_in_the_backbones_or_is_refused(
    packed: DTypeName, backbone: DTypeName, kernel: str, make_bundle: MakeBundle, registry: Registry
) -> None:
    directory = make_bundle(dtype=packed, probe=probe_sizes(3))
    dtype = DTYPES[backbone]
    source = BundleSource(folder=directory)
    result = check(Bundle.open(directory), CheckRequest(source=source, kernel=kernel, dtype=backbone))
    assert (result.dtype, result.bundle_dtype) == (backbone, packed)

    digest = registry.push(directory).digest
    group = group_of(registry, dtype, kernel)
    resident = group.load(digest)
    assert (resident.dtype, resident.bundle_dtype) == (backbone, packed)
    assert resident.resident_bytes >= PARAMETERS * dtype.itemsize
    x_TD = torch.randn(1, 16).to(dtype)
    answer_TD = group.forward(digest, 1, x_TD, torch.tensor([[0, 2]], dtype=torch.int32), torch.ones(1, 2).to(dtype))
    assert (answer_TD.dtype, answer_TD.shape) == (dtype, (1, 16))

    bundle_gates = BundleGates.read(registry.open(digest), num_layers=2, dtype=dtype)
    member = ExpertSetMember(organ="breast", bundle_digest=digest)
    expert_set = ExpertSet(backbone_digest=bundle_gates.backbone_digest, routing="organs", members=(member,))
    logits_TE = ExpertGates.of(expert_set, {digest: bundle_gates}).logits(0, x_TD)
    assert (logits_TE.dtype, logits_TE.shape) == (dtype, (1, 3))

    refusing = group_of(registry, dtype, kernel, other_dtype="refuse")
    request = CheckRequest(source=source, kernel=kernel, dtype=backbone, other_dtype="refuse")
    if packed == backbone:
        assert refusing.load(digest).dtype == backbone
        assert check(Bundle.open(directory), request).ok
        return
    words = (
        f"experts of bundle breast experts 1.0.0 are {packed}, the backbone computes in {backbone}.*--dtype {backbone}"
    )
    with pytest.raises(InvalidBundleError, match=words):
        refusing.load(digest)
    with pytest.raises(InvalidBundleError, match=words):
        check(Bundle.open(directory), request)
    assert refusing.resident() == []


def test_gate_rows_of_another_dtype_are_converted_or_refused(make_bundle: MakeBundle, registry: Registry) -> None:
    directory = make_bundle(dtype="bfloat16", gate_dtype="float32")
    digest = registry.push(directory).digest
    assert group_of(registry, torch.bfloat16).load(digest).digest == digest
    read = BundleGates.read(registry.open(digest), num_layers=2, dtype=torch.bfloat16)
    assert {rows.dtype for rows in read.rows} == {torch.bfloat16}
    with pytest.raises(InvalidBundleError, match=r"the gate rows of bundle .* are float32"):
        group_of(registry, torch.bfloat16, other_dtype="refuse").load(digest)


def test_room_is_counted_in_the_dtype_that_is_computed_in(make_bundle: MakeBundle, registry: Registry) -> None:
    digest = registry.push(make_bundle(dtype="bfloat16")).digest
    size = PARAMETERS * 4
    with pytest.raises(ExpertCapacityError):
        group_of(registry, torch.float32, "reference", max_resident_bytes=size - 1).load(digest)
    assert group_of(registry, torch.float32, "reference", max_resident_bytes=size).load(digest).resident_bytes == size


def with_one(directory: Path, description: BundleDescription, tensors: Any, name: str, value: float) -> Path:
    tensors[name].view(-1)[5] = value
    write_bundle(directory, description, tensors.__getitem__)
    return directory


@pytest.mark.parametrize(
    ("name", "other_dtype", "words"),
    [
        ("layers.1.experts.2.down_proj.weight", "convert", "layer 1, down projections: .* too large for float16"),
        ("layers.0.gate.weight", "convert", "layer 0, gate rows: .* too large for float16"),
    ],
)
def test_weights_that_the_backbones_dtype_cannot_hold_are_refused_everywhere(
    name: str, other_dtype: OtherDtype, words: str, tmp_path: Path, describe: Any, make_tensors: Any, registry: Registry
) -> None:
    description = describe()
    directory = with_one(tmp_path / "large", description, make_tensors(description), name, 1e6)
    bundle = Bundle.open(directory)
    request = CheckRequest(source=BundleSource(folder=directory), kernel="reference", other_dtype=other_dtype)
    with pytest.raises(InvalidBundleError, match=words):
        check(bundle, request.model_copy(update={"dtype": "float16"}))
    digest = registry.push(directory).digest
    if ".gate." in name:
        with pytest.raises(InvalidBundleError, match=words):
            BundleGates.read(registry.open(digest), num_layers=2, dtype=torch.float16)
    else:
        with pytest.raises(InvalidBundleError, match=words):
            group_of(registry, torch.float16, "reference").load(digest)


def test_gates_whose_logits_overflow_are_refused(tmp_path: Path, describe: Any, make_tensors: Any) -> None:
    description = describe()
    tensors = make_tensors(description)
    tensors["layers.1.gate.weight"].fill_(3e38)
    write_bundle(tmp_path / "loud", description, tensors.__getitem__)
    request = CheckRequest(source=BundleSource(folder=tmp_path / "loud"), kernel="reference")
    with pytest.raises(InvalidBundleError, match="layer 1: the gate rows give logits that are infinite"):
        check(Bundle.open(tmp_path / "loud"), request)
