"""Opens the channels between the parts of a system.

Every channel between the parts is opened here, so that all of them send the system's secret, ignore HTTP proxies of the
environment, detect a dead peer, and reconnect quickly to a replaced one. `InnerChannels.credentials` is for TLS between
machines.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import grpc

from experts.transport.secret import NO_SECRET, SystemSecret

# The largest messages: the patches of a prompt with many images in float32, and logits for tests.
INNER_MESSAGE_BYTES = 256 * 1024 * 1024
KEEPALIVE_MS = 20_000

Option = tuple[str, int | str]

INNER_OPTIONS: tuple[Option, ...] = (
    ("grpc.max_receive_message_length", INNER_MESSAGE_BYTES),
    ("grpc.max_send_message_length", INNER_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", KEEPALIVE_MS),
    # A replaced replica must be reached immediately, not after gRPC's default of two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    # A proxy of the environment is for external hosts, and cannot reach another machine's loopback.
    ("grpc.enable_http_proxy", 0),
)


@dataclass(frozen=True, slots=True)
class InnerChannels:
    """Opens channels to other parts of the same system.

    Attributes:
        secret: sent with every call.
        credentials: TLS credentials of the channels, or None.
    """

    secret: SystemSecret = NO_SECRET
    credentials: grpc.ChannelCredentials | None = None

    def asynchronous(self, address: str, *further: Option) -> Any:
        """A `grpc.aio` channel.

        Args:
            address: host:port with IPv6 literals in brackets, or another of gRPC's schemes, such as unix:PATH.
            further: options that take precedence over `INNER_OPTIONS`.
        """
        return self._open(grpc.aio.insecure_channel, grpc.aio.secure_channel, address, further)

    def blocking(self, address: str, *further: Option) -> Any:
        """A `grpc` channel; see `asynchronous`."""
        return self._open(grpc.insecure_channel, grpc.secure_channel, address, further)

    def _open(
        self, insecure: Callable[..., Any], secure: Callable[..., Any], address: str, further: Sequence[Option]
    ) -> Any:
        options = _options(further)
        if self.credentials is None:
            channel = insecure(address, options=options)
        else:
            channel = secure(address, self.credentials, options=options)
        return _ChannelWithMetadata(channel, self.secret.metadata) if self.secret.text else channel


# For parts in one process or behind a private folder, without a secret.
PLAIN_CHANNELS = InnerChannels()


def _options(further: Sequence[Option]) -> list[Option]:
    return list({**dict(INNER_OPTIONS), **dict(further)}.items())


class _ChannelWithMetadata:
    """A channel that adds metadata to every call.

    gRPC's interceptors would need a task and a queue for each call.
    """

    def __init__(self, wrapped: Any, metadata: tuple[tuple[str, str], ...]) -> None:
        self._wrapped = wrapped
        self._metadata = metadata

    def unary_unary(self, *args: Any, **kwargs: Any) -> "_CallWithMetadata":
        return _CallWithMetadata(self._wrapped.unary_unary(*args, **kwargs), self._metadata)

    def unary_stream(self, *args: Any, **kwargs: Any) -> "_CallWithMetadata":
        return _CallWithMetadata(self._wrapped.unary_stream(*args, **kwargs), self._metadata)

    def stream_unary(self, *args: Any, **kwargs: Any) -> "_CallWithMetadata":
        return _CallWithMetadata(self._wrapped.stream_unary(*args, **kwargs), self._metadata)

    def stream_stream(self, *args: Any, **kwargs: Any) -> "_CallWithMetadata":
        return _CallWithMetadata(self._wrapped.stream_stream(*args, **kwargs), self._metadata)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wrapped, name)

    def __enter__(self) -> Self:
        self._wrapped.__enter__()
        return self

    def __exit__(self, *exception: object) -> Any:
        return self._wrapped.__exit__(*exception)

    async def __aenter__(self) -> Self:
        await self._wrapped.__aenter__()
        return self

    async def __aexit__(self, *exception: object) -> Any:
        return await self._wrapped.__aexit__(*exception)


class _CallWithMetadata:
    """One method of such a channel, with gRPC's interface."""

    def __init__(self, wrapped: Any, metadata: tuple[tuple[str, str], ...]) -> None:
        self._wrapped = wrapped
        self._metadata = metadata

    def __call__(self, *args: Any, metadata: Sequence[tuple[str, str]] | None = None, **kwargs: Any) -> Any:
        return self._wrapped(*args, metadata=(*(metadata or ()), *self._metadata), **kwargs)

    def future(self, *args: Any, metadata: Sequence[tuple[str, str]] | None = None, **kwargs: Any) -> Any:
        return self._wrapped.future(*args, metadata=(*(metadata or ()), *self._metadata), **kwargs)
