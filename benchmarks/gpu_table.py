"""The table of all kernels over tokens, inner sizes and numbers of experts, in shares of the roofline."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from benchmarks.gpu_roofline import COLD_BYTES, Ceilings, Work, seconds, work_of
from benchmarks.measure_table import table_head
from experts.kernels.base import ExpertKernel, ExpertWeights, PreparedExperts
from experts.kernels.registry import get_kernel

# Those that never wait for the device, so that a CUDA graph can hold them.
CAPTURABLE = ("triton_small", "torch_grouped")
# `auto` may be this much slower than the best.
AUTO_MARGIN = 0.05


@dataclass(frozen=True, slots=True)
class Shape:
    """One place in the table."""

    experts: int
    inner: int
    tokens: int
    hidden: int
    top_k: int


@dataclass(frozen=True, slots=True)
class Row:
    """What was measured there: seconds of a call as the engine makes it, and of one replayed from a CUDA graph."""

    shape: Shape
    kernel: str
    work: Work
    seconds: float | None
    graph_seconds: float | None = None
    note: str = ""

    @property
    def best_seconds(self) -> float:
        """The shorter of the two; infinite if neither was measured."""
        return min(value if value is not None else math.inf for value in (self.seconds, self.graph_seconds))


def shapes(experts: Sequence[int], inners: Sequence[int], tokens: Sequence[int], hidden: int) -> Iterator[Shape]:
    """All combinations; two experts a token where there are as many, as in the released model."""
    for inner in inners:
        for number in experts:
            for rows in tokens:
                yield Shape(number, inner, rows, hidden, min(2, number))


def measure(names: Sequence[str], grid: Iterable[Shape], device: str, dtype: torch.dtype) -> Iterator[Row]:
    """Times every kernel in every case. A kernel that cannot be used gives a row with the reason."""
    held: tuple[int, int] | None = None
    layers: list[ExpertWeights] = []
    prepared: dict[str, list[PreparedExperts] | str] = {}
    for shape in grid:
        if held != (shape.experts, shape.inner):
            prepared, held = {}, (shape.experts, shape.inner)
            layers = make_layers(shape, device, dtype)
        x_TD, index_TK, weight_TK = make_exchange(shape, device, dtype)
        used = int(torch.unique(index_TK).numel())
        work = work_of(
            tokens=shape.tokens,
            pairs=index_TK.numel(),
            experts_used=used,
            hidden=shape.hidden,
            inner=shape.inner,
            itemsize=dtype.itemsize,
        )
        for name in names:
            if name not in prepared:
                prepared[name] = _load(name, layers)
            found = prepared[name]
            if isinstance(found, str):
                yield Row(shape, name, work, None, note=found)
            else:
                yield _time(name, found, shape, work, (x_TD, index_TK, weight_TK), device)


def markdown(rows: Sequence[Row], ceilings: Ceilings) -> str:
    """The table, and under it how far `auto` is behind the best kernel of each shape."""
    lines = table_head(
        "| experts | ffn | tokens | kernel | µs | µs in a graph | TFLOP/s | GB/s | bound | share of roofline | |"
    )
    best = {shape: min(row.best_seconds for row in rows if row.shape == shape) for shape in {row.shape for row in rows}}
    for row in rows:
        shape, time_s = row.shape, row.best_seconds
        start = f"| {shape.experts} | {shape.inner} | {shape.tokens} | {row.kernel} |"
        if math.isinf(time_s):
            lines.append(f"{start} | | | | | | {row.note} |")
            continue
        share = row.work.least_seconds(ceilings) / time_s
        mark = ", ".join(part for part in ("best" if time_s == best[shape] else "", row.note) if part)
        lines.append(
            f"{start} {_micro(row.seconds)} | {_micro(row.graph_seconds)} | {row.work.flops / time_s / 1e12:.1f} | "
            f"{row.work.bytes_moved / time_s / 1e9:.0f} | {row.work.bound(ceilings)} | {share:.2f} | {mark} |"
        )
    return "\n".join([*lines, "", *_verdicts(rows, ceilings)])


def _verdicts(rows: Sequence[Row], ceilings: Ceilings) -> Iterator[str]:
    by_shape: dict[Shape, list[Row]] = {}
    for row in rows:
        if not math.isinf(row.best_seconds):
            by_shape.setdefault(row.shape, []).append(row)
    large = [s for s in by_shape if s.tokens == 8192]
    small = [s for s in by_shape if s.tokens <= 32]
    for chosen, bound, target in ((large, "compute", 0.75), (small, "memory", 0.7)):
        shares = [
            max(row.work.least_seconds(ceilings) / row.best_seconds for row in by_shape[shape])
            for shape in chosen
            if by_shape[shape][0].work.bound(ceilings) == bound
        ]
        if shares:
            where = "at 8,192 tokens" if bound == "compute" else "at up to 32 tokens"
            yield f"- Best kernel {where}: {min(shares):.2f} of the {bound} roofline or more (target ≥ {target})."
    behind = []
    for found in by_shape.values():
        auto = [row.seconds for row in found if row.kernel == "auto" and row.seconds is not None]
        others = [row.seconds for row in found if row.kernel != "auto" and row.seconds is not None]
        if auto and others:
            behind.append(auto[0] / min(others) - 1)
    if behind:
        yield f"- `auto` is {max(behind):.0%} behind the best at most (target ≤ {AUTO_MARGIN:.0%})."


def _micro(time_s: float | None) -> str:
    return "" if time_s is None else f"{time_s * 1e6:.1f}"


def make_layers(shape: Shape, device: str, dtype: torch.dtype) -> list[ExpertWeights]:
    """As many layers as it takes that none is still in the cache when its turn comes again; all with one content."""
    one = 3 * shape.experts * shape.hidden * shape.inner * dtype.itemsize
    number = max(1, min(16, -(-COLD_BYTES // one))) if device.startswith("cuda") else 1
    scale_in, scale_out = 1 / math.sqrt(shape.hidden), 1 / math.sqrt(shape.inner)

    def random(rows: int, columns: int, scale: float) -> torch.Tensor:
        return torch.randn((shape.experts, rows, columns), device=device, dtype=dtype) * scale

    return [
        ExpertWeights(
            random(shape.inner, shape.hidden, scale_in),
            random(shape.inner, shape.hidden, scale_in),
            random(shape.hidden, shape.inner, scale_out),
        )
        for _ in range(number)
    ]


def make_exchange(shape: Shape, device: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random rows, each to as many different experts as the shape says, and weights of the pairs."""
    generator = torch.Generator().manual_seed(0)
    index_TK = torch.rand((shape.tokens, shape.experts), generator=generator).argsort(dim=1)[:, : shape.top_k].int()
    x_TD = torch.randn((shape.tokens, shape.hidden), generator=generator)
    weight_TK = torch.rand((shape.tokens, shape.top_k), generator=generator)
    return x_TD.to(device, dtype), index_TK.to(device), weight_TK.to(device, dtype)


def _load(name: str, layers: Sequence[ExpertWeights]) -> list[PreparedExperts] | str:
    try:
        kernel: ExpertKernel = get_kernel(name)
        return [kernel.load(weights) for weights in layers]
    except (ValueError, torch.OutOfMemoryError) as error:
        return _line(error)


def _time(
    name: str,
    prepared: Sequence[PreparedExperts],
    shape: Shape,
    work: Work,
    exchange: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    device: str,
) -> Row:
    def all_layers() -> None:
        for layer in prepared:
            layer.forward(*exchange)

    with torch.inference_mode():
        try:
            plain = seconds(all_layers, device) / len(prepared)
        except RuntimeError as error:
            return Row(shape, name, work, None, note=_line(error))
        if name not in CAPTURABLE or not device.startswith("cuda"):
            return Row(shape, name, work, plain)
        try:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                all_layers()
            return Row(shape, name, work, plain, seconds(graph.replay, device) / len(prepared))
        except RuntimeError as error:
            return Row(shape, name, work, plain, note=f"not in a graph: {_line(error)}")


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].replace("|", "/")
