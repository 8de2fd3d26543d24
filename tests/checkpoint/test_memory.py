"""Splitting and merging hold one tensor at a time: at most twice the largest shard above what imports take."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from echovlm_ray.checkpoint.schema import ModelShape
from echovlm_ray.checkpoint.writer import write_released

SHARD_BYTES = 66_000_000
CONFIG = {
    "model_type": "qwen2_vl",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 1024,
    "shared_expert_intermediate_size": 1024,
    "vocab_size": 32000,
    "vision_config": {"depth": 1, "embed_dim": 128, "hidden_size": 1024, "num_heads": 4},
}

# Runs in a fresh process; prints by how many bytes its peak rose above what it was before the work.
MEASURE = """
import json, re, sys
from functools import partial
from pathlib import Path
import psutil, torch
from echovlm_ray.checkpoint.groups import clone_groups
from echovlm_ray.checkpoint.layout import ORGANS
from echovlm_ray.checkpoint.merge import merge
from echovlm_ray.checkpoint.split import Labels, split

def peak():
    status = Path("/proc/self/status")
    if status.exists():
        return int(re.search(r"VmHWM:\\s+(\\d+) kB", status.read_text()).group(1)) * 1024
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

def start():
    # Linux forgets the peak so far; elsewhere the peak of the imports counts as the start.
    if Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")
        return psutil.Process().memory_info().rss
    return peak()

command, source, destination, limit = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])
before = start()
if command == "split":
    split(source, destination, groups=partial(clone_groups, ORGANS), routing="organs", labels=Labels(name="big"),
          max_shard_bytes=limit)
elif command == "merge":
    merge(source, destination, max_shard_bytes=limit)
else:
    from safetensors.torch import load_file
    everything = [tensor.clone() for path in source.glob("*.safetensors") for tensor in load_file(path).values()]
print(peak() - before)
"""


@pytest.fixture(scope="module")
def big_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("big") / "released"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(CONFIG))
    shape = ModelShape.from_config(CONFIG)
    shapes = shape.backbone_tensors() | shape.routed_tensors()
    generator = torch.Generator().manual_seed(0)
    write_released(
        directory,
        {name: (torch.bfloat16, size) for name, size in shapes.items()},
        lambda name: torch.randint(-9, 9, shapes[name], generator=generator, dtype=torch.int8).to(torch.bfloat16),
        max_shard_bytes=SHARD_BYTES,
    )
    return directory


def measure(command: str, source: Path, destination: Path) -> int:
    arguments = [sys.executable, "-c", MEASURE, command, str(source), str(destination), str(SHARD_BYTES)]
    return int(subprocess.run(arguments, check=True, capture_output=True, text=True, timeout=200).stdout)


def test_peak_memory_is_at_most_twice_the_largest_shard(big_checkpoint: Path) -> None:
    sizes = [path.stat().st_size for path in big_checkpoint.glob("*.safetensors")]
    assert len(sizes) >= 5
    limit = 2 * max(sizes)
    folder = big_checkpoint.parent
    # The measurement sees memory where it is used: without this a broken one would pass.
    assert measure("load", big_checkpoint, folder / "none") > sum(sizes) * 0.9 > limit
    peaks = {
        "split": measure("split", big_checkpoint, folder / "split"),
        "merge": measure("merge", folder / "split", folder / "merged"),
    }
    assert all(peak <= limit for peak in peaks.values()), f"{peaks} bytes, limit {limit}"
    print(f"peak above imports: {peaks}, largest shard {max(sizes)}, checkpoint {sum(sizes)}")
