"""The exchanges with one replica of an expert group, over one long-lived stream."""

import itertools
import logging
import threading
import time
from contextlib import suppress
from enum import Enum

import grpc
import torch

from experts.transport import wire
from experts.transport.grpc_core import missing
from experts.transport.host import host_id
from experts.transport.inner_channel import PLAIN_CHANNELS, InnerChannels, Option
from experts.transport.shared_memory import MemoryBudget, SharedMemory
from protos import expert_pb2, expert_pb2_grpc
from router.links import DirectLink, Link, LinkLostError, ThreadedLink
from router.tokens import Place, Tokens, TokenWriter

MAX_MESSAGE_BYTES = 512 * 1024 * 1024
# Beside those of every channel between the parts.
_OPTIONS: tuple[Option, ...] = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.initial_reconnect_backoff_ms", 50),
    # The time that one attempt to connect may take: a busy replica may need long for its first bytes.
    ("grpc.min_reconnect_backoff_ms", 1000),
    # A replica's connection must not inherit the backoff of an earlier one to the same address.
    ("grpc.use_local_subchannel_pool", 1),
)

# How long an answer may take to be read that has come.
_LAST_LOOK_S = 0.1

RETIRED = "a replica was taken out of service"
BROKEN = "the connection to a replica broke"

logger = logging.getLogger(__name__)


class ReplicaLostError(ConnectionError):
    """The stream to a replica broke before an exchange was answered; the text says why."""


class ChannelState(Enum):
    """Connecting, then ready, then closed; a closed channel is never used again."""

    CONNECTING = "connecting"
    READY = "ready"
    CLOSED = "closed"


class SentExchange:
    """An exchange that a replica was sent, until it is answered."""

    __slots__ = ("_channel", "_data", "_place", "_response", "deadline", "gather_s")

    def __init__(self, channel: "ReplicaChannel", place: Place | None, deadline: float, gather_s: float = 0.0) -> None:
        """Made by the channel; `deadline` is of `time.monotonic`, `gather_s` how long the rows took to be collected."""
        self.deadline = deadline
        self.gather_s = gather_s
        self._channel = channel
        # Held until the answer: the replica writes to it.
        self._place = place
        self._response: expert_pb2.ForwardResponse | None = None
        self._data: memoryview | None = None

    def answered(self) -> bool:
        """Whether the response is there."""
        return self._response is not None

    def answer(self, response: expert_pb2.ForwardResponse, data: memoryview | None) -> None:
        """Called by the channel."""
        self._response, self._data = response, data

    def response(self) -> expert_pb2.ForwardResponse:
        """Waits for the response.

        Raises:
            ReplicaLostError: there will be none.
        """
        if self._response is None:
            self._channel.wait(self)
        assert self._response is not None
        return self._response

    def output_TD(self) -> torch.Tensor:
        """What the replica computed, of a response that is no error: a view of where it came.

        Raises:
            InvalidTensorError: the response's tensor is malformed.
        """
        assert self._response is not None
        if self._response.output_in_place and self._place is not None:
            return self._place.output_TD()
        return wire.tensor_of(self._response.output, self._data, "output")


class ReplicaChannel:
    """Carries exchanges of one organ to one replica, several at a time.

    Connecting happens in the background and includes one answer of the replica itself, so a replica whose process
    hangs never becomes ready. Where both are on one host, the tensors lie in shared memory; otherwise, and where that
    cannot be had, in the messages. When the stream breaks, its exchanges fail at once and the channel is closed; its
    memory is never used again, so a replica that still writes to it does no harm.

    One thread sends and waits. `close`, `retire` and `watch` may be called from any.
    """

    def __init__(
        self,
        organ: str,
        address: str,
        *,
        channels: InnerChannels = PLAIN_CHANNELS,
        connect_timeout_s: float = 5.0,
        exchange_timeout_s: float = 10.0,
        budget: MemoryBudget | None = None,
    ) -> None:
        """Starts connecting and returns at once.

        Args:
            organ: what the replica must serve.
            address: host and port.
            channels: opens the connections to it.
            connect_timeout_s: a replica that does not answer for so long is given up.
            exchange_timeout_s: an exchange without an answer for so long closes the channel, when `watch` sees it.
            budget: of the memory to be shared; None for none.
        """
        self.organ = organ
        self.address = address
        self._timeout_s = exchange_timeout_s
        self._lock = threading.Lock()
        self._state = ChannelState.CONNECTING
        self._retiring = False
        self._reason = "a replica is being connected"
        self._pending: dict[int, SentExchange] = {}
        self._correlation_ids = itertools.count(1)
        self._link: Link | None = None
        self._writer: TokenWriter | None = None
        self._channels = channels
        self._channel = channels.blocking(address, *_OPTIONS)
        self._opener = threading.Thread(
            target=self._open, args=(connect_timeout_s, budget), daemon=True, name=f"open-{organ}"
        )
        self._opener.start()

    @property
    def state(self) -> ChannelState:
        """Whether exchanges can be sent."""
        return self._state

    @property
    def reason(self) -> str:
        """Why it is not ready."""
        return self._reason

    @property
    def in_flight(self) -> int:
        """Exchanges sent and not answered."""
        return len(self._pending)

    @property
    def shares_memory(self) -> bool:
        """Whether tensors lie in shared memory."""
        return self._writer is not None

    def send(self, tokens: Tokens) -> SentExchange:
        """Sends an exchange.

        Raises:
            ReplicaLostError: the channel is not ready, or breaks.
        """
        link, writer = self._link, self._writer
        if self._state is not ChannelState.READY or link is None:
            raise ReplicaLostError(self._reason)
        correlation_id = next(self._correlation_ids)
        place = None
        started = time.perf_counter()
        written = None if writer is None else writer.write(tokens, correlation_id)
        if written is None:
            message = tokens.message(correlation_id)
        else:
            message, place = written
        sent = SentExchange(self, place, time.monotonic() + self._timeout_s, time.perf_counter() - started)
        with self._lock:
            if self._state is not ChannelState.READY:
                raise ReplicaLostError(self._reason)
            self._pending[correlation_id] = sent
        try:
            link.send(message)
        except LinkLostError as error:
            self.close(str(error))
            raise ReplicaLostError(self._reason) from None
        return sent

    def wait(self, sent: SentExchange) -> None:
        """Waits until an exchange is answered.

        Raises:
            ReplicaLostError: it will not be.
        """
        link = self._link
        try:
            if link is None:
                raise LinkLostError(self._reason)
            link.wait(sent.answered)
        except LinkLostError as error:
            self.close(str(error))
            raise ReplicaLostError(self._reason) from None

    def watch(self, now: float) -> None:
        """Looks after the channel; to be called several times a second, with the time of `time.monotonic`."""
        with self._lock:
            oldest = next(iter(self._pending.values()), None)
            link, writer = self._link, self._writer
        if oldest is not None and link is not None and oldest.deadline <= now:
            self._look_once_more(link, oldest)
        elif oldest is None and self._state is ChannelState.READY and link is not None and not link.connected:
            self.close(BROKEN)
        elif writer is not None:
            writer.memory.give_back_if_idle(now)

    def retire(self) -> None:
        """Takes no further exchanges, and closes when those under way are answered."""
        with self._lock:
            under_way = bool(self._pending)
            if under_way:
                self._state, self._reason, self._retiring = ChannelState.CLOSED, RETIRED, True
        if not under_way:
            self.close(RETIRED)

    def close(self, reason: str) -> None:
        """Closes now; exchanges under way fail with the reason. Harmless when repeated."""
        with self._lock:
            if self._state is not ChannelState.CLOSED:
                self._state, self._reason = ChannelState.CLOSED, reason
                logger.info("experts of %s at %s: %s", self.organ, self.address, reason)
            self._retiring = False
            self._pending = {}
            link, self._link = self._link, None
            writer, self._writer = self._writer, None
        if link is not None:
            link.close()
        if writer is not None:
            writer.memory.close()
        self._channel.close()

    def _look_once_more(self, link: Link, oldest: SentExchange) -> None:
        reason = f"a replica did not answer within {self._timeout_s:g} s (router.exchange_timeout_s)"
        if link.being_read:
            self.close(reason)
            return
        # The answer may have come, and the thread that will read it does something else.
        impatience = threading.Timer(_LAST_LOOK_S, self.close, [reason])
        impatience.start()
        with suppress(LinkLostError):
            link.wait(oldest.answered)
        impatience.cancel()

    def _open(self, timeout_s: float, budget: MemoryBudget | None) -> None:
        try:
            stub = expert_pb2_grpc.ExpertGroupStub(self._channel)
            status = stub.Status(expert_pb2.ExpertGroupStatusRequest(), wait_for_ready=True, timeout=timeout_s)
            if status.organ != self.organ:
                self.close(f"a replica serves {status.organ!r}")
                return
            if budget is None or not self._open_shared(status, budget, timeout_s):
                self._ready(ThreadedLink(self._channel, self._received, self._lost, f"to-{self.organ}"), None)
        except grpc.RpcError as error:
            self.close(f"the stream to a replica broke ({error.code().name})")
        except ValueError:
            # gRPC's answer to a call on a channel that was closed meanwhile.
            self.close(RETIRED)

    def _open_shared(
        self, status: expert_pb2.ExpertGroupStatusResponse, budget: MemoryBudget, timeout_s: float
    ) -> bool:
        reason = _why_not(status)
        # The unexpected is worth a warning.
        level = logging.WARNING if reason is None else logging.INFO
        if reason is None:
            try:
                memory = SharedMemory(budget)
            except OSError as error:
                reason = f"no memory can be had ({error.strerror})"
            else:
                local = self._channels.local(status.local_address, *_OPTIONS)
                link = DirectLink(local, self._received, self._channels.secret.metadata)
                reason = self._attach(link, memory, status.instance, timeout_s)
                if reason is None:
                    self._ready(link, TokenWriter(memory))
                    self._channel.close()
                    return True
                link.close()
                memory.close()
        logger.log(level, "experts of %s at %s: tensors travel in the messages: %s", self.organ, self.address, reason)
        return False

    def _attach(self, link: DirectLink, memory: SharedMemory, instance: str, timeout_s: float) -> str | None:
        """Why the replica does not share the memory, or None."""
        correlation_id = next(self._correlation_ids)
        attaching = SentExchange(self, None, time.monotonic() + timeout_s)
        self._pending[correlation_id] = attaching
        request = expert_pb2.ForwardRequest(correlation_id=correlation_id, attach=memory.attach_message())
        impatience = threading.Timer(timeout_s, link.close)
        impatience.start()
        try:
            link.send(request.SerializeToString())
            link.wait(attaching.answered)
        except LinkLostError as error:
            return str(error)
        finally:
            impatience.cancel()
            with self._lock:
                self._pending.pop(correlation_id, None)
        response = attaching.response()
        if response.HasField("error"):
            return str(response.error.message)
        if response.attached != instance:
            return "another process answers at its local address"
        memory.attached()
        return None

    def _ready(self, link: Link, writer: TokenWriter | None) -> None:
        with self._lock:
            if self._state is ChannelState.CONNECTING:
                self._state, self._link, self._writer = ChannelState.READY, link, writer
                return
        link.close()

    def _lost(self, reason: str) -> None:
        link = self._link
        if link is not None:
            # Answers that came before the end are answers.
            with suppress(LinkLostError):
                link.wait(lambda: not self._pending)
        self.close(reason)

    def _received(self, message: bytes) -> None:
        try:
            response, data = wire.parse(expert_pb2.ForwardResponse, message)
        except wire.DecodeError:
            self.close("a replica answered with what is no ForwardResponse")
            return
        with self._lock:
            sent = self._pending.pop(response.correlation_id, None)
            last = self._retiring and not self._pending
        if sent is not None:
            sent.answer(response, data)
        if last:
            self.close(RETIRED)


def _why_not(status: expert_pb2.ExpertGroupStatusResponse) -> str | None:
    """Why no memory can be shared with a replica, before anything is tried."""
    if not status.local_address:
        return "the replica offers no shared memory"
    if not status.host or status.host != host_id():
        return "it is on another host"
    return missing()
