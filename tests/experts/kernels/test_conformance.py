"""The kernels that run on a CPU, each through the whole conformance suite."""

from typing import Any

import pytest
import torch

from experts.kernels.base import ExpertKernel, ExpertWeights, PreparedExperts
from experts.kernels.reference import ReferenceKernel
from experts.kernels.registry import get_kernel
from tests.experts.kernels.conformance import (
    CASES,
    TOLERANCE,
    Case,
    check_case,
    check_gradients,
    check_no_expert_is_exactly_zero,
)

CPU_KERNELS = ("reference", "cpu_packed", "torch_grouped", "auto")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", CPU_KERNELS)
def test_case(name: str, dtype: torch.dtype, case: Case) -> None:
    check_case(get_kernel(name), case, dtype)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_packed_in_every_layout(layout: Any, dtype: torch.dtype, case: Case) -> None:
    check_case(get_kernel("cpu_packed"), case, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", CPU_KERNELS)
def test_no_expert_is_exactly_zero(name: str, dtype: torch.dtype) -> None:
    check_no_expert_is_exactly_zero(get_kernel(name), dtype)


@pytest.mark.parametrize(("hidden", "inner"), [(72, 40), (33, 17)])
@pytest.mark.parametrize(
    ("name", "dtype"),
    # In float32 the reference is the oracle itself.
    [("torch_grouped", torch.float32), ("torch_grouped", torch.bfloat16), ("reference", torch.bfloat16)],
)
def test_gradients(name: str, dtype: torch.dtype, hidden: int, inner: int) -> None:
    check_gradients(get_kernel(name), dtype, hidden=hidden, inner=inner)


class _OffByOne:
    """A kernel that is wrong in one expert's last weight."""

    name = "off_by_one"

    def load(self, weights: ExpertWeights) -> PreparedExperts:
        down_EDF = weights.down_EDF.clone()
        down_EDF[-1, -1] += 0.1
        return ReferenceKernel().load(ExpertWeights(weights.gate_EFD, weights.up_EFD, down_EDF))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_the_suite_sees_a_wrong_kernel(dtype: torch.dtype) -> None:
    kernel: ExpertKernel = _OffByOne()
    with pytest.raises(AssertionError, match="relative error"):
        check_case(kernel, Case("all to the wrong one", experts=1), dtype)
