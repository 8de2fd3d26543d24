"""As served: one torch thread. And the layouts of packed weights."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from experts.kernels import avx512_product, onednn_product, packed_linear
from experts.kernels.avx512_product import Avx512Weights
from experts.kernels.onednn_product import OneDnnWeights

LAYOUTS = {"avx512": (Avx512Weights, avx512_product), "onednn": (OneDnnWeights, onednn_product)}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=LAYOUTS)
def layout(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Every layout that this machine can compute with, whether it is the one that would be chosen or not."""
    weights, module = LAYOUTS[request.param]
    for dtype in (torch.float32, torch.bfloat16):
        if reason := module.unavailable_reason(dtype):
            pytest.skip(f"{request.param}, {dtype}: {reason}")
    monkeypatch.setattr(packed_linear, "_layout", lambda *_: weights)
    return weights
