"""The gRPC server of every replica: `grpc.aio` with health, reflection, TLS, tokens, limits and orderly shutdown."""

import asyncio
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from echovlm_ray.config import TLSSection
from echovlm_ray.hosts import host_port
from echovlm_ray.serving.grpc.auth import BearerTokens
from echovlm_ray.serving.grpc.certificates import CertificateFiles
from echovlm_ray.serving.grpc.health_servicer import HealthServicer
from echovlm_ray.serving.grpc.incoming import SERVER_OPTIONS, Incoming
from echovlm_ray.serving.grpc.interceptor import Admit, CallInterceptor
from echovlm_ray.serving.grpc.open_calls import OpenCalls
from echovlm_ray.serving.grpc.received_bytes import ReceivedBytes
from echovlm_ray.serving.grpc.reflection import add_reflection
from echovlm_ray.serving.grpc.refusals import Refusals
from experts.transport.inner_channel import INNER_MESSAGE_BYTES, KEEPALIVE_MS

# The overhead of a message in addition to its payload.
MESSAGE_SLACK_BYTES = 1024 * 1024
# The largest length that gRPC takes as an option.
MAX_MESSAGE_BYTES = 2**31 - 1
# After the last call has ended, for its status to reach the caller.
LAST_WORDS_S = 0.2
# Calls that wait to be accepted. gRPC ends further ones CANCELLED without a message. Not more, because their headers,
# which need no token, take up to 1.3 MB each while they wait: gRPC bounds what 16 KB of them unpack to only for clients
# that confirm its settings.
MAX_PENDING_CALLS = 5000
# Of one connection; the client's gRPC queues further calls until others have ended.
MAX_CALLS_PER_CONNECTION = 1000
# The shortest interval of an idle client's keepalive pings; a client with more is disconnected.
MIN_PING_MS = 5_000

Register = Callable[[Any, grpc.aio.Server], None]


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """The address and the access control of a server.

    Attributes:
        host: an address of this machine.
        port: 0: the system chooses one.
        max_receive_bytes: a longer request is refused with `RESOURCE_EXHAUSTED`.
        max_received_bytes: of all requests in memory together; None for no limit.
        idle_s: a stream of requests that sends nothing for so long ends; None has it wait.
        call_limit_s: of a call that says no deadline, writing its answer included; None for no limit.
        connection_s: after so long clients are asked to connect again; None for never.
        connection_grace_s: what is still open of a connection after that and so long ends with it.
        caller_names: that the configuration knows, beside those of the token file.
    """

    host: str = "127.0.0.1"
    port: int = 0
    tls: TLSSection | None = None
    token_file: Path | None = None
    max_receive_bytes: int = INNER_MESSAGE_BYTES
    max_send_bytes: int = INNER_MESSAGE_BYTES
    max_received_bytes: int | None = None
    idle_s: float | None = None
    call_limit_s: float | None = None
    connection_s: float | None = None
    connection_grace_s: float = 3600.0
    caller_names: frozenset[str] = frozenset()


class GrpcServer:
    """A gRPC server. Add servicers, then `await start()`. For one event loop."""

    def __init__(self, options: ServerOptions, *, first: Sequence[grpc.aio.ServerInterceptor] = ()) -> None:
        """Reads certificates and tokens.

        Args:
            options: address and authentication.
            first: called around every call before anything else.

        Raises:
            ValueError: a certificate or token file cannot be used.
        """
        tokens = BearerTokens(options.token_file) if options.token_file else None
        self._options = options
        self.refusals = Refusals(
            lambda name: name in options.caller_names or (tokens is not None and name in tokens.names)
        )
        self._credentials = CertificateFiles(options.tls).credentials() if options.tls else None
        self._interceptor = CallInterceptor(
            tokens,
            _incoming(options),
            call_limit_s=options.call_limit_s,
            certificates=options.tls is not None and options.tls.client_authority is not None,
            open_calls=None if options.max_received_bytes is None else OpenCalls(),
            refusals=self.refusals,
        )
        self._server = grpc.aio.server(
            interceptors=[*first, self._interceptor],
            options=[
                ("grpc.max_receive_message_length", min(options.max_receive_bytes, MAX_MESSAGE_BYTES)),
                ("grpc.max_send_message_length", min(options.max_send_bytes, MAX_MESSAGE_BYTES)),
                # Replicas of one node share a fixed port; a port that the system chooses must be used by no other.
                ("grpc.so_reuseport", int(options.port != 0)),
                ("grpc.keepalive_time_ms", KEEPALIVE_MS),
                ("grpc.keepalive_permit_without_calls", 1),
                ("grpc.http2.min_ping_interval_without_data_ms", MIN_PING_MS),
                ("grpc.server.max_pending_requests", MAX_PENDING_CALLS),
                ("grpc.server.max_pending_requests_hard_limit", MAX_PENDING_CALLS),
                ("grpc.max_concurrent_streams", MAX_CALLS_PER_CONNECTION),
                *_connection_age(options),
                # It would count calls that have ended and are not freed yet, and reset new ones of a client that keeps
                # to the limit, without a word.
                ("grpc.http.overload_protection", 0),
                *SERVER_OPTIONS,
            ],
        )
        self.health = HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self.health, self._server)
        self._service_names = [health.SERVICE_NAME]
        self._port = 0

    @property
    def address(self) -> str:
        """host:port, once started."""
        return host_port(self._options.host, self._port)

    @property
    def active_calls(self) -> int:
        """Running calls, without watches, which never end."""
        return self._interceptor.active_calls

    def add(self, register: Register, servicer: object, service_name: str, admit: Admit | None = None) -> None:
        """Adds a servicer.

        Args:
            register: the generated `add_…Servicer_to_server`.
            servicer: what serves it.
            service_name: its full name, for reflection.
            admit: gives each of its calls a place before the message is read, or raises; None gives one to all.
        """
        if admit is not None:
            self._interceptor.limit(service_name, admit)
        register(servicer, self._server)
        self._service_names.append(service_name)

    async def start(self) -> None:
        """Listens.

        Raises:
            ValueError: the address cannot be listened on.
        """
        add_reflection(self._service_names, self._server)
        wanted = host_port(self._options.host, self._options.port)
        try:
            if self._credentials is None:
                self._port = self._server.add_insecure_port(wanted)
            else:
                self._port = self._server.add_secure_port(wanted, self._credentials)
        except RuntimeError:
            self._port = 0
        if not self._port:
            raise ValueError(f"cannot listen on {wanted}: the port is taken or the address is not of this machine")
        await self._server.start()

    async def set_health(self, service: str, serving: bool) -> None:
        """Publishes one service's state to Check and Watch."""
        status = health_pb2.HealthCheckResponse
        await self.health.set(service, status.SERVING if serving else status.NOT_SERVING)

    async def stop(self, grace_s: float, pending: Iterable[Callable[[], bool]] = ()) -> None:
        """Shuts down in order: health becomes NOT_SERVING, new calls are refused as UNAVAILABLE, running calls finish.

        Args:
            grace_s: what still runs after this many seconds is cancelled.
            pending: each tells whether work is under way that the count of calls does not show, such as exchanges in
                a stream that stays open.
        """
        deadline = asyncio.get_running_loop().time() + grace_s
        await self.health.enter_graceful_shutdown()
        self._interceptor.refuse_new_calls()
        try:
            async with asyncio.timeout_at(deadline):
                await self._interceptor.wait_until_idle()
                while any(is_pending() for is_pending in pending):
                    await asyncio.sleep(0.02)
        except TimeoutError:
            pass
        await self._server.stop(LAST_WORDS_S)


def _connection_age(options: ServerOptions) -> list[tuple[str, int]]:
    """A call whose answer is not read stays in memory for as long as its connection does."""
    if options.connection_s is None:
        return []
    return [
        ("grpc.max_connection_age_ms", round(options.connection_s * 1000)),
        ("grpc.max_connection_age_grace_ms", round(options.connection_grace_s * 1000)),
    ]


def _incoming(options: ServerOptions) -> Incoming:
    received = None
    if options.max_received_bytes is not None:
        received = ReceivedBytes(options.max_receive_bytes, options.max_received_bytes)
    return Incoming(options.max_receive_bytes, received, options.idle_s)
