import pytest
import torch

from experts.kernels.base import ExpertWeights
from experts.kernels.registry import KERNEL_NAMES, get_kernel


def test_names_are_the_kernels_own() -> None:
    assert "reference" in KERNEL_NAMES
    assert all(get_kernel(name).name == name for name in KERNEL_NAMES)


def test_an_unknown_kernel_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="no expert kernel 'fast'; there are reference"):
        get_kernel("fast")


def test_the_reference_is_differentiable() -> None:
    generator = torch.Generator().manual_seed(0)
    stacks = [
        torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
        for shape in ((2, 3, 4), (2, 3, 4), (2, 4, 3))
    ]
    x_TD = torch.randn((5, 4), generator=generator, dtype=torch.float64)
    index_TK = torch.tensor([[0, 1], [1, 1], [-1, 0], [0, -1], [-1, -1]], dtype=torch.int32)
    weight_TK = torch.rand((5, 2), generator=generator, dtype=torch.float64).requires_grad_()
    output_TD = get_kernel("reference").load(ExpertWeights(*stacks)).forward(x_TD, index_TK, weight_TK)
    gradients = torch.autograd.grad(output_TD.square().sum(), (*stacks, weight_TK))
    assert all(torch.count_nonzero(gradient) > 0 for gradient in gradients)
    assert torch.count_nonzero(gradients[-1][4]) == 0
