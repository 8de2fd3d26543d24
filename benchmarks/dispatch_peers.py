"""The other process of `benchmarks.dispatch`: `python -m benchmarks.dispatch_peers experts|stream|eventfd …`."""

import argparse
import asyncio
import mmap
import os
import tempfile
from pathlib import Path

import grpc
import torch

from echovlm_ray.serving.grpc.errors import to_status
from experts.bundles.layout import expected_tensors
from experts.bundles.manifest import BundleDescription
from experts.bundles.writer import write_bundle
from experts.group import ExpertGroup
from experts.kernels.base import ExpertWeights
from experts.registry.registry import Registry
from experts.service import ExpertGroupService, add_expert_group_to_server

ORGAN = "liver"
HIDDEN_SIZE = 1024
STREAM_METHOD = "/benchmarks.Echo/Forward"
_OPTIONS = (("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1))


class EchoExperts:
    """Experts that give back what they get."""

    nbytes = 1

    def forward(self, x_TD: torch.Tensor, expert_index_TK: torch.Tensor, weight_TK: torch.Tensor) -> torch.Tensor:
        """The tokens themselves."""
        return x_TD


class EchoKernel:
    """A kernel that costs nothing, so that only the way there and back is measured."""

    name = "echo"

    def load(self, weights: ExpertWeights) -> EchoExperts:
        """Needs no weights."""
        return EchoExperts()


def pin(core: int | None) -> None:
    """Keeps this process on one core; None leaves it to the system."""
    if core is not None:
        os.sched_setaffinity(0, {core})


async def serve_experts() -> None:
    """An expert group as the system runs it, with the echo kernel; prints its address and its bundle's digest."""
    description = BundleDescription(
        name="echo",
        organ=ORGAN,
        version="1.0.0",
        description="for a benchmark",
        authors="the benchmarks",
        license="Apache-2.0",
        intended_use="measuring",
        backbone_digest="b" * 64,
        num_layers=1,
        num_experts=4,
        hidden_size=HIDDEN_SIZE,
        intermediate_size=1,
        dtype="float32",
    )
    tensors = {name: torch.zeros(shape, dtype=dtype) for name, (dtype, shape) in expected_tensors(description).items()}
    with tempfile.TemporaryDirectory() as folder:
        write_bundle(Path(folder) / "bundle", description, tensors.__getitem__)
        registry = Registry(Path(folder) / "registry")
        digest = registry.push(Path(folder) / "bundle").digest
        group = ExpertGroup(ORGAN, registry, EchoKernel(), device="cpu", max_resident_bytes=1024**3)
        group.load(digest)
    service = ExpertGroupService(group, to_status=to_status, max_queue=64)
    server = grpc.aio.server(options=_OPTIONS)
    add_expert_group_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(f"127.0.0.1:{port}", digest, flush=True)
    await server.wait_for_termination()


async def serve_stream() -> None:
    """Plain gRPC: a bidirectional stream that echoes raw bytes; prints its address."""

    async def echo(messages: object, context: "grpc.aio.ServicerContext[bytes, bytes]") -> None:
        while (message := await context.read()) is not grpc.aio.EOF:
            await context.write(message)

    service, _, method = STREAM_METHOD[1:].partition("/")
    server = grpc.aio.server(options=_OPTIONS)
    handlers = {method: grpc.stream_stream_rpc_method_handler(echo)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(f"127.0.0.1:{port}", flush=True)
    await server.wait_for_termination()


def serve_eventfd(memory: int, size: int, ask: int, answer: int) -> None:
    """Two processes that block: copies what was asked to where the answer belongs, as soon as it is woken."""
    octets = torch.frombuffer(mmap.mmap(memory, 2 * size), dtype=torch.uint8)
    print("ready", flush=True)
    while nbytes := os.eventfd_read(ask) - 1:
        octets[size : size + nbytes].copy_(octets[:nbytes])
        os.eventfd_write(answer, 1)


def main() -> None:
    """Runs one of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=["experts", "stream", "eventfd"])
    parser.add_argument("--core", type=int, help="the core to stay on")
    parser.add_argument("--descriptors", type=int, nargs=3, help="eventfd: memory, ask, answer")
    parser.add_argument("--size", type=int, help="eventfd: bytes there, and bytes back")
    options = parser.parse_args()
    torch.set_num_threads(1)
    pin(options.core)
    if options.kind == "experts":
        asyncio.run(serve_experts())
    elif options.kind == "stream":
        asyncio.run(serve_stream())
    else:
        memory, ask, answer = options.descriptors
        serve_eventfd(memory, options.size, ask, answer)


if __name__ == "__main__":
    main()
