"""Which sizes of tiles are best: those that `triton_small` chooses, and those that stk fixes for its products."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import torch

from benchmarks.gpu_roofline import seconds
from benchmarks.gpu_table import Shape, make_exchange, make_layers
from experts.kernels.gpu_support import import_megablocks
from experts.kernels.registry import get_kernel

# Tokens from which the block-sparse products are worth a look.
MANY_TOKENS = 512


def sweep(grid: Sequence[Shape], device: str, dtype: torch.dtype) -> Iterator[str]:
    """Lines of a Markdown table: each choice's time in microseconds, and which one the kernel makes by itself."""
    yield "| experts | ffn | tokens | kernel | tiles | µs | |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for shape in grid:
        start = f"| {shape.experts} | {shape.inner} | {shape.tokens} |"
        times = _block_sparse(shape, device, dtype) if shape.tokens >= MANY_TOKENS else _small(shape, device, dtype)
        best: dict[str, float] = {}
        measured = list(times)
        for kernel, _, time_s, _ in measured:
            best[kernel] = min(time_s, best.get(kernel, time_s))
        for kernel, tiles, time_s, own in measured:
            marks = [mark for mark, holds in (("best", time_s == best[kernel]), ("own choice", own)) if holds]
            yield f"{start} {kernel} | {tiles} | {time_s * 1e6:.1f} | {', '.join(marks)} |"


def _small(shape: Shape, device: str, dtype: torch.dtype) -> Iterator[tuple[str, str, float, bool]]:
    exchange = make_exchange(shape, device, dtype)
    layers: list[Any] = [get_kernel("triton_small").load(weights) for weights in make_layers(shape, device, dtype)]
    for which in ("up_tiles", "down_tiles"):
        own = getattr(layers[0], which)
        for outputs, inputs, stages in product((16, 32, 64), (64, 128, 256), (3, 4)):
            tiles = replace(own, outputs=outputs, inputs=inputs, stages=stages)
            for layer in layers:
                setattr(layer, which, tiles)
            if (time_s := _seconds(layers, exchange, device)) is not None:
                yield f"triton_small {which}", f"{outputs} of {inputs}, {stages} stages", time_s, tiles == own
        for layer in layers:
            setattr(layer, which, own)


def _block_sparse(shape: Shape, device: str, dtype: torch.dtype) -> Iterator[tuple[str, str, float, bool]]:
    import triton

    import_megablocks()
    from stk.backend import triton_kernels

    exchange = make_exchange(shape, device, dtype)
    layers = [get_kernel("megablocks_sparse").load(weights) for weights in make_layers(shape, device, dtype)]
    for name in ("_sdd_kernel", "_dsd_kernel"):
        tuned = getattr(triton_kernels, name)
        own = tuned.configs[0]
        for block, warps, stages in product((32, 64, 128), (4, 8), (3, 4)):
            constants = own.kwargs | {"BLOCK_K": block}
            tuned.configs = [triton.Config(constants, num_warps=warps, num_stages=stages)]
            chosen = (own.kwargs["BLOCK_K"], own.num_warps, own.num_stages) == (block, warps, stages)
            if (time_s := _seconds(layers, exchange, device)) is not None:
                yield f"stk {name}", f"128 × 128 × {block}, {warps} warps, {stages} stages", time_s, chosen
        tuned.configs = [own]


def _seconds(layers: Sequence[Any], exchange: tuple[torch.Tensor, ...], device: str) -> float | None:
    """Of one layer, launches by the host included; none where the tiles do not fit the multiprocessor's memory."""

    def all_layers() -> None:
        for layer in layers:
            layer.forward(*exchange)

    from triton.runtime.errors import OutOfResources

    with torch.inference_mode():
        try:
            all_layers()
            if not device.startswith("cuda") or not hasattr(layers[0], "up_tiles"):
                return seconds(all_layers, device) / len(layers)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                all_layers()
            return seconds(graph.replay, device) / len(layers)
        except OutOfResources:
            return None
