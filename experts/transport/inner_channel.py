"""The one way in which the parts of a system connect to each other.

Every channel between the parts is opened here, so that all of them carry the system's secret, pass by a proxy that the
environment names, notice a peer that is gone, and come back at once to one that was replaced. TLS between machines has
its place here too: `InnerChannels.credentials`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import grpc

from experts.transport.secret import NO_SECRET, SystemSecret

# Between the parts: the patches of a whole prompt of images in float32, or the logits that a test asks for.
INNER_MESSAGE_BYTES = 256 * 1024 * 1024
KEEPALIVE_MS = 20_000

Option = tuple[str, int | str]

INNER_OPTIONS: tuple[Option, ...] = (
    ("grpc.max_receive_message_length", INNER_MESSAGE_BYTES),
    ("grpc.max_send_message_length", INNER_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", KEEPALIVE_MS),
    # A replica that was killed and came back must be reached at once, not after gRPC's usual two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    # A proxy that the environment names is for the world outside, and cannot reach another machine's loopback.
    ("grpc.enable_http_proxy", 0),
)


@dataclass(frozen=True, slots=True)
class InnerChannels:
    """Opens channels to other parts of the same system.

    Attributes:
        secret: what every call carries.
        credentials: TLS of the channels; None for none.
    """

    secret: SystemSecret = NO_SECRET
    credentials: grpc.ChannelCredentials | None = None

    def asynchronous(self, address: str, *further: Option) -> Any:
        """A `grpc.aio` channel.

        Args:
            address: host:port, an IPv6 literal in brackets, or one of gRPC's own kinds, such as unix:PATH.
            further: options beside `INNER_OPTIONS`; they win over those.
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


# For parts in one process or behind a folder of this user's, where no secret is.
PLAIN_CHANNELS = InnerChannels()


def _options(further: Sequence[Option]) -> list[Option]:
    return list({**dict(INNER_OPTIONS), **dict(further)}.items())


class _ChannelWithMetadata:
    """A channel whose calls all carry some metadata.

    gRPC's own interceptors would do the same with a task and a queue for each call.
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
    """One method of such a channel, to be called in gRPC's ways."""

    def __init__(self, wrapped: Any, metadata: tuple[tuple[str, str], ...]) -> None:
        self._wrapped = wrapped
        self._metadata = metadata

    def __call__(self, *args: Any, metadata: Sequence[tuple[str, str]] | None = None, **kwargs: Any) -> Any:
        return self._wrapped(*args, metadata=(*(metadata or ()), *self._metadata), **kwargs)

    def future(self, *args: Any, metadata: Sequence[tuple[str, str]] | None = None, **kwargs: Any) -> Any:
        return self._wrapped.future(*args, metadata=(*(metadata or ()), *self._metadata), **kwargs)
