"""The C library's functions other than products, against torch's operators, in every variant."""

import pytest
import torch
import torch.nn.functional as F

from experts.kernels.cpu.functions import swiglu
from experts.kernels.cpu.library import VARIANTS, CpuLibrary
from experts.kernels.cpu.panel_weights import PanelWeights
from tests.cpu_variants import choose_variant

TOKENS = 5
DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(params=VARIANTS)
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> CpuLibrary:
    return choose_variant(monkeypatch, request.param)


@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu(dtype: torch.dtype, library: CpuLibrary) -> None:
    projected_TF = 4 * torch.randn(TOKENS, 100, generator=torch.Generator().manual_seed(0)).to(dtype)
    projected_TF[0, :6] = torch.tensor([0.0, -0.0, 100.0, -100.0, 3e38, -3e38])
    inner_TF = torch.empty(TOKENS, 37, dtype=dtype)
    swiglu(library, projected_TF, 0, 50, inner_TF)
    expected_TF = F.silu(projected_TF[:, :37]) * projected_TF[:, 50:87]
    torch.testing.assert_close(inner_TF[:, 6:], expected_TF[:, 6:])
    # Where silu vanishes, what is left of it differs, and is next to nothing.
    torch.testing.assert_close(inner_TF[:, :5], expected_TF[:, :5], atol=1e-33, rtol=1.6e-2)
    assert abs(float(inner_TF[0, 5])) < 200


@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu_passes_on_what_is_not_a_number(dtype: torch.dtype, library: CpuLibrary) -> None:
    projected_TF = torch.ones(3, 8, dtype=dtype)
    projected_TF[0, 2] = projected_TF[2, 7] = torch.nan
    inner_TF = torch.empty(3, 4, dtype=dtype)
    swiglu(library, projected_TF, 0, 4, inner_TF)
    assert inner_TF.isnan().nonzero().tolist() == [[0, 2], [2, 3]]


def test_sigmoids_are_within_a_few_units_in_the_last_place(library: CpuLibrary) -> None:
    gate_1F = torch.cat([torch.linspace(-86, 20, 100_001), -torch.logspace(-30, 0, 1001)])[None]
    found_1F = torch.empty_like(gate_1F)
    swiglu(library, torch.cat([gate_1F, torch.ones_like(gate_1F)], dim=1), 0, gate_1F.shape[1], found_1F)
    exact_1F = gate_1F.double() * torch.sigmoid(gate_1F.double())
    assert ((found_1F - exact_1F) / exact_1F).abs().nan_to_num().max() < 4 * 2**-23


def test_bfloat16_is_rounded_as_torch_rounds(library: CpuLibrary) -> None:
    """Sums of any number and a part of its last bit: below, at and above the middle between two neighbours."""
    upper_N = (torch.arange(0x0800, 0x7F70, dtype=torch.int16)).view(torch.bfloat16)
    upper_N = torch.cat([upper_N, -upper_N, torch.tensor([torch.inf, -torch.inf, torch.nan]).bfloat16()])
    unit_N = 2.0 ** (upper_N.float().abs().frexp().exponent - 8)
    adder = PanelWeights(torch.ones(1, 2, dtype=torch.bfloat16), None)
    for part in (0, 0.25, 0.498046875, 0.5, 0.50390625, 0.75):
        lower_N = (unit_N * part).nan_to_num(0, 0, 0).bfloat16()
        expected_N = (upper_N.float() + lower_N.float()).bfloat16()
        found_N = adder.product(torch.stack([upper_N, lower_N], dim=1))[:, 0]
        torch.testing.assert_close(found_N, expected_N, rtol=0, atol=0, equal_nan=True)
