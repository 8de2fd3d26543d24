"""All linear layers of one decode step of the backbone, stock and packed: `python -m benchmarks.backbone_linears`.

Builds the backbone of a configuration in the released layout with random weights from a seed, and runs every layer that
the engine packs (attention, dense MLP, shared expert, head) on as many rows as sequences decode together. Both sides
alternate in one run; the figures are medians. Writes `benchmarks/results/backbone_linears.md`.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from torch import nn

from benchmarks.machine import describe
from echovlm_ray.model.configuration import EchoVLMConfig
from echovlm_ray.model.modeling import EchoVLMForConditionalGeneration
from echovlm_ray.model.packing import MIN_OUT_FEATURES, PackedLinearLayer

CONFIG = Path(__file__).resolve().parent / "configs" / "config_4_experts.json"
RESULT = Path(__file__).resolve().parent / "results" / "backbone_linears.md"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BATCHES = (1, 8, 32)
THREADS = (1, 2)


def linears(config: Path, dtype: torch.dtype) -> list[nn.Linear]:
    """The layers that the engine packs, with weights from a seed."""
    torch.manual_seed(0)
    parsed = EchoVLMConfig(**json.loads(config.read_text()))
    with torch.device("meta"):
        model = EchoVLMForConditionalGeneration(parsed, vision=False, routed_experts=False)
    found = []
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.out_features >= MIN_OUT_FEATURES:
            linear = nn.Linear(module.in_features, module.out_features, module.bias is not None)
            found.append(linear.to(dtype))
    return found


def step(layers: list[Callable[[torch.Tensor], torch.Tensor]], inputs: list[torch.Tensor]) -> float:
    """Milliseconds for one pass through all layers."""
    started = time.perf_counter()
    for layer, x in zip(layers, inputs, strict=True):
        layer(x)
    return (time.perf_counter() - started) * 1e3


def main() -> None:
    """Measures, prints and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, default=CONFIG, help="config.json (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=30, help="passes of each side (default: %(default)s)")
    options = parser.parse_args()
    console = Console()
    rows = []
    with Progress(console=console) as progress, torch.inference_mode():
        task = progress.add_task("measuring", total=len(DTYPES) * len(BATCHES) * len(THREADS))
        for dtype_name, dtype in DTYPES.items():
            stock = linears(options.config, dtype)
            for threads in THREADS:
                # The layout depends on it.
                torch.set_num_threads(threads)
                packed = [PackedLinearLayer(linear) for linear in stock]
                for batch in BATCHES:
                    inputs = [torch.randn(batch, linear.in_features).to(dtype) for linear in stock]
                    times: dict[str, list[float]] = {"stock": [], "packed": []}
                    for _ in range(options.repeats):
                        times["stock"].append(step(list(stock), inputs))
                        times["packed"].append(step(list(packed), inputs))
                    slow, fast = (statistics.median(times[side]) for side in ("stock", "packed"))
                    rows.append(
                        f"| {dtype_name} | {threads} | {batch} | {slow:.1f} | {fast:.1f} | **{slow / fast:.2f}** |"
                    )
                    progress.advance(task)
    lines = [
        "# The backbone's linear layers, stock and packed",
        "",
        describe(),
        f"Configuration `{options.config.name}`, {len(stock)} layers, median of {options.repeats} alternating passes.",
        "",
        "| dtype | threads | sequences | stock, ms | packed, ms | ratio |",
        "| --- | --- | --- | --- | --- | --- |",
        *rows,
    ]
    text = "\n".join(lines) + "\n"
    RESULT.write_text(text)
    console.print(text, markup=False)


if __name__ == "__main__":
    main()
