"""What compiled functions share rounds and computes as torch does."""

from typing import Any

import numba
import numpy as np
import torch

from experts.kernels.compiled import exp, narrowed


@numba.njit
def narrow(x_N: Any, bits_N: Any) -> None:
    for n in range(len(x_N)):
        bits_N[n] = narrowed(x_N[n])


@numba.njit
def power(x_N: Any, output_N: Any) -> None:
    for n in range(len(x_N)):
        output_N[n] = exp(x_N[n])


def test_bfloat16_is_rounded_as_torch_rounds() -> None:
    # Every pattern of the upper half, with lower halves around the middle between two neighbours.
    upper_N = np.arange(1 << 16, dtype=np.uint32) << 16
    bits_N = np.concatenate([upper_N | lower for lower in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)])
    x_N = bits_N.view(np.float32)
    found_N = np.empty(len(x_N), dtype=np.uint16)
    narrow(x_N, found_N)
    found, expected = torch.from_numpy(found_N).view(torch.bfloat16), torch.from_numpy(x_N).bfloat16()
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.nan_to_num(0).view(torch.int16), expected.nan_to_num(0).view(torch.int16))


def test_powers_are_within_two_units_in_the_last_place() -> None:
    x_N = np.concatenate([np.linspace(-87, 0, 100_001), -np.logspace(-30, 0, 1001)]).astype(np.float32)
    found_N = np.empty_like(x_N)
    power(x_N, found_N)
    exact_N = np.exp(x_N.astype(np.float64))
    # float32's spacing as float64, for near the lowest powers it is subnormal, which a process may flush to zero.
    spacing_N = np.exp2(np.floor(np.log2(exact_N)) - 23)
    assert np.max(np.abs(found_N - exact_N) / spacing_N) < 2


def test_powers_of_what_has_none() -> None:
    found_N = np.empty(3, dtype=np.float32)
    power(np.array([-np.inf, -1000, np.nan], dtype=np.float32), found_N)
    assert np.all(found_N[:2] < 1e-37)
    assert np.isnan(found_N[2])
