"""What Routers hear of Control, and what they tell it."""

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Callable

import grpc

from echovlm_ray.errors import InvalidRequestError
from echovlm_ray.serving.control.policies import PolicyPublisher
from protos import control_pb2, control_pb2_grpc
from router.errors import UnknownRolloutError
from router.rollouts.health import HealthMonitor, Observation
from router.rollouts.latency import LatencyHistogram
from router.rollouts.shadow import ShadowRecord
from router.rollouts.store import RolloutStore

logger = logging.getLogger(__name__)

MAX_OBSERVATIONS = 10_000


class RolloutFeedService(control_pb2_grpc.RolloutFeedServicer):
    """Serves `echovlm.v1.RolloutFeed` to the system's own Routers."""

    def __init__(
        self, policies: PolicyPublisher, store: RolloutStore, monitor: HealthMonitor, wake: Callable[[], None]
    ) -> None:
        """Takes its parts.

        Args:
            policies: what is told.
            store: keeps what shadows said.
            monitor: judges versions by what Routers saw of them.
            wake: called after every report, for it may end a candidate.
        """
        self._policies = policies
        self._store = store
        self._monitor = monitor
        self._wake = wake
        self._routers: Counter[str] = Counter()

    def watching(self) -> frozenset[str]:
        """The Routers that are connected now; from any thread."""
        return frozenset(name for name, count in list(self._routers.items()) if count)

    async def WatchPolicy(
        self, request: control_pb2.WatchPolicyRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[control_pb2.TrafficPolicy]:
        """The policy now, and again whenever it changes. Only a Router gives its name; others just ask."""
        await asyncio.to_thread(self._policies.outrun, request.identity, request.policy_version, request.policy_digest)
        self._routers[request.router] += 1
        try:
            async for policy in self._policies.watch():
                yield policy
        finally:
            self._routers[request.router] -= 1
            if not self._routers[request.router]:
                del self._routers[request.router]

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
