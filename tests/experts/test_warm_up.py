"""Before a bundle counts as resident it has answered what a router would send, in every layer."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from experts.bundles.manifest import Manifest
from experts.bundles.probe import probe_sizes
from experts.errors import ExpertCapacityError, InvalidBundleError, WarmUpError
from experts.group import ExpertGroup
from experts.kernels.base import ExpertWeights
from experts.kernels.reference import ReferenceExperts, ReferenceKernel
from experts.registry.registry import Registry

MakeBundle = Callable[..., Path]
Change = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class Odd(ReferenceKernel):
    """Computes as the reference does, and then something else with it; keeps what it was asked."""

    def __init__(self, change: Change = lambda layer, x, index, output: output) -> None:
        self.change = change
        self.layers = 0
        self.asked: list[tuple[int, torch.dtype, tuple[int, ...], set[int]]] = []

    def load(self, weights: ExpertWeights) -> ReferenceExperts:
        kernel, layer = self, self.layers
        self.layers += 1

        class Experts(ReferenceExperts):
            def forward(
                self, x_TD: torch.Tensor, expert_index_TK: torch.Tensor, weight_TK: torch.Tensor
            ) -> torch.Tensor:
                shape = tuple(expert_index_TK.shape)
                kernel.asked.append((layer, x_TD.dtype, shape, set(expert_index_TK.flatten().tolist()) - {-1}))
                output_TD = super().forward(x_TD, expert_index_TK, weight_TK)
                return kernel.change(layer, x_TD, expert_index_TK, output_TD)

        return Experts(weights)


def group_of(registry: Registry, kernel: ReferenceKernel, **options: Any) -> ExpertGroup:
    options = {"max_resident_bytes": 10**8, **options}
    return ExpertGroup("breast", registry, kernel, device="cpu", **options)


@pytest.mark.parametrize(("top_k", "asked_for"), [(1, 1), (2, 2), (8, 3)])
def test_every_layer_is_asked_for_every_expert_and_for_one_token(
    top_k: int, asked_for: int, registry: Registry, pushed: Manifest
) -> None:
    kernel = Odd()
    group_of(registry, kernel, dtype=torch.bfloat16, top_k=top_k).load(pushed.digest)
    for layer in range(2):
        asked = [each for each in kernel.asked if each[0] == layer]
        assert {dtype for _, dtype, _, _ in asked} == {torch.bfloat16}
        assert {shape[1] for _, _, shape, _ in asked} == {asked_for}
        assert (1, asked_for) in [shape for _, _, shape, _ in asked]
        assert any(shape[0] > 1 and experts == {0, 1, 2} for _, _, shape, experts in asked)


def fails_alone(layer: int, x: torch.Tensor, index: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    if len(x) == 1 and layer == 1:
        raise RuntimeError("no code for one row")
    return output


def wide(layer: int, x: torch.Tensor, index: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    return output.double()


def cut(layer: int, x: torch.Tensor, index: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    return output[:, :-1]


def not_finite(layer: int, x: torch.Tensor, index: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    return output / 0 if layer == 1 else output


def one_expert_wrong(layer: int, x: torch.Tensor, index: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    return torch.where((index == 2).any(dim=1, keepdim=True), output * 1.01, output)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (fails_alone, "layer 1 cannot compute 1 token in float32, as requests send them: .*no code for one row"),
        (wide, "layer 0 cannot compute 8 tokens in float32"),
        (cut, "layer 0 cannot compute 8 tokens in float32"),
        (not_finite, "layer 1: the output for 8 tokens in float32 is infinite or not a number"),
        (one_expert_wrong, "layer 0 differs in float32 from the recorded output by .* on this replica"),
    ],
)
def test_what_a_kernel_does_not_compute_is_no_resident(
    change: Change, words: str, registry: Registry, make_bundle: MakeBundle
) -> None:
    digest = registry.push(make_bundle(probe=probe_sizes(3))).digest
    kernel = Odd(change)
    group = group_of(registry, kernel)
    with pytest.raises(WarmUpError, match=words):
        group.load(digest)
    assert group.resident() == []
    # Its memory is free again, and the same bundle can be loaded by a kernel that can.
    kernel.change, kernel.layers = Odd().change, 0
    size = group.load(digest).resident_bytes
    assert group_of(registry, Odd(), max_resident_bytes=size).load(digest).resident_bytes == size


@pytest.mark.parametrize(
    ("raised", "kind", "words"),
    [
        (
            ValueError("this kernel computes bfloat16 only"),
            InvalidBundleError,
            "cannot load it in float32 on cpu.*only",
        ),
        (RuntimeError("no such instruction"), InvalidBundleError, "RuntimeError: no such instruction"),
        (torch.OutOfMemoryError("tried to allocate"), ExpertCapacityError, "does not fit into the memory of cpu"),
    ],
)
def test_a_kernel_that_cannot_load_says_why(
    raised: Exception, kind: type[Exception], words: str, registry: Registry, pushed: Manifest
) -> None:
    class Refusing(ReferenceKernel):
        def load(self, weights: ExpertWeights) -> ReferenceExperts:
            raise raised

    with pytest.raises(kind, match=words):
        group_of(registry, Refusing()).load(pushed.digest)
