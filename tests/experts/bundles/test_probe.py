import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from experts.bundles.bundle import Bundle
from experts.bundles.layout import expected_tensors, expert_tensor
from experts.bundles.probe import TOLERANCES, make_inputs, probe_sizes, self_test
from experts.bundles.writer import derive_bundle, write_bundle
from experts.errors import InvalidBundleError, ProbeError
from experts.kernels.base import NO_EXPERT, ExpertKernel, ExpertWeights
from experts.kernels.reference import ReferenceExperts, ReferenceKernel
from experts.kernels.registry import get_kernel
from tests.experts.bad_bundles import change_tensor, replace_tensors

MakeBundle = Callable[..., Path]
Change = Callable[[torch.Tensor], torch.Tensor]


@pytest.fixture
def probed(make_bundle: MakeBundle) -> Callable[..., Path]:
    def make(name: str = "probed", num_experts: int = 3, **changes: Any) -> Path:
        return make_bundle(name, num_experts=num_experts, probe=probe_sizes(num_experts), **changes)

    return make


class Wrong(ReferenceKernel):
    """A kernel whose output is changed on its way out."""

    def __init__(self, change: Change) -> None:
        self._change = change

    def load(self, weights: ExpertWeights) -> ReferenceExperts:
        change = self._change

        class Changed(ReferenceExperts):
            def forward(self, *arguments: torch.Tensor) -> torch.Tensor:
                return change(super().forward(*arguments))

        return Changed(weights)


@pytest.mark.parametrize("kernel", ["reference", "cpu_packed", "torch_grouped", "auto"])
@pytest.mark.parametrize("bundle_dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16])
def test_every_kernel_passes_what_was_recorded(
    kernel: str, bundle_dtype: str, dtype: torch.dtype | None, probed: Any
) -> None:
    bundle = Bundle.open(probed(dtype=bundle_dtype))
    bundle.verify(finite=True)
    result = self_test(bundle, get_kernel(kernel), dtype=dtype)
    assert result.recorded
    computed = dtype or bundle.manifest.torch_dtype
    assert result.dtype == str(computed).removeprefix("torch.")
    assert result.tolerance == TOLERANCES[computed]
    # With room: a tolerance that real rounding nearly fills would fail on the next machine.
    assert result.worst_error < result.tolerance / 2
    assert result.resident_bytes >= 2 * 3 * 3 * 16 * 24 * computed.itemsize


def test_in_float32_the_reference_computes_exactly_what_was_recorded(probed: Any) -> None:
    assert self_test(Bundle.open(probed()), ReferenceKernel()).worst_error < 1e-6


def test_the_probe_has_the_scale_of_the_norm_and_reaches_every_expert(describe: Any) -> None:
    description = describe(num_experts=5, hidden_size=512, dtype="bfloat16")
    sizes = probe_sizes(5)
    norm = torch.linspace(0.5, 3, 512)
    inputs = make_inputs(description, sizes, 1, lambda layer: norm)
    root_mean_square = (inputs.hidden_states_TD / norm).square().mean(dim=1).sqrt()
    assert torch.allclose(root_mean_square, torch.ones(sizes.tokens), atol=0.01)
    counts = torch.bincount(inputs.expert_index_TK[inputs.expert_index_TK >= 0])
    assert len(counts) == 5
    assert counts.min() >= 2
    assert (inputs.expert_index_TK == NO_EXPERT).sum() == 1
    assert torch.equal(inputs.hidden_states_TD.bfloat16().float(), inputs.hidden_states_TD), "exact in bfloat16"
    assert not torch.equal(inputs.hidden_states_TD, make_inputs(description, sizes, 0).hidden_states_TD)


@pytest.mark.parametrize("num_experts", [1, 2, 3, 64, 100])
def test_there_are_tokens_enough(num_experts: int, describe: Any) -> None:
    sizes = probe_sizes(num_experts)
    index_TK = make_inputs(describe(num_experts=num_experts), sizes, 0).expert_index_TK
    assert torch.bincount(index_TK[index_TK >= 0], minlength=num_experts).min() >= 2
    assert sizes.top_k <= num_experts


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "change",
    [
        change_tensor("experts.safetensors", expert_tensor(1, 2, "down"), lambda down: down * 1.2),
        change_tensor("experts.safetensors", expert_tensor(0, 1, "gate"), lambda gate: -gate),
        lambda directory: replace_tensors(
            directory,
            "experts.safetensors",
            lambda tensors: tensors.update(
                {
                    expert_tensor(1, 0, "up"): tensors[expert_tensor(1, 1, "up")].clone(),
                    expert_tensor(1, 1, "up"): tensors[expert_tensor(1, 0, "up")].clone(),
                }
            ),
        ),
    ],
    ids=["one matrix scaled", "one sign turned", "two experts exchanged"],
)
def test_weights_that_are_not_those_that_were_packed(change: Callable[[Path], None], dtype: str, probed: Any) -> None:
    directory = probed(dtype=dtype)
    change(directory)
    bundle = Bundle.open(directory)
    # Nothing else would find it: the manifest agrees with the files.
    bundle.verify(finite=True)
    with pytest.raises(ProbeError, match=r"layer [01]: the kernel reference differs in .* from the recorded output"):
        self_test(bundle, ReferenceKernel())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda output: output * 1.001, "differs in float32 from the recorded output by 0.001"),
        (lambda output: output.index_fill(1, torch.tensor(0), torch.nan), "infinite or not a number"),
        (lambda output: output[:, :-1], r"gave torch.float32 \[8, 15\] for torch.float32 \[8, 16\]"),
        (lambda output: output.double(), "gave torch.float64"),
        (lambda output: output if len(output) > 1 else output + 1, "differs in float32"),
    ],
)
def test_a_kernel_that_computes_something_else(change: Change, reason: str, probed: Any) -> None:
    with pytest.raises(ProbeError, match=reason):
        self_test(Bundle.open(probed()), Wrong(change))


def test_without_a_probe_the_reference_is_asked_on_the_spot(make_bundle: MakeBundle) -> None:
    bundle = Bundle.open(make_bundle())
    kernel: ExpertKernel = get_kernel("cpu_packed")
    result = self_test(bundle, kernel)
    assert not result.recorded
    assert 0 < result.worst_error < 1e-5
    with pytest.raises(ProbeError, match="from the reference output"):
        self_test(bundle, Wrong(lambda output: output * 1.01))
    with pytest.raises(InvalidBundleError, match=r"probe.layers.0.hidden_states is missing"):
        bundle.probe(0)


def test_a_probe_that_asks_for_experts_that_are_not_there(probed: Any) -> None:
    directory = probed()
    change_tensor("probe.safetensors", "probe.layers.1.expert_index", lambda index: index.fill_(7))(directory)
    with pytest.raises(ProbeError, match="layer 1: the probe asks experts 7 to 7; the bundle has 0 to 2"):
        self_test(Bundle.open(directory), ReferenceKernel())


def test_a_derived_bundle_keeps_the_probe(probed: Any, tmp_path: Path) -> None:
    source = Bundle.open(probed())
    derive_bundle(tmp_path / "liver", source, {"organ": "liver"})
    assert self_test(Bundle.open(tmp_path / "liver"), ReferenceKernel()).recorded
    with pytest.raises(ValueError, match="probe cannot differ"):
        derive_bundle(tmp_path / "other", source, {"probe": None})


def test_a_dtype_that_overflows_is_found(describe: Any, tmp_path: Path) -> None:
    description = describe(probe=probe_sizes(3))
    specs = expected_tensors(description)
    write_bundle(tmp_path / "large", description, lambda name: torch.full(specs[name][1], 60.0))
    with pytest.raises(ProbeError, match="infinite or not a number in float16"):
        self_test(Bundle.open(tmp_path / "large"), ReferenceKernel(), dtype=torch.float16)


def test_memory_does_not_grow_with_the_bundle(tmp_path: Path) -> None:
    """64 layers of 6 MiB: recorded one after the other."""
    code = f"""
import resource, torch
from pathlib import Path
from experts.bundles.writer import write_bundle
from experts.bundles.manifest import BundleDescription
from experts.bundles.probe import probe_sizes
description = BundleDescription(
    name="x", organ="x", version="1.0.0", description="", authors="", license="MIT", intended_use="",
    backbone_digest="0" * 64, num_layers=64, num_experts=2, hidden_size=512, intermediate_size=512, dtype="float32",
    probe=probe_sizes(2))
weight, gate = torch.zeros(512, 512), torch.zeros(2, 512)
at = []
def probed(layer):
    at.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
write_bundle(Path({str(tmp_path / "b")!r}), description, lambda name: weight if "experts" in name else gate,
             max_file_bytes=10**9, probed=probed)
print(at[-1] - at[2], (Path({str(tmp_path / "b")!r}) / "experts.safetensors").stat().st_size // 1024)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    grown, size = map(int, done.stdout.split())
    assert size > 380_000
    # KiB.
    assert grown < 32 * 1024
