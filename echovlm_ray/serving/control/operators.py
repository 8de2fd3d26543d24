"""Builds the service for operators."""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

from echovlm_ray.serving.cluster.settings import ControlSettings
from echovlm_ray.serving.control.bundles import signature_policy
from echovlm_ray.serving.control.parts import ControlParts
from echovlm_ray.serving.control.push import PushReceiver
from echovlm_ray.serving.control.replay_check import ReplayCheck
from echovlm_ray.serving.control.replays import Replays
from echovlm_ray.serving.control.rollout_metrics import RolloutMetrics
from echovlm_ray.serving.control.service import ExpertControlService
from echovlm_ray.serving.control.state import StateReader, StateWatch
from router.rollouts.operations import RolloutOperations


@dataclass(frozen=True, slots=True)
class OperatorService:
    """`echovlm.v1.ExpertControl`, and what ends it: called first to last after the servers have stopped."""

    service: ExpertControlService
    closing: Sequence[Callable[[], object]]


async def operator_service(
    settings: ControlSettings, parts: ControlParts, threads: Executor, notices: Callable[[], Sequence[str]]
) -> OperatorService:
    """Builds the service on the event loop that serves it, and deletes what unfinished pushes left behind.

    Args:
        settings: of this Control.
        parts: what it works with.
        threads: where operations are made.
        notices: what an operator should know beside the state; may block.
    """
    remote = settings.experts_placement == "remote"
    store, version_of = parts.store, parts.catalogue.version
    reader = StateReader(
        store,
        parts.fleet,
        version_of,
        settings.rollouts.status_timeout_s,
        parts.controller,
        parts.take_up.missing,
    )
    watch, metrics = StateWatch(reader, store), RolloutMetrics(store, version_of)
    operations = None
    if remote:
        operations = RolloutOperations(store, parts.fleet, settings.rollouts, version_of, parts.evaluator)
    check = ReplayCheck(parts.registry, signature_policy(settings.experts).admit, version_of)
    replays = Replays(store, parts.fleet, parts.leases, parts.controller, check, settings.rollouts)
    pushes = PushReceiver(parts.registry, parts.files.incoming, settings.rollouts.max_push_bytes)
    await asyncio.to_thread(pushes.clear)
    service = ExpertControlService(
        store,
        operations,
        parts.catalogue,
        pushes,
        reader,
        watch,
        parts.take_up,
        settings.model.default_organ,
        threads,
        notices,
        replays if remote else None,
    )
    return OperatorService(service, [watch.stop, metrics.stop, replays.close])
