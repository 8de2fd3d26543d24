"""What Routers hear of Control, and what they tell it."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Literal

import grpc

from echovlm_ray.errors import InvalidRequestError
from echovlm_ray.serving.control.changes import Changes
from echovlm_ray.serving.control.messages import expert_set_to_proto
from echovlm_ray.serving.control.policies import PolicyPublisher
from protos import control_pb2, control_pb2_grpc
from router.errors import UnknownExpertSetError, UnknownRolloutError
from router.expert_set import ExpertSet
from router.rollouts.health import HealthMonitor, Observation
from router.rollouts.latency import LatencyHistogram
from router.rollouts.shadow import ShadowRecord
from router.rollouts.store import RolloutStore

logger = logging.getLogger(__name__)

MAX_OBSERVATIONS = 10_000

WatcherKind = Literal["router", "gateway"]


@dataclass(slots=True)
class _Watcher:
    """A process that watches the policy.

    Attributes:
        streams: how many of its calls are open: two for a moment when it connects anew.
        policy_version: of the policy in force in it; 0 before it has said so.
    """

    kind: WatcherKind
    streams: int = 0
    policy_version: int = 0


class RolloutFeedService(control_pb2_grpc.RolloutFeedServicer):
    """Serves `echovlm.v1.RolloutFeed` to the system's own Routers and gateways. Made on the event loop that serves.

    Attributes:
        taken_up: wakes what waits for watchers to come, to go, or to take up a policy.
    """

    def __init__(
        self,
        policies: PolicyPublisher,
        store: RolloutStore,
        monitor: HealthMonitor,
        wake: Callable[[], None],
        replayed: Callable[[str], ExpertSet | None] = lambda expert_set_id: None,
    ) -> None:
        """Takes its parts.

        Args:
            policies: what is told.
            store: keeps what shadows said.
            monitor: judges versions by what Routers saw of them.
            wake: called after every report, for it may end a candidate.
            replayed: id → the expert set, while it is held for a replay.
        """
        self._policies = policies
        self._store = store
        self._monitor = monitor
        self._wake = wake
        self._replayed = replayed
        self._watchers: dict[str, _Watcher] = {}
        self.taken_up = Changes()

    def watching(self, kind: WatcherKind = "router") -> frozenset[str]:
        """The Routers, or gateways, that are connected now; from any thread."""
        return frozenset(name for name, watcher in list(self._watchers.items()) if watcher.kind == kind)

    def behind(self, policy_version: int) -> tuple[str, ...]:
        """The names of those connected in which another policy is in force than this one; from any thread."""
        watchers = list(self._watchers.items())
        return tuple(sorted(name for name, watcher in watchers if watcher.policy_version != policy_version))

    async def WatchPolicy(
        self, request: control_pb2.WatchPolicyRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[control_pb2.TrafficPolicy]:
        """The policy now, and again whenever it changes. Routers and gateways give their name; others just ask."""
        await asyncio.to_thread(self._policies.outrun, request.identity, request.policy_version, request.policy_digest)
        kind: WatcherKind = "router" if request.router else "gateway"
        name = request.router or request.gateway
        watcher = self._watchers.setdefault(name, _Watcher(kind)) if name else _Watcher(kind)
        watcher.streams += 1
        self.taken_up.announce()
        try:
            async for policy in self._policies.watch():
                yield policy
        finally:
            watcher.streams -= 1
            if not watcher.streams:
                self._watchers.pop(name, None)
            self.taken_up.announce()

    async def TakenUp(
        self, request: control_pb2.TakenUpRequest, context: grpc.aio.ServicerContext
    ) -> control_pb2.TakenUpResponse:
        """Takes note of the policy in force in a watcher. One that is no longer connected says it again when it is."""
        if (watcher := self._watchers.get(request.watcher)) is not None:
            watcher.policy_version = request.policy_version
            self.taken_up.announce()
        return control_pb2.TakenUpResponse()

    async def Report(
        self, request: control_pb2.ReportRequest, context: grpc.aio.ServicerContext
    ) -> control_pb2.ReportResponse:
        """Takes note of what a Router saw."""
        if len(request.observations) + len(request.shadows) > MAX_OBSERVATIONS:
            raise InvalidRequestError("observations", f"has more than {MAX_OBSERVATIONS} entries, shadows included")
        for observation in request.observations:
            self._monitor.record(_observation(observation))
        if request.shadows:
            await asyncio.to_thread(self._record_shadows, list(request.shadows))
        self._wake()
        return control_pb2.ReportResponse()

    async def Replayed(
        self, request: control_pb2.ReplayedRequest, context: grpc.aio.ServicerContext
    ) -> control_pb2.ReplayedResponse:
        """What a set consists of that a request named and that is not in the policy, while it is held."""
        expert_set = self._replayed(request.expert_set_id)
        if expert_set is None:
            raise UnknownExpertSetError(request.expert_set_id)
        return control_pb2.ReplayedResponse(expert_set=expert_set_to_proto(expert_set))

    def _record_shadows(self, shadows: list[control_pb2.ShadowObservation]) -> None:
        records: dict[str, list[ShadowRecord]] = {}
        for shadow in shadows:
            records.setdefault(shadow.rollout_id, []).append(
                ShadowRecord(
                    shadow.tokens,
                    shadow.shared_tokens,
                    shadow.first_divergence if shadow.HasField("first_divergence") else None,
                    shadow.latency_ratio if shadow.HasField("latency_ratio") and shadow.latency_ratio > 0 else None,
                )
            )
        for rollout_id, of_rollout in records.items():
            try:
                self._store.record_shadow(rollout_id, of_rollout)
            except UnknownRolloutError as error:
                # Of another database: the Router would send it again for ever.
                logger.warning("what a shadow said is thrown away: %s", error)


def _observation(message: control_pb2.Observation) -> Observation:
    return Observation(
        message.organ,
        message.digest,
        message.requests,
        message.errors,
        message.nonfinite,
        LatencyHistogram.of(message.seconds_per_token),
    )
