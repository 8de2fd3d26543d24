"""Predicts the released model's decode tokens/s on 1, 8 and 64 GPUs: `python -m benchmarks.scaling_model`.

The formulas are in `benchmarks/scaling_formulas.py` and, in words, in `docs/scaling.md`. What the software costs is
read from what `python -m benchmarks.host_costs` measured; devices and network are assumptions, each an option.
The same formulas are applied to the machine that was measured, and compared with what it really did.
Writes `benchmarks/results/scaling_model.md`; with --plot also `.png`; with --json prints JSON instead.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from benchmarks.drawing import check_drawing
from benchmarks.scaling_predictions import Assumptions, check, lines_of
from benchmarks.scaling_report import markdown, plot, to_json
from benchmarks.scaling_system import sizes_of
from echovlm_ray.checkpoint.schema import ModelShape

RESULTS = Path(__file__).resolve().parent / "results"
# The released model's sizes; the vision tower has Qwen2-VL's own.
RELEASED = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 1408,
    "shared_expert_intermediate_size": 5632,
}
GPUS = (1, 8, 64)
REQUESTS = (1, 8, 64, 512)


def arguments() -> argparse.ArgumentParser:
    """The options; every assumption is one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--costs", type=Path, default=RESULTS / "host_costs.json", help="(default: %(default)s)")
    parser.add_argument("--gpus", type=int, nargs="+", default=GPUS, help="(default: %(default)s)")
    parser.add_argument("--batches", type=int, nargs="+", default=REQUESTS, help="requests (default: %(default)s)")
    parser.add_argument("--context", type=int, default=1024, help="tokens of each request (default: %(default)s)")
    parser.add_argument("--mode", choices=("clone", "partition"), default="clone", help="(default: %(default)s)")
    parser.add_argument("--output", type=Path, default=RESULTS / "scaling_model.md", help="(default: %(default)s)")
    parser.add_argument("--plot", action="store_true", help="draw the figures beside the output")
    parser.add_argument("--json", action="store_true", help="print JSON, write nothing")
    for name, value in asdict(Assumptions()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=float, default=value, help="(default: %(default)s)")
    return parser


def main() -> None:
    """Predicts, prints and writes the result."""
    parser = arguments()
    options = parser.parse_args()
    if options.plot and not options.json:
        check_drawing()
    assumptions = Assumptions(**{name: getattr(options, name) for name in asdict(Assumptions())})
    if not options.costs.is_file():
        parser.error(f"{options.costs} does not exist: run `python -m benchmarks.host_costs` first")
    result = json.loads(options.costs.read_text())
    sizes = sizes_of(ModelShape.from_config(RELEASED))
    lines, checks = lines_of(sizes, result, assumptions, options), check(result)
    if options.json:
        print(json.dumps(to_json(lines, checks, assumptions), indent=1))
        return
    text = markdown(sizes, lines, checks, assumptions, options.mode, options.context, result["machine"])
    if options.plot:
        picture = options.output.with_suffix(".png")
        plot(lines, picture)
        text += f"\n![Predicted throughput]({picture.name})\n"
    options.output.write_text(text)
    Console().print(text, markup=False)


if __name__ == "__main__":
    main()
