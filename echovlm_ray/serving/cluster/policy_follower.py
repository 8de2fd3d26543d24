"""Follows Control's policy in the background, and acknowledges the one that is applied.

While Control is unavailable, the last policy stays applied.
"""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any

import grpc

from echovlm_ray.serving.cluster.known_policy import check_identity
from experts.transport.inner_channel import PLAIN_CHANNELS, InnerChannels
from protos import control_pb2, control_pb2_grpc

logger = logging.getLogger(__name__)

FIRST_PAUSE_S = 0.1
LONGEST_PAUSE_S = 3.0
TAKEN_UP_TIMEOUT_S = 5.0


class UnusablePolicyError(ValueError):
    """A policy cannot be applied here, and a retry would not help."""


class ControlAwayError(ConnectionError):
    """Control is unavailable."""


def _ignore(policy: control_pb2.TrafficPolicy) -> None:
    return


class PolicyFollower:
    """Watches Control at its current address, and applies its newest policy. For one event loop.

    Policies are applied one at a time. A failed one is retried until a newer one arrives.

    Attributes:
        version: of the policy in force; 0 before the first.
        problem: why the newest policy is not in force, for operators; "" if it is.
    """

    def __init__(
        self,
        addresses: Callable[[], Sequence[str]],
        take: Callable[[control_pb2.TrafficPolicy], Awaitable[None]],
        channels: InnerChannels = PLAIN_CHANNELS,
        *,
        watcher: Callable[[], control_pb2.WatchPolicyRequest] = control_pb2.WatchPolicyRequest,
        arrived: Callable[[control_pb2.TrafficPolicy], None] = _ignore,
    ) -> None:
        """Takes its parts.

        Args:
            addresses: where Control's internal server is now; empty while it is away.
            take: puts a policy in force; raises `UnusablePolicyError` where a later try would not help, or anything
                else where it may.
            channels: connects to Control.
            watcher: says who follows, at every connection: with a name Control waits for it and hears which policy is
                in force; a policy of another deployment than `identity` is refused. The version is filled in here.
            arrived: called immediately with every newer policy; raises `ValueError` for an invalid one.
        """
        self._addresses = addresses
        self._take = take
        self._connections = channels
        self._watcher = watcher
        self._on_arrival = arrived
        self._channel: grpc.aio.Channel | None = None
        self._address = ""
        self._wanted: control_pb2.TrafficPolicy | None = None
        self._arrived = asyncio.Event()
        self._taken_up = asyncio.Event()
        # Control has not heard yet which policy is in force.
        self._unsaid = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self.version = 0
        self.problem = ""

    async def start(self, *further: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Begins to follow, and to take `further` steps again and again, each as `stub` may fail."""
        steps = (self._watch, self._take_next, self._say_taken_up, *further)
        self._tasks = [asyncio.create_task(self._for_ever(step)) for step in steps]

    async def stop(self) -> None:
        """Ends following; `stub` still connects, until `close`."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def close(self) -> None:
        """Ends following and closes the channel."""
        await self.stop()
        if self._channel is not None:
            await self._channel.close()

    async def in_force(self, wait_s: float) -> bool:
        """Waits until a policy was taken up; whether one was."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait_s):
                await self._taken_up.wait()
        return self._taken_up.is_set()

    async def stub(self) -> control_pb2_grpc.RolloutFeedStub:
        """Calls Control where it is now.

        Raises:
            ControlAwayError: it does not run now.
        """
        addresses = self._addresses()
        if not addresses:
            raise ControlAwayError
        if self._address not in addresses or self._channel is None:
            self._address = addresses[0]
            # Exchanged first: another task may come here while the old one closes.
            old, self._channel = self._channel, self._connections.asynchronous(self._address)
            if old is not None:
                await old.close()
        return control_pb2_grpc.RolloutFeedStub(self._channel)

    def offer(self, policy: control_pb2.TrafficPolicy) -> None:
        """Has a policy taken up soon, if it is newer than those before it."""
        newest = self.version if self._wanted is None else max(self.version, self._wanted.version)
        if policy.version < newest or policy.version == self.version:
            logger.debug("policy %d comes after policy %d", policy.version, newest)
            return
        try:
            check_identity(policy, self._watcher().identity, "Control")
            self._on_arrival(policy)
        except ValueError as error:
            logger.error("policy %d is refused, and policy %d stays: %s", policy.version, self.version, error)
            return
        self._wanted = policy
        self._arrived.set()

    async def _for_ever(self, step: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Takes a step again and again; after one that raised soon, with a pause that grows from time to time."""
        loop = asyncio.get_running_loop()
        pause = FIRST_PAUSE_S
        while True:
            began = loop.time()
            try:
                await step()
                pause = FIRST_PAUSE_S
            except Exception as error:
                if loop.time() - began > LONGEST_PAUSE_S:
                    pause = FIRST_PAUSE_S
                if not isinstance(error, grpc.aio.AioRpcError | ControlAwayError):
                    logger.exception("following Control failed")
                elif pause == FIRST_PAUSE_S:
                    logger.info("Control does not answer; policy %d stays in force", self.version)
                await asyncio.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE_S)

    async def _watch(self) -> None:
        stub = await self.stub()
        request = self._watcher()
        request.policy_version = self.version
        call = stub.WatchPolicy(request)
        try:
            async for policy in call:
                self.offer(policy)
                # Also of one that is in force already: another Control has not heard of it.
                self._unsaid.set()
        except asyncio.CancelledError:
            # The stream's channel was closed, because Control has moved to another endpoint.
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
        finally:
            call.cancel()
        # However it ended: the next Control may not be there yet.
        raise ControlAwayError

    async def _take_next(self) -> None:
        await self._arrived.wait()
        self._arrived.clear()
        pause = FIRST_PAUSE_S
        while (policy := self._wanted) is not None and policy.version > self.version:
            try:
                await self._take(policy)
                self.version = policy.version
                self.problem = ""
                self._taken_up.set()
                self._unsaid.set()
                return
            except UnusablePolicyError as error:
                self.problem = f"policy {policy.version} is refused, and policy {self.version} stays: {error}"
                logger.error("%s", self.problem)
                return
            except Exception as error:
                self.problem = (
                    f"policy {policy.version} cannot be taken up yet, and policy {self.version} stays: {error}"
                )
                logger.warning("%s", self.problem)
            # A newer policy need not wait for this one.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._arrived.wait()
            self._arrived.clear()
            pause = min(2 * pause, LONGEST_PAUSE_S)

    async def _say_taken_up(self) -> None:
        await self._unsaid.wait()
        self._unsaid.clear()
        watcher = self._watcher()
        if not (name := watcher.router or watcher.gateway):
            return
        said = False
        try:
            stub = await self.stub()
            request = control_pb2.TakenUpRequest(watcher=name, policy_version=self.version)
            await stub.TakenUp(request, timeout=TAKEN_UP_TIMEOUT_S)
            said = True
        finally:
            if not said:
                self._unsaid.set()
