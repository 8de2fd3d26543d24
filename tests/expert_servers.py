"""Real expert groups behind real gRPC servers, in a thread or in a process of their own that can be killed."""

import asyncio
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from echovlm_ray.serving.grpc.errors import to_status
from echovlm_ray.serving.grpc.interceptor import CallInterceptor
from experts.group import ExpertGroup
from experts.kernels.registry import get_kernel
from experts.registry.registry import Registry
from experts.service import ExpertGroupService, add_expert_group_to_server

ROOT = Path(__file__).resolve().parent.parent


def expert_group(organ: str, registry: Path, digests: Sequence[str], kernel: str = "reference") -> ExpertGroup:
    """A group that has loaded its bundles."""
    group = ExpertGroup(organ, Registry(registry), get_kernel(kernel), device="cpu", max_resident_bytes=1024**3)
    for digest in digests:
        group.load(digest)
    return group


async def _start(group: ExpertGroup) -> tuple[grpc.aio.Server, ExpertGroupService, str]:
    server = grpc.aio.server(interceptors=[CallInterceptor()])
    service = ExpertGroupService(group, to_status=to_status, max_queue=64)
    add_expert_group_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    return server, service, f"127.0.0.1:{port}"


@dataclass
class ServerThread:
    """Servers of several organs on one event loop; `addresses` is what a router is given."""

    loop: asyncio.AbstractEventLoop
    live: dict[str, list[str]] = field(default_factory=dict)
    servers: dict[str, grpc.aio.Server] = field(default_factory=dict)
    services: dict[str, ExpertGroupService] = field(default_factory=dict)
    groups: dict[str, list[ExpertGroup]] = field(default_factory=dict)

    def addresses(self, organ: str) -> list[str]:
        return list(self.live.get(organ, ()))

    def serve(self, group: ExpertGroup) -> str:
        server, service, address = asyncio.run_coroutine_threadsafe(_start(group), self.loop).result(10)
        self.servers[address], self.services[address] = server, service
        self.live.setdefault(group.organ, []).append(address)
        self.groups.setdefault(group.organ, []).append(group)
        return address

    def stop(self, address: str) -> None:
        """Ends a server at once; its address stays known, as it does for a moment in the served system."""
        self.services.pop(address).close()
        asyncio.run_coroutine_threadsafe(self.servers.pop(address).stop(None), self.loop).result(10)

    def forget(self, address: str) -> None:
        """The address is no longer given out."""
        for addresses in self.live.values():
            if address in addresses:
                addresses.remove(address)


@contextmanager
def server_thread() -> Iterator[ServerThread]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    running = ServerThread(loop)
    try:
        yield running
    finally:
        for address in list(running.servers):
            running.stop(address)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()


@dataclass(frozen=True)
class ExpertProcess:
    """An expert group in a separate process."""

    process: subprocess.Popen[str]
    address: str


@contextmanager
def expert_process(organ: str, registry: Path, digest: str) -> Iterator[ExpertProcess]:
    command = [sys.executable, "-m", "tests.expert_servers", organ, str(registry), digest]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        try:
            assert process.stdout is not None
            address = process.stdout.readline().strip()
            assert address, f"the expert process ended with {process.wait()}"
            yield ExpertProcess(process, address)
        finally:
            process.kill()


async def _main(organ: str, registry: str, digest: str) -> None:
    server, _, address = await _start(expert_group(organ, Path(registry), [digest]))
    print(address, flush=True)
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(_main(*sys.argv[1:]))
