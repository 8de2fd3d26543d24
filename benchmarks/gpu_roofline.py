"""What the experts must cost at least on a machine: the arithmetic, and the measurement of its two ceilings."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

# The largest cache of a GPU; data to be read from memory must be several times larger.
COLD_BYTES = 512 * 1024**2


@dataclass(frozen=True, slots=True)
class Ceilings:
    """The highest measured rates of the machine."""

    flops_per_s: float
    bytes_per_s: float


@dataclass(frozen=True, slots=True)
class Work:
    """What one call needs, however it is done: operations, and bytes that must cross the memory's bus once."""

    flops: int
    bytes_moved: int

    def least_seconds(self, ceilings: Ceilings) -> float:
        """The time below which no kernel can be: the roofline (Williams et al. 2009)."""
        return max(self.flops / ceilings.flops_per_s, self.bytes_moved / ceilings.bytes_per_s)

    def bound(self, ceilings: Ceilings) -> str:
        """Which of the two ceilings it meets first."""
        compute = self.flops / ceilings.flops_per_s
        return "compute" if compute >= self.bytes_moved / ceilings.bytes_per_s else "memory"


def work_of(*, tokens: int, pairs: int, experts_used: int, hidden: int, inner: int, itemsize: int) -> Work:
    """The work of one call.

    Args:
        tokens: rows that are read and written.
        pairs: (token, expert) pairs.
        experts_used: experts with at least one pair: only their weights are read.
        hidden: size of a row.
        inner: the experts' inner size.
        itemsize: bytes of an element.
    """
    weights = 3 * experts_used * hidden * inner
    return Work(6 * pairs * hidden * inner, itemsize * (weights + 2 * tokens * hidden))


def measure_ceilings(device: str, dtype: torch.dtype, size: int, copied_bytes: int) -> Ceilings:
    """Times a square matrix product on random data, and a copy and a read of a large piece of memory.

    Args:
        device: where.
        dtype: of the product.
        size: rows and columns of the matrices.
        copied_bytes: of the piece; several times any cache.
    """
    a = torch.randn((size, size), device=device, dtype=dtype)
    b = torch.randn((size, size), device=device, dtype=dtype)
    product = seconds(lambda: torch.mm(a, b), device)
    source = torch.ones(copied_bytes // 4, device=device, dtype=torch.float32)
    target = torch.empty_like(source)
    copy = seconds(lambda: target.copy_(source), device)
    read = seconds(lambda: source.amax(), device)
    return Ceilings(2 * size**3 / product, max(2 * source.nbytes / copy, source.nbytes / read))


def seconds(call: Callable[[], object], device: str, repeats: int = 7, least_s: float = 0.02) -> float:
    """The median time of a call over several runs of many calls each; by the device's own clock where it has one."""
    for _ in range(3):
        call()
    once = _elapsed(call, device, 1)
    calls = max(1, min(1000, int(least_s / max(once, 1e-7))))
    return statistics.median(_elapsed(call, device, calls) / calls for _ in range(repeats))


def _elapsed(call: Callable[[], object], device: str, calls: int) -> float:
    if not device.startswith("cuda"):
        start = time.perf_counter()
        for _ in range(calls):
            call()
        return time.perf_counter() - start
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    for _ in range(calls):
        call()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end)) / 1000
