"""What `cpu_packed` promises beyond the conformance suite: bits, memory, and a fallback that shows."""

import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from experts.kernels import packed_linear
from experts.kernels.base import NO_EXPERT, kernel_in_use
from experts.kernels.cpu_packed import CpuPackedKernel, PackedExperts
from experts.kernels.onednn_product import OneDnnWeights
from experts.kernels.reference import ReferenceKernel
from tests.experts.kernels.conformance import Case, anywhere, distinct, make_exchange, make_weights, on_device

ROOT = Path(__file__).resolve().parents[3]


def run(code: str, *arguments: str) -> list[str]:
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@given(
    tokens=st.integers(1, 512),
    experts=st.integers(1, 5),
    top_k=st.integers(1, 3),
    # Odd ones leave a remainder in every vector loop; with the larger ones several pieces of rows are computed.
    hidden=st.integers(1, 90),
    inner=st.one_of(st.integers(1, 60), st.integers(150, 400), st.integers(1025, 1500)),
    data=st.data(),
)
# The layout stays the same for all examples.
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_token_has_the_same_bits_in_any_batch(
    layout: Any, dtype: torch.dtype, tokens: int, experts: int, top_k: int, hidden: int, inner: int, data: st.DataObject
) -> None:
    case = Case("any", experts=experts, hidden=hidden, inner=inner, tokens=tokens, top_k=top_k, routing=anywhere)
    prepared = CpuPackedKernel().load(make_weights(experts, hidden, inner, dtype))
    x_TD, index_TK, weight_TK = make_exchange(case, dtype)
    whole_TD = prepared.forward(x_TD, index_TK, weight_TK)
    chosen = torch.tensor(data.draw(st.lists(st.integers(0, tokens - 1), min_size=1, max_size=40)))
    some_TD = prepared.forward(x_TD[chosen], index_TK[chosen], weight_TK[chosen])
    assert torch.equal(some_TD, whole_TD[chosen])
    alone = int(chosen[0])
    one_TD = prepared.forward(*(tensor[alone : alone + 1] for tensor in (x_TD, index_TK, weight_TK)))
    assert torch.equal(one_TD[0], whole_TD[alone])


def test_the_reference_does_not_keep_bits_so_the_test_above_says_something() -> None:
    case = Case("any", hidden=90, inner=333, tokens=512, routing=distinct)
    exchange = make_exchange(case, torch.float32)
    prepared = ReferenceKernel().load(make_weights(case.experts, case.hidden, case.inner, torch.float32))
    whole_TD = prepared.forward(*exchange)
    parts = [prepared.forward(*(tensor[row : row + 1] for tensor in exchange)) for row in range(case.tokens)]
    assert not torch.equal(torch.cat(parts), whole_TD)


BITS = """
import hashlib, sys, torch
from experts.kernels import packed_linear
from experts.kernels.onednn_product import OneDnnWeights
if sys.argv[1] == "onednn":
    packed_linear._layout = lambda *_: OneDnnWeights
from experts.kernels.cpu_packed import CpuPackedKernel
from tests.experts.kernels.conformance import Case, distinct, make_exchange, make_weights
for threads in (1, 2, 3):
    torch.set_num_threads(threads)
    digest = hashlib.sha256()
    for hidden, inner, tokens in ((256, 704, 130), (90, 333, 512), (64, 9001, 3), (72, 40, 1), (64, 2816, 1)):
        case = Case("bits", hidden=hidden, inner=inner, tokens=tokens, routing=distinct)
        for dtype in (torch.float32, torch.bfloat16):
            torch.set_num_threads(1)
            prepared = CpuPackedKernel().load(make_weights(case.experts, hidden, inner, dtype))
            torch.set_num_threads(threads)
            output_TD = prepared.forward(*make_exchange(case, dtype))
            digest.update(output_TD.view(torch.uint8).numpy().tobytes())
    print(digest.hexdigest())
"""


@pytest.mark.parametrize("chosen", ["onednn", "whatever is chosen for one thread"])
def test_the_number_of_threads_changes_no_bit(chosen: str) -> None:
    digests = run(BITS, chosen)
    assert len(digests) == 3
    assert len(set(digests)) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rounds_as_the_released_code_does(dtype: torch.dtype) -> None:
    """In bfloat16 every intermediate is rounded where the reference rounds it: nearly all outputs are the very same."""
    case = Case("any", hidden=256, inner=192, tokens=64, routing=distinct)
    weights = make_weights(case.experts, case.hidden, case.inner, dtype)
    exchange = make_exchange(case, dtype)
    found, expected = (kernel.load(weights).forward(*exchange) for kernel in (CpuPackedKernel(), ReferenceKernel()))
    if dtype == torch.bfloat16:
        assert (found == expected).float().mean() > 0.99
    torch.testing.assert_close(found, expected, rtol=2e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-4)


MEMORY = """
import gc, pathlib, sys, psutil, torch
from experts.kernels.base import ExpertWeights
from experts.kernels.cpu_packed import CpuPackedKernel
from experts.kernels.packed_linear import packing_available
dtype = getattr(torch, sys.argv[1])
experts, hidden, inner = 8, 1024, 1408
assert packing_available(dtype)
CpuPackedKernel().load(ExpertWeights(*(torch.zeros(shape, dtype=dtype) for shape in ((1, 8, 8),) * 3)))
resident = psutil.Process().memory_info
gc.collect()
base = resident().rss
stacks = [torch.ones(shape, dtype=dtype) for shape in ((experts, inner, hidden),) * 2 + ((experts, hidden, inner),)]
plain = resident().rss - base
weights = ExpertWeights(*stacks)
nbytes, one_expert = weights.nbytes, weights.nbytes // experts
prepared = CpuPackedKernel().load(weights)
peak = int(pathlib.Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024 - base
del stacks, weights
gc.collect()
print(nbytes, plain, resident().rss - base, prepared.nbytes, peak, one_expert)
"""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_is_that_of_the_plain_weights(dtype: str) -> None:
    """Measured from outside: what the process holds, for packed tensors do not tell how large they are."""
    nbytes, plain, packed, accounted, peak, one_expert = map(int, run(MEMORY, dtype))
    assert plain == pytest.approx(nbytes, rel=0.05), "the measure sees the plain weights"
    assert 0.95 * nbytes <= packed <= 1.1 * nbytes
    assert accounted == pytest.approx(packed, rel=0.05)
    assert peak <= nbytes + accounted + one_expert + 4 * 2**20


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_the_fallback_computes_and_shows_itself(dtype: torch.dtype, caplog: pytest.LogCaptureFixture) -> None:
    weights = make_weights(3, 40, 24, dtype)
    exchange = make_exchange(Case("any", experts=3, hidden=40), dtype)
    kernel = CpuPackedKernel()
    with caplog.at_level(logging.WARNING):
        prepared = kernel.load(weights)
    assert f"cpu_packed computes with plain weights in {dtype}: only torch.float32 and torch.bfloat16" in caplog.text
    assert kernel_in_use(kernel, prepared) == "cpu_packed (not packed)"
    assert prepared.nbytes == weights.nbytes
    assert torch.equal(prepared.forward(*exchange), ReferenceKernel().load(weights).forward(*exchange))


def test_what_is_packed_says_so() -> None:
    kernel = CpuPackedKernel()
    assert kernel_in_use(kernel, kernel.load(make_weights(1, 16, 16, torch.float32))) == "cpu_packed"


def test_gradients_and_other_rows_are_refused() -> None:
    prepared = CpuPackedKernel().load(make_weights(2, 16, 16, torch.float32))
    x_TD, index_TK, weight_TK = make_exchange(Case("any", experts=2, hidden=16), torch.float32)
    with pytest.raises(ValueError, match="no gradients; train with torch_grouped"):
        prepared.forward(x_TD.clone().requires_grad_(), index_TK, weight_TK)
    with pytest.raises(ValueError, match=r"bfloat16 of 16; these experts take torch.float32 of 16"):
        prepared.forward(x_TD.bfloat16(), index_TK, weight_TK.bfloat16())
    with pytest.raises(ValueError, match=r"of 15; these experts take torch.float32 of 16"):
        prepared.forward(x_TD[:, :15], index_TK, weight_TK)


def test_other_devices_are_refused() -> None:
    weights = on_device(make_weights(1, 8, 4, torch.float32), "meta", torch.float32)
    with pytest.raises(ValueError, match="computes on the CPU; the weights are on meta"):
        CpuPackedKernel().load(weights)


def test_an_expert_without_tokens_costs_no_product(monkeypatch: pytest.MonkeyPatch) -> None:
    # Product by product, as where the C library does not multiply.
    monkeypatch.setattr(packed_linear, "_layout", lambda *_: OneDnnWeights)
    prepared = PackedExperts(make_weights(4, 16, 16, torch.float32))
    x_TD, index_TK, weight_TK = make_exchange(Case("two", hidden=16, inner=16, tokens=100), torch.float32)
    index_TK = torch.where(index_TK == 1, NO_EXPERT, index_TK)
    computed: list[tuple[int, int]] = []
    for expert, linear in enumerate(prepared._gate_up):
        original = linear.product_into

        def counting(
            x_TI: torch.Tensor,
            output_TO: torch.Tensor,
            first: int,
            end: int,
            expert: int = expert,
            original: Callable[..., None] = original,
        ) -> None:
            computed.append((expert, end - first))
            original(x_TI, output_TO, first, end)

        monkeypatch.setattr(linear, "product_into", counting)
    prepared.forward(x_TD, index_TK, weight_TK)
    assert computed == [(expert, int((index_TK == expert).sum())) for expert in (0, 2, 3)]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_an_expert_that_is_not_there_is_refused(layout: Any, dtype: torch.dtype) -> None:
    """Indices become addresses."""
    prepared = CpuPackedKernel().load(make_weights(4, 16, 16, torch.float32))
    index_TK = torch.tensor([[0, 4]], dtype=dtype)
    with pytest.raises(IndexError, match="too large"):
        prepared.forward(torch.ones(1, 16), index_TK, torch.ones(1, 2))
