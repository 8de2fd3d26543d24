"""The server that `benchmarks.call_costs` calls: `python -m benchmarks.call_costs_peers bare|ours TOKEN_FILE`."""

import argparse
import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import grpc

from echovlm_ray.config import GatewaySection, RouterSection
from echovlm_ray.serving.grpc.gateway import server_options
from echovlm_ray.serving.grpc.server import GrpcServer
from protos import echovlm_pb2, echovlm_pb2_grpc

TOKEN = "a-token-of-the-benchmark"
ANSWER = "x" * 100


class Answers(echovlm_pb2_grpc.EchoVLMServicer):
    """Answers immediately."""

    async def Generate(
        self, request: echovlm_pb2.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> echovlm_pb2.GenerateResponse:
        """A short text."""
        return echovlm_pb2.GenerateResponse(text=ANSWER)

    async def GenerateStream(
        self, request: echovlm_pb2.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[echovlm_pb2.GenerateEvent]:
        """The requested number of words."""
        for _ in range(request.max_new_tokens):
            yield echovlm_pb2.GenerateEvent(text="word")


async def serve_bare() -> None:
    """What gRPC itself costs; prints its address."""
    server = grpc.aio.server()
    echovlm_pb2_grpc.add_EchoVLMServicer_to_server(Answers(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(f"127.0.0.1:{port}", flush=True)
    await server.wait_for_termination()


async def serve_ours(token_file: Path) -> None:
    """A server with the options of a gateway that has a token file; prints its address."""
    server = GrpcServer(server_options(GatewaySection(port=0, token_file=token_file), RouterSection()))
    server.add(echovlm_pb2_grpc.add_EchoVLMServicer_to_server, Answers(), "echovlm.v1.EchoVLM")
    await server.start()
    print(server.address, flush=True)
    await asyncio.Event().wait()


def main() -> None:
    """Serves until it is killed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=("bare", "ours"))
    parser.add_argument("token_file", type=Path)
    options = parser.parse_args()
    asyncio.run(serve_bare() if options.kind == "bare" else serve_ours(options.token_file))


if __name__ == "__main__":
    main()
