"""The base of all deployments: servers that start and stop in order, and what Serve calls.

The modules of this package import nothing heavy when they are loaded, only when a replica starts: Ray Serve loads them
in a process of its own for every application that it builds, and an expert group must not pay for another part's
libraries.
"""

import ctypes
import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from echovlm_ray.serving.cluster.endpoints import ADDRESS_KEY, PUBLIC_ADDRESS_KEY, REPLICA_KEY
from echovlm_ray.serving.cluster.metrics import PartMetrics, RefusalMetrics
from echovlm_ray.serving.cluster.replica_status import SERVICE_NAME, ReplicaIdentity, ReplicaStatusService
from echovlm_ray.serving.cluster.settings import (
    ExpertGroupSettings,
    Network,
    ReplicaSettings,
    RouterSettings,
)
from echovlm_ray.serving.cluster.system_secret import secret_of
from echovlm_ray.serving.grpc.inner_server import inner_server
from echovlm_ray.serving.grpc.interceptor import Admit
from echovlm_ray.serving.grpc.server import GrpcServer, Register, ServerOptions
from experts.transport.inner_channel import InnerChannels
from protos import expert_pb2, status_pb2_grpc

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

# What is left of Serve's own time limit when our calls have had theirs.
STOP_RESERVE_S = 2.0


@dataclass(frozen=True, slots=True)
class Service:
    """A servicer, the generated function that adds it to a server, its full name, and what gives its calls a place."""

    register: Register
    servicer: object
    name: str
    admit: Admit | None = None


def _nothing_pending() -> bool:
    return False


def _no_problem() -> str:
    return ""


def _nothing_to_measure() -> None:
    return


@dataclass(frozen=True, slots=True)
class Part:
    """What a replica serves to the other parts, and how it describes itself.

    Attributes:
        queue_length: requests waiting or under way.
        arithmetic: see `arithmetic_of`.
        healthy: false makes Serve replace the replica.
        work_done: grows with everything the part does; when it rests, free memory goes back to the system.
        pending: whether work is under way that no open call shows, which a stopping replica waits for.
        problem: why the part cannot do all of its work, for operators; "" if it can.
        measure: brings metrics of the part's own up to date; called with every health check.
    """

    services: Sequence[Service]
    queue_length: Callable[[], int]
    device: str = "cpu"
    organ: str = ""
    arithmetic: str = ""
    bundles: Callable[[], Sequence[expert_pb2.ResidentBundle]] = tuple
    healthy: Callable[[], bool] = lambda: True
    work_done: Callable[[], int] = lambda: 0
    pending: Callable[[], bool] = _nothing_pending
    problem: Callable[[], str] = _no_problem
    measure: Callable[[], None] = _nothing_to_measure
    # Called after the servers have stopped, first to last.
    closing: Sequence[Callable[[], object]] = field(default=())


class Replica:
    """Base of the deployment classes. A subclass builds its part in `async __init__` and calls `_start`."""

    _channels: InnerChannels | None = None
    _internal: GrpcServer | None = None
    _public: GrpcServer | None = None
    _part: Part | None = None
    _replica_id: str = ""
    _metrics: PartMetrics | None = None
    _refusal_metrics: RefusalMetrics | None = None
    _grace_s: float = 0.0
    _seen_work: int = 0
    _rested_after: int = 0

    def _channels_of(self, settings: ReplicaSettings) -> InnerChannels:
        """How this replica connects to the other parts of its system."""
        if self._channels is None:
            self._channels = InnerChannels(secret_of(settings.system_id))
        return self._channels

    async def _start(
        self,
        settings: ReplicaSettings,
        part: Part,
        public: ServerOptions | None = None,
        public_services: Sequence[Service] = (),
    ) -> None:
        """Serves the part to the other parts on a port of its own, and to clients on the public one if there is one."""
        _return_free_memory()
        self._part = part
        self._grace_s = max(0.0, settings.serve.graceful_shutdown_timeout_s - STOP_RESERVE_S)
        if public is not None:
            self._public = GrpcServer(public)
            for service in public_services:
                self._public.add(service.register, service.servicer, service.name, service.admit)
            await self._public.start()
            self._refusal_metrics = RefusalMetrics()
        self._internal = inner_server(_host(settings.network), self._channels_of(settings).secret)
        for service in part.services:
            self._internal.add(service.register, service.servicer, service.name)
        identity = _identity(part, settings)
        self._replica_id = identity.replica_id
        self._metrics = PartMetrics("experts" if part.organ else identity.application, part.organ)
        status = ReplicaStatusService(
            identity, self._endpoint, part.queue_length, part.bundles, part.problem, self._refusals
        )
        self._internal.add(status_pb2_grpc.add_ReplicaStatusServicer_to_server, status, SERVICE_NAME)
        await self._internal.start()

    def record_replica_metadata(self) -> dict[str, str]:
        """Asked by Ray Serve once the replica has started; `serving.endpoints` reads it elsewhere."""
        assert self._internal is not None
        metadata = {ADDRESS_KEY: self._internal.address, REPLICA_KEY: self._replica_id}
        if self._public is not None:
            metadata[PUBLIC_ADDRESS_KEY] = self._public.address
        return metadata

    def check_health(self) -> None:
        """Asked by Ray Serve every `serve.health_check_period_s`; raising makes it replace the replica."""
        if self._part is not None and not self._part.healthy():
            raise RuntimeError("the part has stopped working")
        if self._part is not None:
            self._rest(self._part.work_done())
            self._measure(self._part)

    def _measure(self, part: Part) -> None:
        if self._metrics is None:
            return
        try:
            self._metrics.update(part.queue_length(), part.bundles())
            if self._refusal_metrics is not None:
                self._refusal_metrics.update(self._refusals())
            part.measure()
        except Exception:
            # No request needs them.
            logger.exception("the replica's metrics could not be brought up to date")

    def _rest(self, work_done: int) -> None:
        if work_done == self._seen_work and work_done != self._rested_after:
            self._rested_after = work_done
            _return_free_memory()
        self._seen_work = work_done

    async def __del__(self) -> None:
        """Called by Ray Serve before the process ends: calls under way finish, within the grace time."""
        if self._public is not None:
            await self._public.stop(self._grace_s)
        if self._internal is not None and self._part is not None:
            await self._internal.stop(self._grace_s, [self._part.pending])
        if self._part is not None:
            for close in self._part.closing:
                closed = close()
                if inspect.isawaitable(closed):
                    await closed

    async def publish_health(self, service: str, serving: bool) -> None:
        """Has the replica's servers say so of a service."""
        for server in (self._public, self._internal):
            if server is not None:
                await server.set_health(service, serving)

    def _refusals(self) -> Mapping[tuple[str, str], int]:
        return {} if self._public is None else self._public.refusals.counts

    def _endpoint(self) -> str:
        server = self._public or self._internal
        assert server is not None
        return server.address


def device_of(settings: ReplicaSettings) -> "torch.device":
    """Where a replica computes.

    Raises:
        ValueError: it has a share of a GPU, or should use one, and torch sees none.
    """
    import torch

    wanted = settings.model.device
    if wanted == "cpu" or (wanted == "auto" and not settings.resources.num_gpus):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError(
            f'model.device is "{wanted}" and this part has num_gpus {settings.resources.num_gpus}, but torch '
            f'{torch.__version__} sees no GPU here: install a CUDA build of torch, or set model.device to "cpu"'
        )
    return torch.device("cuda:0")


def dtype_of(settings: ReplicaSettings) -> "torch.dtype | None":
    """What weights are converted to when they are loaded; None leaves them as they are."""
    import torch

    return {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16}[settings.model.dtype]


def arithmetic_of(dtype: "torch.dtype", device: "torch.device") -> str:
    """What multiplies packed weights on the CPU, and why not the C library, for status; "" on a GPU."""
    from experts.kernels.packed_linear import describe_products

    return describe_products(dtype) if device.type == "cpu" else ""


def environment_of(settings: ReplicaSettings) -> dict[str, str]:
    """The environment variables of a replica's process."""
    environment = {
        # One loop for Serve and for us: takes a fifth off a round trip.
        "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
        # Of Serve's own gRPC port, which listens on all addresses, receives a message before it asks for Ray's token,
        # and is used by nothing here.
        "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": "4096",
        # Large tensors come and go with every request; giving their memory back each time costs more than they do.
        "MALLOC_TRIM_THRESHOLD_": str(256 * 1024 * 1024),
        "MALLOC_MMAP_THRESHOLD_": str(256 * 1024 * 1024),
        "OMP_NUM_THREADS": str(settings.model.torch_threads),
    }
    if isinstance(settings, ExpertGroupSettings):
        # There are many of these processes, with few threads each: one heap for all threads wastes least. A router's
        # memory and tokens/s are the same with one heap, two, four, or as many as malloc likes.
        environment["MALLOC_ARENA_MAX"] = "1"
    if not settings.serve.grpc_event_engine:
        environment["GRPC_EXPERIMENTS"] = "-event_engine_client,-event_engine_listener"
        if isinstance(settings, ExpertGroupSettings | RouterSettings):
            # Every thread that waits looks at its own sockets. gRPC's default has one look at all and wake the others,
            # which suits servers with many connections and makes a dispatch to an expert group a quarter slower.
            environment["GRPC_POLL_STRATEGY"] = "poll"
    return environment


def _return_free_memory() -> None:
    # What loading or a burst of work left behind: with the thresholds above, malloc would keep it for good.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _host(network: Network) -> str:
    if network == "loopback":
        return "127.0.0.1"
    import ray.util

    return str(ray.util.get_node_ip_address())


def _identity(part: Part, settings: ReplicaSettings) -> ReplicaIdentity:
    from ray import serve

    context = serve.get_replica_context()
    return ReplicaIdentity(
        application=settings.system_id.part(context.app_name) or context.app_name,
        deployment=context.deployment,
        replica_id=context.replica_id.unique_id,
        device=part.device,
        organ=part.organ,
        arithmetic=part.arithmetic,
    )
