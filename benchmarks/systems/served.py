"""The served system, driven at the router: `python -m benchmarks.systems.served --checkpoint DIR --threads N`.

All parts run as `echoray serve` runs them; token ids go to the router's gRPC service, as the gateway sends them.
"""

import argparse
import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.systems.protocol import Run, now, parent_has_gone, serve_workloads
from benchmarks.timings import Timings
from benchmarks.workload import Workload
from echovlm_ray.config import Config, ControlSection, GatewaySection, ModelSection, RouterSection
from echovlm_ray.serving.cluster.endpoints import Endpoints
from echovlm_ray.serving.cluster.settings import ROUTER, deployment_of
from echovlm_ray.serving.deploy.app import serve_system
from experts.transport.inner_channel import InnerChannels
from protos import router_pb2, router_pb2_grpc

FIND_SECONDS = 30
TIMEOUT_SECONDS = 600


async def run_at_router(channels: InnerChannels, address: str, workload: Workload) -> Timings:
    """Opens all streams concurrently, and records when their tokens arrive."""
    async with channels.asynchronous(address) as channel:
        stub = router_pb2_grpc.RouterStub(channel)
        await channel.channel_ready()
        requests = [
            router_pb2.RouterGenerateRequest(
                input_ids=prompt,
                organ_hints=router_pb2.OrganHints(organs=[organ] if organ else []),
                max_new_tokens=workload.new_tokens,
                ignore_eos=True,
            )
            for prompt, organ in zip(workload.prompts, workload.organs, strict=True)
        ]
        began = now()
        streams = await asyncio.gather(*(_stream(stub, request, began) for request in requests))
    submitted, tokens = zip(*streams, strict=True)
    return Timings(workload.prompt_tokens, submitted, tokens)


async def _stream(
    stub: router_pb2_grpc.RouterStub, request: router_pb2.RouterGenerateRequest, began: float
) -> tuple[float, tuple[float, ...]]:
    submitted = now() - began
    times: list[float] = []
    async for message in stub.Generate(request, timeout=TIMEOUT_SECONDS):
        times.extend([now() - began] * len(message.token_ids))
    return submitted, tuple(times)


@contextmanager
def open_served(checkpoint: Path, threads: int, max_batch_size: int) -> Iterator[Run]:
    """The whole system, started and ready."""
    config = Config(
        model=ModelSection(checkpoint=checkpoint, torch_threads=threads),
        gateway=GatewaySection(port=0),
        control=ControlSection(port=0),
        router=RouterSection(max_batch_size=max_batch_size),
    )
    with serve_system(config, stopping=parent_has_gone) as system:
        endpoints = Endpoints({ROUTER: deployment_of(ROUTER)})
        endpoints.start()
        try:
            if not endpoints.wait_for([ROUTER], FIND_SECONDS):
                raise RuntimeError("the router's address is not known")
            (address,) = endpoints.of(ROUTER)
            yield lambda workload: asyncio.run(run_at_router(system.channels, address, workload))
        finally:
            endpoints.stop()


def main() -> None:
    """Runs workloads from the standard input."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True, help="the split folder")
    parser.add_argument("--threads", type=int, required=True, help="torch threads in every process")
    parser.add_argument("--max-batch-size", type=int, required=True, help="router.max_batch_size")
    options = parser.parse_args()
    serve_workloads(lambda: open_served(options.checkpoint, options.threads, options.max_batch_size))


if __name__ == "__main__":
    main()
