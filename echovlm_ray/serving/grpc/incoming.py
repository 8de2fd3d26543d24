"""Receives a message within limits, and decompresses and parses it after the call's credentials were checked.

gRPC would receive, decompress and parse a message before our code runs.
"""

import asyncio
import zlib
from collections.abc import AsyncIterator, Callable
from contextlib import nullcontext
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from echovlm_ray.errors import DeadlineError, InvalidRequestError, MessageTooLargeError
from echovlm_ray.serving.grpc.received_bytes import ReceivedBytes
from echovlm_ray.serving.grpc.sender import sender_of
from experts.transport.fields import next_field

# How gzip begins (RFC 1952, 2.3.1). No protobuf message begins so: it would be a field of wire type 7.
GZIP_MAGIC = b"\x1f\x8b"
# Messages up to so many bytes are inflated and parsed as they are; longer ones elsewhere, and looked over before.
SMALL_BYTES = 64 * 1024
# An empty field takes two bytes on the wire and fifty in memory. No message of ours has nearly as many.
MAX_FIELDS = 20_000
# Identity and gzip, in gRPC's numbering of the bits; the server leaves inflating to `Incoming`.
SERVER_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.compression_enabled_algorithms_bitset", 0b101),
    ("grpc.per_message_decompression", 0),
)

Parse = Callable[[bytes], Any]


class Incoming:
    """Takes in the messages of one server's calls."""

    def __init__(self, max_bytes: int, received: ReceivedBytes | None = None, idle_s: float | None = None) -> None:
        """
        Args:
            max_bytes: of one message, inflated.
            received: bounds the bytes of all calls; None for callers that are parts of the system.
            idle_s: a stream of requests that sends nothing for so long ends; None has it wait.
        """
        self._max_bytes = max_bytes
        self._received = received
        self._idle_s = idle_s

    async def one(self, context: "grpc.aio.ServicerContext[Any, Any]", parse: Parse, *, is_check: bool = False) -> Any:
        """The message of a call that has one.

        Args:
            context: of the call.
            parse: makes the message of its bytes.
            is_check: whether it is a health check, which may carry no credentials.

        Raises:
            InvalidRequestError: there was none, or it has the wrong type.
            MessageTooLargeError: it is longer than a message may be.
            OverloadedError: there is no memory for it.
        """
        if self._received is None:
            raw = await context.read()
        else:
            async with self._received.arrivals(of_checks=is_check).place(sender_of(context)):
                raw = await context.read()
        if not isinstance(raw, bytes):
            raise InvalidRequestError("request", "did not come: the call ended without a message")
        raw = await self._inflated(raw)
        if self._received is not None:
            self._received.hold(sender_of(context), len(raw))
        return _parsed(raw, parse)

    async def each(self, context: "grpc.aio.ServicerContext[Any, Any]", parse: Parse) -> AsyncIterator[Any]:
        """The messages of a call that has several; raises what `one` raises.

        Raises:
            DeadlineError: nothing arrived for too long.
        """
        arrivals = None if self._received is None else self._received.arrivals(of_checks=False)
        while True:
            async with nullcontext() if arrivals is None else arrivals.place(sender_of(context)):
                try:
                    async with asyncio.timeout(self._idle_s) as limit:
                        raw = await context.read()
                except TimeoutError:
                    if not limit.expired():
                        raise
                    raise DeadlineError(f"nothing was sent for {self._idle_s:g} seconds") from None
            if not isinstance(raw, bytes):
                return
            yield _parsed(await self._inflated(raw), parse)

    async def _inflated(self, raw: bytes) -> bytes:
        if not raw.startswith(GZIP_MAGIC):
            return raw
        if len(raw) <= SMALL_BYTES // 64:
            return inflate(raw, self._max_bytes)
        return await asyncio.to_thread(inflate, raw, self._max_bytes)


def inflate(raw: bytes, max_bytes: int) -> bytes:
    """What gzip made shorter; never more than `max_bytes` of it are in memory.

    Raises:
        MessageTooLargeError: it is longer.
        InvalidRequestError: it is not gzip, or not all of it.
    """
    inflating = zlib.decompressobj(wbits=31)
    try:
        message = inflating.decompress(raw, max_bytes + 1)
    except zlib.error:
        raise InvalidRequestError("request", "is compressed, but not by gzip") from None
    if len(message) > max_bytes:
        raise MessageTooLargeError(f"the message has more than the {max_bytes} bytes that one may have, once inflated")
    if not inflating.eof or inflating.unused_data:
        raise InvalidRequestError("request", "is compressed by gzip, and ends early or goes on after its end")
    return message


def has_fields_beyond(raw: bytes, limit: int) -> bool:
    """Whether a serialised message has more than so many fields, or is malformed."""
    at = 0
    try:
        for _ in range(limit):
            if at >= len(raw):
                return at > len(raw)
            _, _, at = next_field(raw, at)
    except IndexError:
        return True
    return at != len(raw)


def _parsed(raw: bytes, parse: Parse) -> Any:
    if len(raw) > SMALL_BYTES and has_fields_beyond(raw, MAX_FIELDS):
        raise InvalidRequestError("request", f"is no message of this method, or has more than {MAX_FIELDS} fields")
    try:
        return parse(raw)
    except (DecodeError, ValueError):
        raise InvalidRequestError(
            "request", "is no message of this method: it is not protobuf, or holds text that is not UTF-8"
        ) from None
