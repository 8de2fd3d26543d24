"""A router's client of Control's `RolloutFeed`: receives policies and reports outcomes, in the background.

While Control is unavailable, the router keeps its last policy and buffers outcomes.
"""

import asyncio
import contextlib
import logging
import uuid
from collections.abc import Callable, Sequence

import grpc

from echovlm_ray.errors import PartUnavailableError
from echovlm_ray.serving.cluster.policy_follower import ControlAwayError, PolicyFollower
from echovlm_ray.serving.lm.outcomes import Outcomes, report_of
from echovlm_ray.serving.lm.pinning import ExpertSets
from experts.transport.inner_channel import PLAIN_CHANNELS, InnerChannels
from protos import control_pb2
from router.gating.expert_set import ExpertSet
from router.rollouts.traffic import TrafficPolicy

logger = logging.getLogger(__name__)

REPORT_PERIOD_S = 1.0
REPORT_TIMEOUT_S = 5.0
# What is left to report when the router stops gets one try.
LAST_REPORT_S = 1.0


class RolloutFeedClient:
    """Follows Control for a router's expert sets, and reports outcomes. Belongs to one event loop."""

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
        # Never reused by another process, because Control attributes acknowledgements to it.
        self.name = f"router-{uuid.uuid4().hex}"
        self._expert_sets = expert_sets
        self._outcomes = outcomes
        self._report_period_s = report_period_s
        self._follower = PolicyFollower(addresses, self._take, channels, watcher=self._watcher, arrived=self._announce)

    @property
    def problem(self) -> str:
        """Why the newest policy is not in force, for operators; "" if it is."""
        return self._follower.problem

    async def start(
        self,
        wait_s: float = 0.0,
        last_known: Callable[[], control_pb2.TrafficPolicy | None] = lambda: None,
    ) -> None:
        """Begins, and waits for the first policy to be in force.

        Args:
            wait_s: the longest to wait; Control may be away.
            last_known: Control's earlier policy, applied if Control does not answer in that time; may block.
        """
        await self._follower.start(self._report)
        if not wait_s or await self._follower.in_force(wait_s):
            return
        if (policy := await asyncio.to_thread(last_known)) is not None:
            logger.warning("Control does not answer; taken up is policy %d, the last one that it left", policy.version)
            self._follower.offer(policy)
            await self._follower.in_force(wait_s)

    async def stop(self) -> None:
        """Ends; what is left to report is sent if Control is there."""
        await self._follower.stop()
        with contextlib.suppress(Exception):
            async with asyncio.timeout(LAST_REPORT_S):
                await self._send_reports()
        await self._follower.close()

    async def replayed(self, expert_set_id: str) -> ExpertSet | None:
        """A set that is not in the policy, if it is resident for a replay.

        Raises:
            PartUnavailableError: Control does not answer.
        """
        try:
            stub = await self._follower.stub()
            request = control_pb2.ReplayedRequest(expert_set_id=expert_set_id)
            answer = await stub.Replayed(request, timeout=REPORT_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            if error.code() in (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.UNIMPLEMENTED):
                return None
            raise PartUnavailableError("Control", "it does not answer") from None
        except ControlAwayError:
            raise PartUnavailableError("Control", "it does not run now") from None
        return _set_from_proto(answer.expert_set)

    def _watcher(self) -> control_pb2.WatchPolicyRequest:
        applied = self._expert_sets.policy
        digest = applied.content_digest if applied.version else ""
        return control_pb2.WatchPolicyRequest(router=self.name, identity=applied.identity, policy_digest=digest)

    def _announce(self, policy: control_pb2.TrafficPolicy) -> None:
        self._expert_sets.announce(policy_from_proto(policy))

    async def _take(self, message: control_pb2.TrafficPolicy) -> None:
        policy = policy_from_proto(message)
        if await self._expert_sets.take_up(policy):
            logger.info("policy %d is in force, expert set %s", policy.version, policy.stable.id[:12])

    async def _report(self) -> None:
        await asyncio.sleep(self._report_period_s)
        await self._send_reports()

    async def _send_reports(self) -> None:
        while len(self._outcomes):
            runs, shadows = self._outcomes.take()
            reported = False
            try:
                stub = await self._follower.stub()
                await stub.Report(report_of(self.name, runs, shadows), timeout=REPORT_TIMEOUT_S)
                reported = True
            finally:
                if not reported:
                    self._outcomes.give_back(runs, shadows)


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
