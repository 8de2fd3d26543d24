"""One long-lived stream to one replica of an expert group.

The engine's thread is synchronous and so is this: measured against an event loop in a thread of its own, a round trip
of 64 KiB took as long (p50 205 µs and 229 µs), and a second event loop beside the server's makes grpc.aio log errors.
"""

import itertools
import logging
import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from enum import Enum

import grpc

from protos import expert_pb2, expert_pb2_grpc

MAX_MESSAGE_BYTES = 512 * 1024 * 1024
CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 1000),
    # A replica's connection must not inherit the backoff of an earlier one to the same address.
    ("grpc.use_local_subchannel_pool", 1),
)

# Opens a gRPC channel to an address; where TLS or credentials are needed, they are put in here.
Connect = Callable[[str], grpc.Channel]


def connect_insecure(address: str) -> grpc.Channel:
    """A channel without TLS, for loopback."""
    return grpc.insecure_channel(address, options=list(CHANNEL_OPTIONS))


RETIRED = "a replica was taken out of service"

logger = logging.getLogger(__name__)


class ReplicaLostError(ConnectionError):
    """The stream to a replica broke before an exchange was answered; the text says why."""


class ChannelState(Enum):
    """Connecting, then ready, then closed; a closed channel is never used again."""

    CONNECTING = "connecting"
    READY = "ready"
    CLOSED = "closed"


class ReplicaChannel:
    """Carries exchanges of one organ to one replica, several at a time.

    Connecting happens in the background and includes one answer of the replica itself, so a replica whose process
    hangs never becomes ready. When the stream breaks, its exchanges fail at once and the channel is closed.
    """

    def __init__(
        self, organ: str, address: str, *, connect: Connect = connect_insecure, connect_timeout_s: float = 5.0
    ) -> None:
        """Starts connecting and returns at once."""
        self.organ = organ
        self.address = address
        self._lock = threading.Lock()
        self._state = ChannelState.CONNECTING
        self._reason = "a replica is being connected"
        self._pending: dict[int, Future[expert_pb2.ForwardResponse]] = {}
        self._correlation_ids = itertools.count(1)
        # None ends the stream.
        self._requests: queue.SimpleQueue[expert_pb2.ForwardRequest | None] = queue.SimpleQueue()
        self._channel = connect(address)
        self._stub = expert_pb2_grpc.ExpertGroupStub(self._channel)
        self._reader = threading.Thread(target=self._serve, args=(connect_timeout_s,), daemon=True, name=f"to-{organ}")
        self._reader.start()

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

    def send(self, request: expert_pb2.ForwardRequest) -> "Future[expert_pb2.ForwardResponse]":
        """Sends an exchange; its correlation id is set here.

        Returns:
            a future of the response, or of a `ReplicaLostError`.

        Raises:
            ReplicaLostError: the channel is not ready.
        """
        answer: Future[expert_pb2.ForwardResponse] = Future()
        with self._lock:
            if self._state is not ChannelState.READY:
                raise ReplicaLostError(self._reason)
            request.correlation_id = next(self._correlation_ids)
            self._pending[request.correlation_id] = answer
        self._requests.put(request)
        return answer

    def retire(self) -> None:
        """Takes no further exchanges, and closes when those under way are answered."""
        with self._lock:
            if self._state is ChannelState.READY:
                self._state, self._reason = ChannelState.CLOSED, RETIRED
                self._requests.put(None)
                return
        self.close(RETIRED)

    def close(self, reason: str) -> None:
        """Closes now; exchanges under way fail with the reason. Harmless when repeated."""
        with self._lock:
            if self._state is not ChannelState.CLOSED:
                self._state, self._reason = ChannelState.CLOSED, reason
                logger.info("experts of %s at %s: %s", self.organ, self.address, reason)
            pending, self._pending = self._pending, {}
        self._requests.put(None)
        self._channel.close()
        for answer in pending.values():
            answer.set_exception(ReplicaLostError(reason))

    def _serve(self, connect_timeout_s: float) -> None:
        try:
            status = self._stub.Status(
                expert_pb2.ExpertGroupStatusRequest(), wait_for_ready=True, timeout=connect_timeout_s
            )
            if status.organ != self.organ:
                self.close(f"a replica serves {status.organ!r}")
                return
            responses = self._stub.Forward(self._outgoing())
            with self._lock:
                if self._state is not ChannelState.CONNECTING:
                    return
                self._state = ChannelState.READY
            for response in responses:
                with self._lock:
                    answer = self._pending.pop(response.correlation_id, None)
                if answer is not None:
                    answer.set_result(response)
            self.close("a replica ended the stream")
        except grpc.RpcError as error:
            self.close(f"the stream to a replica broke ({error.code().name})")
        except ValueError:
            # gRPC's answer to a call on a channel that was closed meanwhile.
            self.close(RETIRED)

    def _outgoing(self) -> Iterator[expert_pb2.ForwardRequest]:
        return iter(self._requests.get, None)
