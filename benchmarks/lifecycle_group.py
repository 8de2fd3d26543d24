"""One served expert group, without Ray: `python -m benchmarks.lifecycle_group REGISTRY ORGAN MAX_BYTES`.

Starts empty. Prints its address and process id as JSON, and ends when its standard input is closed. SIGUSR1 has it
write where every thread stands to its standard error.
"""

import argparse
import asyncio
import faulthandler
import json
import os
import signal
import sys
from pathlib import Path
from typing import IO

import torch

from benchmarks.served_group import served_group
from benchmarks.systems.protocol import answers_only
from echovlm_ray.config import ExpertsSection
from experts.group import ExpertGroup
from experts.kernels.registry import get_kernel
from experts.registry.registry import Registry


async def _serve(registry: Path, organ: str, max_resident_bytes: int, answers: IO[str]) -> None:
    group = ExpertGroup(
        organ,
        Registry(registry),
        get_kernel(ExpertsSection().kernel),
        device="cpu",
        max_resident_bytes=max_resident_bytes,
    )
    async with served_group(group) as address:
        answers.write(json.dumps({"address": address, "pid": os.getpid()}) + "\n")
        await asyncio.to_thread(sys.stdin.read)


def main() -> None:
    """Serves until the standard input is closed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("registry", type=Path, help="where bundles are")
    parser.add_argument("organ", help="whose experts")
    parser.add_argument("max_resident_bytes", type=int, help="of all versions together")
    options = parser.parse_args()
    faulthandler.register(signal.SIGUSR1)
    # See `environment_of`.
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    asyncio.run(_serve(options.registry, options.organ, options.max_resident_bytes, answers_only()))


if __name__ == "__main__":
    main()
