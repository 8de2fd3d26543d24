"""Remote experts: chooses a replica for every call, and another one if that is lost."""

import threading
import time
import weakref
from collections.abc import Callable, Sequence

import torch
from google.rpc import code_pb2, error_details_pb2, status_pb2

from experts.errors import BUNDLE_UNUSABLE, InvalidTensorError
from experts.transport.inner_channel import PLAIN_CHANNELS, InnerChannels
from experts.transport.shared_memory import MemoryBudget
from router.dispatch.channel import ChannelState, ReplicaChannel
from router.dispatch.pending_call import PendingCall, ReplicaLostError
from router.dispatch.tokens import Tokens
from router.errors import ExpertsFailedError, ExpertsUnavailableError, ExpertsUnusableError

# Status codes of a replica that is overloaded, starting, stopping, or has not loaded the bundle yet.
PASSING_CODES = frozenset(
    {
        code_pb2.UNAVAILABLE,
        code_pb2.RESOURCE_EXHAUSTED,
        code_pb2.NOT_FOUND,
        code_pb2.FAILED_PRECONDITION,
        code_pb2.ABORTED,
        code_pb2.CANCELLED,
        code_pb2.DEADLINE_EXCEEDED,
    }
)
# A few times the traffic of the longest step of a full-size model.
SHARED_MEMORY_BYTES = 256 * 1024 * 1024
_LONGEST_WATCH_S = 0.25
# For this many seconds a replica that could not load a bundle is the last choice for it.
_LACKING_S = 1.0


class RemoteExperts:
    """An `ExpertPlacement` of expert groups in other processes. Not thread-safe, except `close`."""

    def __init__(
        self,
        addresses: Callable[[str], Sequence[str]],
        *,
        exchange_timeout_s: float,
        channels: InnerChannels = PLAIN_CHANNELS,
        shared_memory_bytes: int = SHARED_MEMORY_BYTES,
    ) -> None:
        """Opens no channels yet: they are opened on first use of an organ, without blocking.

        Args:
            addresses: returns the live replicas of an organ; must not block.
            exchange_timeout_s: the timeout of a call. After it the replica counts as lost until it answers a status
                call.
            channels: opens the connections to replicas.
            shared_memory_bytes: the limit for memory shared with all replicas on this host. Calls that do not fit are
                sent in messages. 0 disables shared memory.
        """
        self._addresses = addresses
        self._timeout_s = exchange_timeout_s
        self._connections = channels
        self._budget = MemoryBudget(shared_memory_bytes) if shared_memory_bytes else None
        self._channels: dict[str, dict[str, ReplicaChannel]] = {}
        # Retired channels, until their calls are answered.
        self._retired: list[ReplicaChannel] = []
        # (address, bundle) → until when the replica is the last choice, in `time.monotonic` seconds.
        self._lacking: dict[tuple[str, str], float] = {}
        self._closing = threading.Event()
        self._watcher: threading.Thread | None = None

    def send(
        self,
        organ: str,
        bundle_digest: str,
        layer: int,
        x_TD: torch.Tensor,
        expert_index_RK: torch.Tensor,
        weight_RK: torch.Tensor,
        row_R: torch.Tensor | None = None,
    ) -> "RemoteExpertCall":
        """Sends to the replica with the fewest calls in flight; see `ExpertPlacement.send`."""
        return RemoteExpertCall(self, organ, Tokens(bundle_digest, layer, x_TD, row_R, expert_index_RK, weight_RK))

    def unavailable(self, organ: str) -> ExpertsUnavailableError | None:
        """None if at least one replica of the organ is connected."""
        channels = self._refresh(organ)
        if any(channel.state is ChannelState.READY for channel in channels):
            return None
        # Without addresses: the text goes to callers.
        reasons = {channel.reason for channel in channels} or {"no replica is running"}
        return ExpertsUnavailableError(organ, "; ".join(sorted(reasons)))

    def wait_until_connected(self, organs: Sequence[str], timeout_s: float) -> None:
        """Waits until each organ has a connected replica.

        Raises:
            ExpertsUnavailableError: an organ has none after `timeout_s` seconds.
        """
        deadline = time.monotonic() + timeout_s
        for organ in organs:
            while (error := self.unavailable(organ)) is not None:
                if time.monotonic() >= deadline:
                    raise error
                time.sleep(0.005)

    def close(self) -> None:
        """Closes all channels."""
        self._closing.set()
        for channel in self._all_channels():
            channel.close("the router is shutting down")
        self._channels.clear()
        self._retired = []

    def start(self, organ: str, tokens: Tokens, tried: set[str]) -> tuple[ReplicaChannel, PendingCall]:
        """Sends a call to a replica whose address is not in `tried`.

        Raises:
            ExpertsUnavailableError: there is none.
        """
        reason = None
        ready = [
            channel
            for channel in self._refresh(organ)
            if channel.state is ChannelState.READY and channel.address not in tried
        ]
        if len(ready) > 1:
            now = time.monotonic()
            digest = tokens.bundle_digest
            ready.sort(key=lambda channel: (self._lacking.get((channel.address, digest), 0.0) > now, channel.in_flight))
        for channel in ready:
            try:
                return channel, channel.send(tokens)
            except ReplicaLostError as error:
                reason = str(error)
        raise self.unavailable(organ) or ExpertsUnavailableError(organ, reason or "every replica was tried")

    def lacks(self, address: str, bundle_digest: str) -> None:
        """Records that a replica could not load a bundle."""
        now = time.monotonic()
        self._lacking = {place: until for place, until in self._lacking.items() if until > now}
        self._lacking[address, bundle_digest] = now + _LACKING_S

    def is_connecting(self, organ: str) -> bool:
        """Whether another replica of the organ is connecting."""
        return any(channel.state is ChannelState.CONNECTING for channel in self._refresh(organ))

    def _refresh(self, organ: str) -> list[ReplicaChannel]:
        live = self._addresses(organ)
        channels = self._channels.get(organ)
        if channels is None:
            channels = self._channels[organ] = {}
            self._start_watching()
        if len(channels) != len(live) or not all(address in channels for address in live):
            for address in set(channels) - set(live):
                channel = channels.pop(address)
                channel.retire()
                self._retired = [each for each in (*self._retired, channel) if each.in_flight]
        for address in live:
            found = channels.get(address)
            if found is None or found.state is ChannelState.CLOSED:
                channels[address] = ReplicaChannel(
                    organ,
                    address,
                    channels=self._connections,
                    call_timeout_s=self._timeout_s,
                    budget=self._budget,
                )
        return list(channels.values())

    def _all_channels(self) -> list[ReplicaChannel]:
        used = [channel for channels in list(self._channels.values()) for channel in list(channels.values())]
        return used + self._retired

    def _start_watching(self) -> None:
        if self._watcher is None:
            period_s = min(_LONGEST_WATCH_S, self._timeout_s / 4)
            self._watcher = threading.Thread(
                target=_watch, args=(weakref.ref(self), self._closing, period_s), daemon=True, name="watch-experts"
            )
            self._watcher.start()


def _watch(watched: "weakref.ref[RemoteExperts]", closing: threading.Event, period_s: float) -> None:
    # A weak reference, so that the thread ends if the object is dropped without `close`.
    while not closing.wait(period_s):
        experts = watched()
        if experts is None:
            return
        now = time.monotonic()
        for channel in experts._all_channels():
            channel.watch(now)
        del experts


class RemoteExpertCall:
    """A running call. Experts are pure functions, so it is sent again when a replica is lost.

    Attributes:
        compute_s: see `ExpertCall`.
    """

    __slots__ = ("_channel", "_experts", "_organ", "_passing", "_pending", "_tokens", "_tried", "compute_s")

    def __init__(self, experts: RemoteExperts, organ: str, tokens: Tokens) -> None:
        """Sends the tokens.

        Raises:
            ExpertsUnavailableError: no replica is connected.
        """
        self._experts = experts
        self._organ = organ
        self._tokens = tokens
        self._tried: set[str] = set()
        # A replica among those tried that may load the bundle later.
        self._passing: ExpertsUnavailableError | None = None
        self.compute_s = 0.0
        self._start()

    def _start(self) -> None:
        self._channel, self._pending = self._experts.start(self._organ, self._tokens, self._tried)
        self._tried.add(self._channel.address)

    def result(self) -> torch.Tensor:
        """Waits; see `ExpertCall.result`."""
        while True:
            outcome = self._wait()
            if isinstance(outcome, torch.Tensor):
                return outcome
            if isinstance(outcome, ExpertsUnusableError):
                self._experts.lacks(self._channel.address, outcome.digest)
            elif isinstance(outcome, ExpertsUnavailableError):
                self._passing = outcome
            try:
                self._start()
            except ExpertsUnavailableError as no_other:
                try:
                    raise self._verdict(outcome, no_other) from None
                finally:
                    # Its traceback refers to this frame, a cycle that would keep the shared memory alive.
                    del outcome
                    self._passing = None

    def _verdict(
        self, last: ExpertsUnavailableError | ExpertsFailedError, no_other: ExpertsUnavailableError
    ) -> ExpertsUnavailableError | ExpertsFailedError:
        """Waiting is useless only if every replica failed to load the bundle."""
        if isinstance(last, ExpertsUnusableError):
            if self._passing is not None:
                return self._passing
            if self._experts.is_connecting(self._organ):
                return ExpertsUnavailableError(self._organ, str(no_other))
        return last

    def _wait(self) -> torch.Tensor | ExpertsUnavailableError | ExpertsFailedError:
        try:
            response = self._pending.response()
        except ReplicaLostError as error:
            return ExpertsUnavailableError(self._organ, str(error))
        if response.HasField("error"):
            if (reason := _unusable(response.error)) is not None:
                return ExpertsUnusableError(self._organ, self._tokens.bundle_digest, reason)
            if response.error.code in PASSING_CODES:
                return ExpertsUnavailableError(self._organ, response.error.message)
            return ExpertsFailedError(self._organ, response.error.message)
        self.compute_s = response.compute_ns * 1e-9
        try:
            output_TD = self._pending.output_TD()
        except InvalidTensorError as error:
            return ExpertsFailedError(self._organ, str(error))
        x_TD, shape = self._tokens.x_TD, self._tokens.shape
        if output_TD.shape != shape or output_TD.dtype != x_TD.dtype:
            return ExpertsFailedError(
                self._organ,
                f"sent {shape} {x_TD.dtype} and got {tuple(output_TD.shape)} {output_TD.dtype} back",
            )
        return output_TD if x_TD.is_cpu else output_TD.to(x_TD.device)


def _unusable(status: status_pb2.Status) -> str | None:
    """Why a replica could not load the bundle of the call, if that is its error."""
    info = error_details_pb2.ErrorInfo()
    for detail in status.details:
        if detail.Unpack(info) and info.reason == BUNDLE_UNUSABLE:
            return str(info.metadata.get("why", ""))
    return None
