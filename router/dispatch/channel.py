"""The expert calls to one replica: over shared memory if it runs on the same host, otherwise over gRPC."""

import itertools
import logging
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from enum import Enum

import grpc

from experts.transport import wire
from experts.transport.host import is_this_machine
from experts.transport.inner_channel import PLAIN_CHANNELS, InnerChannels, Option
from experts.transport.local_connection import MAX_PACKET_BYTES
from experts.transport.shared_memory import MemoryBudget
from protos import expert_pb2, expert_pb2_grpc
from router.dispatch.links import GrpcLink, Link, LinkLostError
from router.dispatch.local_path import LocalPath, open_local_path
from router.dispatch.pending_call import PendingCall, ReplicaLostError
from router.dispatch.tokens import Tokens

MAX_MESSAGE_BYTES = 512 * 1024 * 1024
# In addition to the options of every channel between the parts.
_OPTIONS: tuple[Option, ...] = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.initial_reconnect_backoff_ms", 50),
    # The timeout of one connection attempt: a busy replica may be slow to send its first bytes.
    ("grpc.min_reconnect_backoff_ms", 1000),
    # A replica's connection must not inherit the backoff of an earlier one to the same address.
    ("grpc.use_local_subchannel_pool", 1),
)

# How long a received answer may take to be read.
_LAST_LOOK_S = 0.1

RETIRED = "a replica was taken out of service"
BROKEN = "the connection to a replica broke"

logger = logging.getLogger(__name__)


class ChannelState(Enum):
    """Connecting, then ready, then closed. A closed channel is not reused."""

    CONNECTING = "connecting"
    READY = "ready"
    CLOSED = "closed"


class ReplicaChannel:
    """Sends calls for one organ to one replica, several at a time.

    The channel connects in the background and is ready after a status call succeeded, so a replica that hangs never
    becomes ready. If the replica's Unix socket can be reached, tensors are in shared memory. Calls that do not fit
    there, and all calls to other hosts, use a gRPC stream with the tensors in the messages. If the local path fails, at
    its opening or later, its calls are sent again over gRPC and it is not used again. If the stream fails, the replica
    is lost: its calls fail immediately and the channel is closed. The memory of a failed local path is never reused, so
    a replica that still writes to it does no harm.

    One thread sends and waits. `close`, `retire` and `watch` may be called from any thread.
    """

    def __init__(
        self,
        organ: str,
        address: str,
        *,
        channels: InnerChannels = PLAIN_CHANNELS,
        connect_timeout_s: float = 5.0,
        call_timeout_s: float = 10.0,
        budget: MemoryBudget | None = None,
    ) -> None:
        """Starts connecting and returns at once.

        Args:
            organ: the organ that the replica must serve.
            address: host and port.
            channels: opens the connections to it.
            connect_timeout_s: how long a replica may take to answer before the channel is closed.
            call_timeout_s: how long a call may take before `watch` closes the channel.
            budget: the limit for shared memory; None disables it.
        """
        self.organ = organ
        self.address = address
        self._connect_timeout_s = connect_timeout_s
        self._timeout_s = call_timeout_s
        self._lock = threading.Lock()
        self._state = ChannelState.CONNECTING
        self._retiring = False
        self._reason = "a replica is being connected"
        self._pending: dict[int, PendingCall] = {}
        self._correlation_ids = itertools.count(1)
        self._local: LocalPath | None = None
        self._stream: GrpcLink | None = None
        self._channels = channels
        self._channel = channels.blocking(address, *_OPTIONS)
        self._start(self._open, budget)

    @property
    def state(self) -> ChannelState:
        """Whether calls can be sent."""
        return self._state

    @property
    def reason(self) -> str:
        """Why the channel is not ready."""
        return self._reason

    @property
    def in_flight(self) -> int:
        """The number of calls without an answer yet."""
        return len(self._pending)

    @property
    def shares_memory(self) -> bool:
        """Whether the channel uses shared memory."""
        return self._local is not None

    def send(self, tokens: Tokens) -> PendingCall:
        """Sends a call.

        Raises:
            ReplicaLostError: the channel is not ready, or fails.
        """
        if self._state is not ChannelState.READY:
            raise ReplicaLostError(self._reason)
        correlation_id = next(self._correlation_ids)
        local = self._local
        written = None if local is None else local.writer.write(tokens, correlation_id)
        link: Link
        try:
            if local is None or written is None or len(written[0]) > MAX_PACKET_BYTES:
                link, message, place = self._open_stream(), tokens.message(correlation_id), None
            else:
                link, (message, place) = local.link, written
        except LinkLostError:
            raise ReplicaLostError(self._reason) from None
        deadline = time.monotonic() + self._timeout_s
        call = PendingCall(self.wait, correlation_id, tokens, link, place, deadline=deadline)
        with self._lock:
            if self._state is not ChannelState.READY:
                raise ReplicaLostError(self._reason)
            self._pending[correlation_id] = call
        try:
            link.send(message)
        except LinkLostError as error:
            self._link_lost(link, str(error))
            if self._given_up(call):
                raise ReplicaLostError(self._reason) from None
        return call

    def wait(self, call: PendingCall) -> None:
        """Waits until a call is answered.

        Raises:
            ReplicaLostError: the channel failed first.
        """
        while not call.answered():
            link = call.link
            try:
                link.wait(call.answered)
            except LinkLostError as error:
                self._link_lost(link, str(error))
            if self._given_up(call):
                raise ReplicaLostError(self._reason)

    def watch(self, now: float) -> None:
        """Checks timeouts and connections. Call it several times a second with the time of `time.monotonic`."""
        with self._lock:
            oldest = min(self._pending.values(), key=lambda call: call.deadline, default=None)
            local = self._local
        if oldest is not None and oldest.deadline <= now:
            self._look_once_more(oldest)
        elif oldest is None and local is not None and not local.link.connected:
            self._link_lost(local.link, "the other process closed the connection")
        elif local is not None:
            local.writer.memory.give_back_if_idle(now)

    def retire(self) -> None:
        """Accepts no further calls, and closes when the running ones are answered."""
        with self._lock:
            under_way = bool(self._pending)
            if under_way:
                self._state, self._reason, self._retiring = ChannelState.CLOSED, RETIRED, True
        if not under_way:
            self.close(RETIRED)

    def close(self, reason: str) -> None:
        """Closes the channel; running calls fail with the reason. Idempotent."""
        with self._lock:
            if self._state is not ChannelState.CLOSED:
                self._state, self._reason = ChannelState.CLOSED, reason
                logger.info("experts of %s at %s: %s", self.organ, self.address, reason)
            self._retiring = False
            self._pending = {}
            local, self._local = self._local, None
            stream, self._stream = self._stream, None
        if local is not None:
            local.close()
        if stream is not None:
            stream.close()
        self._channel.close()

    def _look_once_more(self, oldest: PendingCall) -> None:
        reason = f"a replica did not answer within {self._timeout_s:g} s (router.exchange_timeout_s)"
        link = oldest.link
        if link.being_read:
            self.close(reason)
            return
        # The answer may have arrived while the thread that reads it is busy.
        closing = threading.Timer(_LAST_LOOK_S, self.close, [reason])
        closing.start()
        try:
            link.wait(oldest.answered)
        except LinkLostError as error:
            self._link_lost(link, str(error))
        closing.cancel()

    def _start(self, in_background: Callable[..., None], *arguments: object) -> None:
        threading.Thread(target=in_background, args=arguments, daemon=True, name=f"open-{self.organ}").start()

    def _open(self, budget: MemoryBudget | None) -> None:
        try:
            stub = expert_pb2_grpc.ExpertGroupStub(self._channel)
            timeout_s = self._connect_timeout_s
            status = stub.Status(expert_pb2.ExpertGroupStatusRequest(), wait_for_ready=True, timeout=timeout_s)
            if status.organ != self.organ:
                self.close(f"a replica serves {status.organ!r}")
                return
            local = None if budget is None else self._open_local(status, budget)
            if local is None:
                self._open_stream()
            self._ready(local)
        except grpc.RpcError as error:
            self.close(f"the stream to a replica broke ({error.code().name})")
        except LinkLostError as error:
            self.close(str(error))
        except ValueError:
            # gRPC raises this for a call on a channel that was closed concurrently.
            self.close(RETIRED)
        except Exception as error:
            # The channel must not stay in CONNECTING, because the next one may succeed.
            places = "".join(traceback.format_tb(error.__traceback__))
            logger.error("connecting to experts of %s failed: %s\n%s", self.organ, type(error).__name__, places)
            self.close("connecting to a replica failed")

    def _open_local(self, status: expert_pb2.ExpertGroupStatusResponse, budget: MemoryBudget) -> LocalPath | None:
        if not status.local_socket:
            self._log_fallback(logging.INFO, "the replica offers no shared memory")
            return None
        try:
            return open_local_path(status, secret=self._channels.secret, budget=budget, received=self._received_locally)
        except FileNotFoundError:
            here = is_this_machine(self.address)
            reason = "its local socket is not there" if here else "it is on another host, or in another container"
            self._log_fallback(logging.WARNING if here else logging.INFO, reason)
        except ConnectionError as error:
            self._log_fallback(logging.WARNING, str(error))
        except Exception as error:
            # On any error, gRPC is used.
            self._log_fallback(logging.WARNING, f"the local path cannot be opened: {type(error).__name__}: {error}")
        return None

    def _log_fallback(self, level: int, reason: str) -> None:
        logger.log(level, "experts of %s at %s: tensors travel in the messages: %s", self.organ, self.address, reason)

    def _ready(self, local: LocalPath | None) -> None:
        with self._lock:
            if self._state is ChannelState.CONNECTING:
                self._state, self._local = ChannelState.READY, local
                return
        if local is not None:
            local.close()

    def _open_stream(self) -> GrpcLink:
        """The gRPC stream, opened on first use.

        Raises:
            LinkLostError: the channel is closed.
        """
        with self._lock:
            if self._stream is None:
                if self._state is ChannelState.CLOSED and not self._retiring:
                    raise LinkLostError(self._reason)
                self._stream = GrpcLink(self._channel, self._received_message, self._stream_lost, f"to-{self.organ}")
            return self._stream

    def _given_up(self, call: PendingCall) -> bool:
        return not call.answered() and self._pending.get(call.correlation_id) is not call

    def _link_lost(self, link: Link, reason: str) -> None:
        """Falls back to gRPC if the local path failed; closes the channel if the stream failed."""
        with self._lock:
            is_stream = link is self._stream
            local = self._local
            if local is not None and local.link is link:
                self._local = None
            else:
                local = None
        if is_stream:
            self.close(reason)
            return
        link.close()
        if local is not None:
            threading.Thread(
                target=self._confirm_fallback, args=(reason,), daemon=True, name=f"open-{self.organ}"
            ).start()
        with self._lock:
            unanswered = [call for call in self._pending.values() if call.link is link]
        for call in unanswered:
            self._send_again(call, link)

    def _send_again(self, call: PendingCall, lost: Link) -> None:
        """Sends the calls of the local path again over gRPC."""
        message = call.tokens.message(call.correlation_id)
        try:
            stream = self._open_stream()
            with self._lock:
                if call.link is not lost or self._pending.get(call.correlation_id) is not call:
                    return
                call.link, call.place = stream, None
                call.deadline = time.monotonic() + self._timeout_s
            stream.send(message)
        except LinkLostError as error:
            self.close(str(error))

    def _confirm_fallback(self, reason: str) -> None:
        """Logs the failed local path if the replica still answers; closes the channel if the replica has ended."""
        stub = expert_pb2_grpc.ExpertGroupStub(self._channel)
        try:
            stub.Status(expert_pb2.ExpertGroupStatusRequest(), timeout=self._connect_timeout_s)
        except (grpc.RpcError, ValueError):
            self.close(BROKEN)
        else:
            self._log_fallback(logging.WARNING, reason)

    def _stream_lost(self, stream: GrpcLink, reason: str) -> None:
        # Answers that arrived before the end are valid.
        with suppress(LinkLostError):
            stream.wait(lambda: not self._pending)
        self.close(reason)

    def _received_message(self, message: bytes) -> None:
        try:
            response, data = wire.parse(expert_pb2.ForwardResponse, message)
        except wire.DecodeError:
            raise LinkLostError("a replica answered with what is no ForwardResponse") from None
        self._received(response, data)

    def _received_locally(self, response: expert_pb2.ForwardResponse) -> None:
        if not (response.output_in_place or response.HasField("error")):
            raise LinkLostError("an answer has neither an output nor an error")
        if not self._received(response, None) and self._state is ChannelState.READY:
            raise LinkLostError("an answer is to no call")

    def _received(self, response: expert_pb2.ForwardResponse, data: memoryview | None) -> bool:
        """Answers the call, if there is one."""
        with self._lock:
            call = self._pending.pop(response.correlation_id, None)
            last = self._retiring and not self._pending
        if call is not None:
            call.answer(response, data)
        if last:
            self.close(RETIRED)
        return call is not None
