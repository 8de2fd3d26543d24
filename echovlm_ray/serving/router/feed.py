"""A router's side of Control's `RolloutFeed`: policies come, outcomes go. Nothing waits for it.

While Control is away the router goes on with what it last knew, and keeps its outcomes.
"""

import asyncio
import contextlib
import logging
import uuid
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import grpc
from pydantic import ValidationError

from echovlm_ray.errors import PartUnavailableError
from echovlm_ray.serving.known_policy import ForeignPolicyError, check_identity
from echovlm_ray.serving.policy_follower import TAKEN_UP_TIMEOUT_S
from echovlm_ray.serving.router.outcomes import Outcomes, report_of
from echovlm_ray.serving.router.pinning import ExpertSets, UnusablePolicyError
from experts.transport.inner_channel import PLAIN_CHANNELS, InnerChannels
from protos import control_pb2, control_pb2_grpc
from router.expert_set import ExpertSet
from router.rollouts.traffic import TrafficPolicy

logger = logging.getLogger(__name__)

FIRST_PAUSE_S = 0.1
LONGEST_PAUSE_S = 3.0
REPORT_PERIOD_S = 1.0
REPORT_TIMEOUT_S = 5.0
# What is left to report when the router stops gets one try.
LAST_REPORT_S = 1.0


class RolloutFeedClient:
    """Watches Control wherever it is now, has its policies taken up, and reports. Belongs to one event loop."""

    def __init__(
        self,
        addresses: Callable[[], Sequence[str]],
        expert_sets: ExpertSets,
        outcomes: Outcomes,
        channels: InnerChannels = PLAIN_CHANNELS,
        report_period_s: float = REPORT_PERIOD_S,
    ) -> None:
        """Takes its parts.

        Args:
            addresses: where Control's internal server is now; empty while it is away.
            expert_sets: takes the policies up.
            outcomes: what is reported.
            channels: connects to Control.
            report_period_s: seconds between reports.
        """
        # Never used again by another process, as Control may hold against it what this one did.
        self.name = f"router-{uuid.uuid4().hex}"
        self._addresses = addresses
        self._expert_sets = expert_sets
        self._outcomes = outcomes
        self._connections = channels
        self._report_period_s = report_period_s
        self._channel: grpc.aio.Channel | None = None
        self._address = ""
        self._wanted: TrafficPolicy | None = None
        self._arrived = asyncio.Event()
        self._taken_up = asyncio.Event()
        # Control has not heard yet which policy is in force.
        self._unsaid = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        # Why the newest policy is not in force, for operators; "" if it is.
        self.problem = ""

    async def start(
        self,
        wait_s: float = 0.0,
        last_known: Callable[[], control_pb2.TrafficPolicy | None] = lambda: None,
    ) -> None:
        """Begins, and waits for the first policy to be in force.

        Args:
            wait_s: the longest to wait; Control may be away.
            last_known: what Control said before, taken up when it says nothing in that time; may block.
        """
        self._tasks = [
            asyncio.create_task(self._for_ever(step))
            for step in (self._watch, self._take_up_next, self._say_taken_up, self._report)
        ]
        if not wait_s or await self._in_force(wait_s):
            return
        if (message := await asyncio.to_thread(last_known)) is not None:
            logger.warning("Control does not answer; taken up is policy %d, the last one that it left", message.version)
            self._offer(message)
            await self._in_force(wait_s)

    async def _in_force(self, wait_s: float) -> bool:
        """Waits until a policy was taken up; whether one was."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait_s):
                await self._taken_up.wait()
        return self._taken_up.is_set()

    async def stop(self) -> None:
        """Ends; what is left to report is sent if Control is there."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        with contextlib.suppress(Exception):
            async with asyncio.timeout(LAST_REPORT_S):
                await self._send_reports()
        if self._channel is not None:
            await self._channel.close()

    async def replayed(self, expert_set_id: str) -> ExpertSet | None:
        """A set that is not in the policy, if Control has replicas hold it for a replay.

        Raises:
            PartUnavailableError: Control does not answer, and only it knows.
        """
        try:
            stub = await self._stub()
            request = control_pb2.ReplayedRequest(expert_set_id=expert_set_id)
            answer = await stub.Replayed(request, timeout=REPORT_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            if error.code() in (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.UNIMPLEMENTED):
                return None
            raise PartUnavailableError("Control", "it does not answer") from None
        except _ControlAwayError:
            raise PartUnavailableError("Control", "it does not run now") from None
        return _set_from_proto(answer.expert_set)

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
                if not isinstance(error, grpc.aio.AioRpcError | _ControlAwayError):
                    logger.exception("the rollout feed failed")
                elif pause == FIRST_PAUSE_S:
                    logger.info("Control does not answer; the router goes on with policy %d", self._version)
                await asyncio.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE_S)

    @property
    def _version(self) -> int:
        return self._expert_sets.policy.version

    async def _stub(self) -> control_pb2_grpc.RolloutFeedStub:
        addresses = self._addresses()
        if not addresses:
            raise _ControlAwayError
        if self._address not in addresses or self._channel is None:
            self._address = addresses[0]
            # Exchanged first: another task may come here while the old one closes.
            old, self._channel = self._channel, self._connections.asynchronous(self._address)
            if old is not None:
                await old.close()
        return control_pb2_grpc.RolloutFeedStub(self._channel)

    async def _watch(self) -> None:
        stub = await self._stub()
        applied = self._expert_sets.policy
        call = stub.WatchPolicy(
            control_pb2.WatchPolicyRequest(
                router=self.name,
                identity=applied.identity,
                policy_version=applied.version,
                policy_digest=applied.content_digest if applied.version else "",
            )
        )
        try:
            async for message in call:
                self._offer(message)
                # Also of one that is in force already: another Control has not heard of it.
                self._unsaid.set()
        except asyncio.CancelledError:
            # So a stream ends whose channel was closed, because Control is elsewhere now.
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
        finally:
            call.cancel()
        # However it ended: the next Control may not be there yet.
        raise _ControlAwayError

    def _offer(self, message: control_pb2.TrafficPolicy) -> None:
        try:
            policy = policy_from_proto(message)
        except (ValidationError, ValueError):
            logger.exception("policy %d of Control makes no sense; policy %d stays", message.version, self._version)
            return
        try:
            check_identity(message, self._expert_sets.policy.identity, "Control")
        except ForeignPolicyError as error:
            logger.error("policy %d is refused, and policy %d stays: %s", policy.version, self._version, error)
            return
        if policy.version <= self._version or (self._wanted is not None and policy.version < self._wanted.version):
            logger.debug("policy %d comes after policy %d was taken up", policy.version, self._version)
            return
        self._wanted = policy
        self._expert_sets.announce(policy)
        self._arrived.set()

    async def _take_up_next(self) -> None:
        await self._arrived.wait()
        self._arrived.clear()
        pause = FIRST_PAUSE_S
        while (policy := self._wanted) is not None and policy.version > self._version:
            try:
                if await self._expert_sets.take_up(policy):
                    logger.info("policy %d is in force, expert set %s", policy.version, policy.stable.id[:12])
                self.problem = ""
                self._taken_up.set()
                self._unsaid.set()
                return
            except UnusablePolicyError as error:
                self.problem = f"policy {policy.version} is refused, and policy {self._version} stays: {error}"
                logger.error("%s", self.problem)
                return
            except Exception as error:
                self.problem = (
                    f"policy {policy.version} cannot be taken up yet, and policy {self._version} stays: {error}"
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
        said = False
        try:
            stub = await self._stub()
            request = control_pb2.TakenUpRequest(watcher=self.name, policy_version=self._version)
            await stub.TakenUp(request, timeout=TAKEN_UP_TIMEOUT_S)
            said = True
        finally:
            if not said:
                self._unsaid.set()

    async def _report(self) -> None:
        await asyncio.sleep(self._report_period_s)
        await self._send_reports()

    async def _send_reports(self) -> None:
        while len(self._outcomes):
            runs, shadows = self._outcomes.take()
            reported = False
            try:
                stub = await self._stub()
                await stub.Report(report_of(self.name, runs, shadows), timeout=REPORT_TIMEOUT_S)
                reported = True
            finally:
                if not reported:
                    self._outcomes.give_back(runs, shadows)


class _ControlAwayError(ConnectionError):
    """Control is not to be reached now."""


def policy_from_proto(message: control_pb2.TrafficPolicy) -> TrafficPolicy:
    """The policy of a message.

    Raises:
        ValueError: it is none, or its set is not the one that its id names.
    """
    stable = _set_from_proto(message.stable)
    candidates = [
        {
            "organ": candidate.organ,
            "digest": candidate.digest,
            "rollout_id": candidate.rollout_id,
            "mode": candidate.mode,
            "percent": candidate.percent,
        }
        for candidate in message.candidates
    ]
    return TrafficPolicy.model_validate(
        {"version": message.version, "stable": stable, "candidates": candidates, "identity": message.identity}
    )


def _set_from_proto(message: control_pb2.ExpertSet) -> ExpertSet:
    members = [{"organ": member.organ, "bundle_digest": member.bundle_digest} for member in message.members]
    expert_set = ExpertSet.model_validate(
        {"backbone_digest": message.backbone_digest, "routing": message.routing, "members": members}
    )
    if message.id and message.id != expert_set.id:
        raise ValueError(f"the expert set {message.id} has the contents of {expert_set.id}")
    return expert_set
