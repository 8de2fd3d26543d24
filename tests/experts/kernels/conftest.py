"""As served: one torch thread. And the layouts of packed weights, with every variant of the C library."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from experts.kernels import onednn_product, packed_linear
from experts.kernels.cpu.library import VARIANTS
from experts.kernels.cpu.panel_weights import PanelWeights
from experts.kernels.onednn_product import OneDnnWeights
from tests.cpu_variants import choose_variant, need_library


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def built_library() -> None:
    """Skips the test where the C library was not built; requested before `fresh`, which forgets what is built."""
    need_library()


@pytest.fixture(params=[*VARIANTS, "onednn"])
def layout(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Every layout that this machine can compute with, whether it is the one that would be chosen or not."""
    if request.param == "onednn":
        for dtype in (torch.float32, torch.bfloat16):
            if reason := onednn_product.unavailable_reason(dtype):
                pytest.skip(f"{request.param}, {dtype}: {reason}")
        weights: Any = OneDnnWeights
    else:
        choose_variant(monkeypatch, request.param)
        weights = PanelWeights
    monkeypatch.setattr(packed_linear, "_layout", lambda *_: weights)
    return weights
