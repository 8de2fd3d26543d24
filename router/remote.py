"""Experts behind gRPC: chooses a replica for every exchange, and another when one is lost."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future

import torch
from google.rpc import code_pb2

from experts.transport.codec import tensor_from_proto, tensor_to_proto
from protos import expert_pb2
from router.channel import ChannelState, Connect, ReplicaChannel, ReplicaLostError, connect_insecure
from router.errors import ExpertsFailedError, ExpertsUnavailableError

# What a replica may answer while it is overloaded, starting, stopping, or has not loaded the bundle yet.
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


class RemoteExperts:
    """An `ExpertPlacement` of expert groups in other processes. Used from one thread."""

    def __init__(
        self,
        addresses: Callable[[str], Sequence[str]],
        *,
        exchange_timeout_s: float,
        connect: Connect = connect_insecure,
    ) -> None:
        """Opens nothing yet: channels are opened when an organ is first asked for, and never waited for.

        Args:
            addresses: the live replicas of an organ at any time; must return at once.
            exchange_timeout_s: a replica that has not answered an exchange for so long counts as lost; it is used
                again after it has answered a status call.
            connect: opens a gRPC channel to an address.
        """
        self._addresses = addresses
        self._timeout_s = exchange_timeout_s
        self._connect = connect
        self._channels: dict[str, dict[str, ReplicaChannel]] = {}

    def send(
        self,
        organ: str,
        bundle_digest: str,
        layer: int,
        x_TD: torch.Tensor,
        expert_index_TK: torch.Tensor,
        weight_TK: torch.Tensor,
    ) -> "RemoteExchange":
        """Sends to the replica with the fewest exchanges in flight; see `ExpertPlacement.send`."""
        request = expert_pb2.ForwardRequest(
            bundle_digest=bundle_digest,
            layer=layer,
            expert_index=tensor_to_proto(expert_index_TK),
            weight=tensor_to_proto(weight_TK),
            hidden_states=tensor_to_proto(x_TD),
        )
        return RemoteExchange(self, organ, request, x_TD, self._timeout_s)

    def unavailable(self, organ: str) -> ExpertsUnavailableError | None:
        """None when at least one replica of the organ is connected."""
        channels = self._refresh(organ)
        if any(channel.state is ChannelState.READY for channel in channels):
            return None
        # Without addresses: the text goes to callers.
        reasons = {channel.reason for channel in channels} or {"no replica is running"}
        return ExpertsUnavailableError(organ, "; ".join(sorted(reasons)))

    def wait_until_connected(self, organs: Sequence[str], timeout_s: float) -> None:
        """Waits until each organ has a connected replica.

        Raises:
            ExpertsUnavailableError: one of them has none after `timeout_s` seconds.
        """
        deadline = time.monotonic() + timeout_s
        for organ in organs:
            while (error := self.unavailable(organ)) is not None:
                if time.monotonic() >= deadline:
                    raise error
                time.sleep(0.005)

    def close(self) -> None:
        """Closes all channels."""
        for channels in self._channels.values():
            for channel in channels.values():
                channel.close("the router is shutting down")
        self._channels.clear()

    def start(
        self, organ: str, request: expert_pb2.ForwardRequest, tried: set[str]
    ) -> tuple[ReplicaChannel, "Future[expert_pb2.ForwardResponse]"]:
        """Sends a request to a replica whose address is not in `tried`.

        Raises:
            ExpertsUnavailableError: there is none.
        """
        reason = None
        ready = [
            channel
            for channel in self._refresh(organ)
            if channel.state is ChannelState.READY and channel.address not in tried
        ]
        for channel in sorted(ready, key=lambda channel: channel.in_flight):
            try:
                return channel, channel.send(request)
            except ReplicaLostError as error:
                reason = str(error)
        raise self.unavailable(organ) or ExpertsUnavailableError(organ, reason or "every replica was tried")

    def _refresh(self, organ: str) -> list[ReplicaChannel]:
        live = self._addresses(organ)
        channels = self._channels.setdefault(organ, {})
        for address in set(channels) - set(live):
            channels.pop(address).retire()
        for address in live:
            channel = channels.get(address)
            if channel is None or channel.state is ChannelState.CLOSED:
                channels[address] = ReplicaChannel(organ, address, connect=self._connect)
        return list(channels.values())


class RemoteExchange:
    """An exchange under way. Experts are pure, so it is simply sent again when a replica is lost."""

    def __init__(
        self,
        experts: RemoteExperts,
        organ: str,
        request: expert_pb2.ForwardRequest,
        x_TD: torch.Tensor,
        timeout_s: float,
    ) -> None:
        """Sends the request.

        Raises:
            ExpertsUnavailableError: no replica is connected.
        """
        self._experts = experts
        self._organ = organ
        self._request = request
        self._shape, self._dtype, self._device = x_TD.shape, x_TD.dtype, x_TD.device
        self._timeout_s = timeout_s
        self._tried: set[str] = set()
        self._start()

    def _start(self) -> None:
        self._channel, self._answer = self._experts.start(self._organ, self._request, self._tried)
        self._tried.add(self._channel.address)
        self._deadline = time.monotonic() + self._timeout_s

    def result(self) -> torch.Tensor:
        """Waits; see `Exchange.result`."""
        while True:
            failure = self._wait()
            if isinstance(failure, torch.Tensor):
                return failure
            try:
                self._start()
            except ExpertsUnavailableError:
                raise failure from None

    def _wait(self) -> torch.Tensor | ExpertsUnavailableError | ExpertsFailedError:
        try:
            response = self._answer.result(max(0.0, self._deadline - time.monotonic()))
        except TimeoutError:
            reason = f"a replica did not answer within {self._timeout_s:g} s (router.exchange_timeout_s)"
            self._channel.close(reason)
            return ExpertsUnavailableError(self._organ, reason)
        except ReplicaLostError as error:
            return ExpertsUnavailableError(self._organ, str(error))
        if response.HasField("error"):
            if response.error.code in PASSING_CODES:
                return ExpertsUnavailableError(self._organ, response.error.message)
            return ExpertsFailedError(self._organ, response.error.message)
        output_TD = tensor_from_proto(response.output)
        if output_TD.shape != self._shape or output_TD.dtype != self._dtype:
            return ExpertsFailedError(
                self._organ,
                f"sent {tuple(self._shape)} {self._dtype} and got {tuple(output_TD.shape)} {output_TD.dtype} back",
            )
        return output_TD.to(self._device)
