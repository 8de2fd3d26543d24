"""The service for Routers and gateways: sends policies and receives observations."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable

import grpc

from echovlm_ray.errors import InvalidRequestError
from echovlm_ray.serving.control.messages import expert_set_to_proto
from echovlm_ray.serving.control.policies import PolicyPublisher
from echovlm_ray.serving.control.watchers import WatcherKind, Watchers
from protos import control_pb2, control_pb2_grpc
from router.errors import UnknownExpertSetError, UnknownRolloutError
from router.gating.expert_set import ExpertSet
from router.rollouts.health import HealthMonitor, Observation
from router.rollouts.latency import LatencyHistogram
from router.rollouts.shadow import ShadowRecord
from router.rollouts.store import RolloutStore

logger = logging.getLogger(__name__)

MAX_OBSERVATIONS = 10_000


class RolloutFeedService(control_pb2_grpc.RolloutFeedServicer):
    """Serves `echovlm.v1.RolloutFeed` to the system's own Routers and gateways."""

    def __init__(
        self,
        policies: PolicyPublisher,
        watchers: Watchers,
        store: RolloutStore,
        monitor: HealthMonitor,
        wake: Callable[[], None],
        replayed: Callable[[str], ExpertSet | None] = lambda expert_set_id: None,
    ) -> None:
        """
        Args:
            policies: the source of policies.
            watchers: records which of them are connected.
            store: stores the comparisons of shadows.
            monitor: collects the Routers' observations.
            wake: called after every report, because it may fail a candidate.
            replayed: id → the expert set of a running replay.
        """
        self._policies = policies
        self._store = store
        self._monitor = monitor
        self._wake = wake
        self._replayed = replayed
        self._watchers = watchers

    async def WatchPolicy(
        self, request: control_pb2.WatchPolicyRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[control_pb2.TrafficPolicy]:
        """Streams the policy now and after every change. Routers and gateways send their name; others need none."""
        await asyncio.to_thread(self._policies.outrun, request.identity, request.policy_version, request.policy_digest)
        kind: WatcherKind = "router" if request.router else "gateway"
        with self._watchers.watching(kind, request.router or request.gateway):
            async for policy in self._policies.watch():
                yield policy

    async def TakenUp(
        self, request: control_pb2.TakenUpRequest, context: grpc.aio.ServicerContext
    ) -> control_pb2.TakenUpResponse:
        """Records the policy that a watcher applies; see `Watchers.acknowledge`."""
        self._watchers.acknowledge(request.watcher, request.policy_version)
        return control_pb2.TakenUpResponse()

    async def Report(
        self, request: control_pb2.ReportRequest, context: grpc.aio.ServicerContext
    ) -> control_pb2.ReportResponse:
        """Records a Router's observations."""
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
        """Returns an expert set of a running replay, which is not in the policy."""
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
                # A rollout of another database. Without an error the Router would not stop sending it.
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
