"""The checkpoints that the benchmarks measure, made once: `python -m benchmarks.checkpoints`.

Random weights from a seed, in the sizes of `benchmarks/configs/`: whole in the released layout for plain `generate`,
and split for the served system. They are cached in `checkpoints/bench/`, which git ignores.
"""

import argparse
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.tokenizer import stretched_tokenizer
from echovlm_ray.checkpoint.atomic import new_folder
from echovlm_ray.checkpoint.demo_tokenizer import write_text_files
from echovlm_ray.checkpoint.groups import Groups, clone_groups, partition_groups
from echovlm_ray.checkpoint.layout import ORGANS
from echovlm_ray.checkpoint.schema import ModelShape
from echovlm_ray.checkpoint.split import Labels, split
from echovlm_ray.checkpoint.writer import write_released
from router.gating.expert_set import Routing

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "benchmarks" / "configs"
FOLDER = ROOT / "checkpoints" / "bench"
NAMES = ("4_experts", "7_experts")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SEED = 20_250_915


@dataclass(frozen=True, slots=True)
class BenchCheckpoint:
    """One configuration in one dtype.

    Attributes:
        name: the configuration's, as in `config_<name>.json`.
        dtype: of all weights.
        config: its config.json.
        released: the folder in the released layout.
        split: the same weights as a split folder.
    """

    name: str
    dtype: str
    config: Mapping[str, Any]
    released: Path
    split: Path

    @property
    def organs(self) -> tuple[str, ...]:
        """The organs whose experts a request can be sent to: those of its set, or none where one gate spans all."""
        return ORGANS if _routing(self.config) == "organs" else ()

    @property
    def num_parameters(self) -> int:
        """Parameters of the whole model in the released layout."""
        shape = ModelShape.from_config(self.config)
        return sum(math.prod(sizes) for sizes in (shape.backbone_tensors() | shape.routed_tensors()).values())


def bench_checkpoint(
    name: str,
    dtype: str,
    *,
    configs: Path = CONFIGS,
    folder: Path = FOLDER,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> BenchCheckpoint:
    """Gives a checkpoint, and makes what of it is not there yet.

    Four experts, as the reference always has, become one copy for each of the seven organs; seven become a partition
    with one expert for each.

    Args:
        name: `config_<name>.json` is read.
        dtype: "float32" or "bfloat16"; the second is the first, rounded.
        configs: the folder of the configurations.
        folder: of the checkpoints.
        progress: called with the bytes written and all that there are to write.

    Raises:
        ValueError: no such configuration, or one of neither kind.
    """
    source = configs / f"config_{name}.json"
    if not source.is_file():
        raise ValueError(f"{source} does not exist: give the folder of the benchmark configurations with --configs")
    config = json.loads(source.read_text()) | {"torch_dtype": dtype}
    target = folder / f"{name}_{dtype}"
    made = BenchCheckpoint(name, dtype, config, target / "released", target / "split")
    # The split copies every tensor once: clones share their files.
    total = 2 * made.num_parameters * DTYPES[dtype].itemsize
    written = 0

    def advance(nbytes: int) -> None:
        nonlocal written
        written += nbytes
        progress(written, total)

    if not made.released.is_dir():
        with new_folder(made.released) as partial:
            _write_released(partial, config, DTYPES[dtype], advance)
    if not made.split.is_dir():
        written = total // 2
        split(
            made.released,
            made.split,
            groups=lambda num_experts: _groups(config, num_experts),
            routing=_routing(config),
            labels=Labels(
                name=f"echovlm-bench-{name.replace('_', '-')}",
                description="Random weights, to measure with. Not a medical device.",
                authors="EchoVLM-Ray",
                license="Apache-2.0",
                intended_use="Measuring the system. Its text means nothing. Not a medical device.",
            ),
            progress=advance,
        )
    return made


def _routing(config: Mapping[str, Any]) -> Routing:
    return "flat" if config["num_experts"] == len(ORGANS) else "organs"


def _groups(config: Mapping[str, Any], num_experts: int) -> Groups:
    if _routing(config) == "organs":
        return clone_groups(ORGANS, num_experts)
    return partition_groups({organ: [expert] for expert, organ in enumerate(ORGANS)}, num_experts)


def _write_released(
    directory: Path, config: Mapping[str, Any], dtype: torch.dtype, progress: Callable[[int], None]
) -> None:
    write_text_files(directory, stretched_tokenizer(config))
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    generation = {field: config[field] for field in ("bos_token_id", "eos_token_id", "pad_token_id")}
    (directory / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")
    shape = ModelShape.from_config(config)
    shapes = shape.backbone_tensors() | shape.routed_tensors()
    generator = torch.Generator().manual_seed(SEED)

    def make(name: str) -> torch.Tensor:
        return _random(name, shapes[name], generator).to(dtype)

    write_released(directory, {name: (dtype, shapes[name]) for name in sorted(shapes)}, make, progress=progress)


def _random(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Norms are ones, biases zeros, matrices keep the size of what passes through them; embeddings have unit size."""
    if name.endswith(".bias"):
        return torch.zeros(shape)
    if len(shape) == 1:
        return torch.ones(shape)
    fan_in = 1 if name == "model.embed_tokens.weight" else math.prod(shape[1:])
    return torch.randn(shape, generator=generator) / math.sqrt(fan_in)


def checkpoint_with_progress(name: str, dtype: str, configs: Path, folder: Path, console: Console) -> BenchCheckpoint:
    """`bench_checkpoint`, with a progress bar while something is made."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(f"making {name} {dtype}", total=None)
        return bench_checkpoint(
            name,
            dtype,
            configs=configs,
            folder=folder,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )


def add_options(parser: argparse.ArgumentParser) -> None:
    """The benchmarks' options for the source of checkpoints."""
    parser.add_argument(
        "--configs", type=Path, default=CONFIGS, help="folder of config_<name>.json (default: %(default)s)"
    )
    parser.add_argument(
        "--checkpoints", type=Path, default=FOLDER, help="where checkpoints are kept (default: %(default)s)"
    )


def main() -> None:
    """Makes all of them, and prints where they are."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_options(parser)
    parser.add_argument("--config", nargs="+", default=NAMES, help="which configurations (default: all)")
    parser.add_argument("--dtype", nargs="+", default=tuple(DTYPES), choices=DTYPES, help="which dtypes (default: all)")
    options = parser.parse_args()
    console = Console()
    for name in options.config:
        for dtype in options.dtype:
            made = checkpoint_with_progress(name, dtype, options.configs, options.checkpoints, console)
            console.print(f"{name} {dtype}: {made.num_parameters / 1e6:.0f} M parameters, {made.split}", markup=False)


if __name__ == "__main__":
    main()
