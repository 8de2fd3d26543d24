"""One expert group as it is served, without Ray: `python -m benchmarks.lifecycle_group REGISTRY ORGAN MAX_BYTES`.

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

from echovlm_ray.config import ExpertsSection
from echovlm_ray.serving.errors import to_status
from echovlm_ray.serving.server import GrpcServer, ServerOptions
from experts.group import ExpertGroup
from experts.kernels.registry import get_kernel
from experts.registry import Registry
from experts.service import ExpertGroupService, add_expert_group_to_server
from protos import expert_pb2

SERVICE_NAME = expert_pb2.DESCRIPTOR.services_by_name["ExpertGroup"].full_name


async def _serve(registry: Path, organ: str, max_resident_bytes: int, answers: IO[str]) -> None:
    section = ExpertsSection()
    group = ExpertGroup(
        organ,
        Registry(registry),
        get_kernel(section.kernel),
        device="cpu",
        max_resident_bytes=max_resident_bytes,
    )
    service = ExpertGroupService(group, to_status=to_status, max_queue=section.max_queue)
    server = GrpcServer(ServerOptions())
    server.add(add_expert_group_to_server, service, SERVICE_NAME)
    await server.start()
    answers.write(json.dumps({"address": server.address, "pid": os.getpid()}) + "\n")
    await asyncio.to_thread(sys.stdin.read)
    await server.stop(0)
    service.close()


def main() -> None:
    """Serves until the standard input is closed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("registry", type=Path, help="where bundles are")
    parser.add_argument("organ", help="whose experts")
    parser.add_argument("max_resident_bytes", type=int, help="of all versions together")
    options = parser.parse_args()
    faulthandler.register(signal.SIGUSR1)
    # As `environment_of` says.
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    # Whatever a library prints is no answer.
    os.dup2(2, 1)
    asyncio.run(_serve(options.registry, options.organ, options.max_resident_bytes, answers))


if __name__ == "__main__":
    main()
