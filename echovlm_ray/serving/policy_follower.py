"""Follows what Control says is served, for the parts that only want to know."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence

import grpc

from echovlm_ray.serving.known_policy import check_identity
from experts.transport.inner_channel import PLAIN_CHANNELS, InnerChannels
from protos import control_pb2, control_pb2_grpc

logger = logging.getLogger(__name__)

FIRST_PAUSE_S = 0.2
LONGEST_PAUSE_S = 3.0
TAKEN_UP_TIMEOUT_S = 5.0


class PolicyFollower:
    """Hands on every policy of Control that is newer than the last. Belongs to one event loop.

    While Control is away nothing is handed on. A policy that cannot be taken is offered again.
    """

    def __init__(
        self,
        addresses: Callable[[], Sequence[str]],
        take: Callable[[control_pb2.TrafficPolicy], Awaitable[None]],
        channels: InnerChannels = PLAIN_CHANNELS,
        *,
        gateway: str = "",
        identity: str = "",
    ) -> None:
        """Takes its parts.

        Args:
            addresses: where Control's internal server is now; empty while it is away.
            take: called with each policy; may raise.
            channels: connects to Control.
            gateway: a gateway's name; Control then waits for it, and hears after each policy that it was taken.
            identity: of the deployment; another one's policy is refused. "" accepts all.
        """
        self._identity = identity
        self._gateway = gateway
        # Whether the connection to Control brought a policy.
        self._heard = False
        self._addresses = addresses
        self._take = take
        self._connections = channels
        self._version = 0
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begins to follow."""
        self._task = asyncio.create_task(self._follow())

    async def stop(self) -> None:
        """Ends."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _follow(self) -> None:
        pause = FIRST_PAUSE_S
        while True:
            self._heard = False
            for address in self._addresses():
                try:
                    await self._watch(address)
                except grpc.aio.AioRpcError as error:
                    logger.debug("Control does not answer: %s", error.code())
                except Exception:
                    logger.exception("a policy cannot be taken now; what was known before it stays")
            pause = FIRST_PAUSE_S if self._heard else min(2 * pause, LONGEST_PAUSE_S)
            await asyncio.sleep(pause)

    async def _watch(self, address: str) -> None:
        async with self._connections.asynchronous(address) as channel:
            stub = control_pb2_grpc.RolloutFeedStub(channel)
            # Without a Router's name, whose pins Control would ask for.
            request = control_pb2.WatchPolicyRequest(
                gateway=self._gateway, identity=self._identity, policy_version=self._version
            )
            async for policy in stub.WatchPolicy(request):
                check_identity(policy, self._identity, "Control")
                if policy.version > self._version:
                    await self._take(policy)
                    self._version = policy.version
                self._heard = True
                if self._gateway:
                    taken_up = control_pb2.TakenUpRequest(watcher=self._gateway, policy_version=self._version)
                    await stub.TakenUp(taken_up, timeout=TAKEN_UP_TIMEOUT_S)
