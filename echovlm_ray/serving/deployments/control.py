"""Control as a Ray Serve deployment."""

import asyncio
import logging
import os
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from echovlm_ray.serving.deployments.replica import Part, Replica, Service
from echovlm_ray.serving.deployments.settings import (
    DEPLOYMENTS,
    EXPERT_DEPLOYMENT,
    EXPERT_PREFIX,
    GATEWAY,
    ROUTER,
    ControlSettings,
    expert_application,
)
from echovlm_ray.serving.endpoints import Endpoints
from echovlm_ray.serving.rollout_files import SQLITE, DatabaseLock, RolloutFiles
from echovlm_ray.serving.server import ServerOptions
from echovlm_ray.serving.system_id import SystemId
from protos import control_pb2, control_pb2_grpc, status_pb2_grpc

if TYPE_CHECKING:
    from ray.serve.schema import ApplicationStatusOverview

    from echovlm_ray.serving.control.catalogue import Catalogue
    from echovlm_ray.serving.control.database_watch import DatabaseWatch
    from echovlm_ray.serving.control.fleet import GrpcFleet
    from echovlm_ray.serving.control.organs import OrganApplications
    from echovlm_ray.serving.control.policies import PolicyPublisher
    from echovlm_ray.serving.control.status import ApplicationState
    from echovlm_ray.serving.control.verifier import SubprocessVerifier
    from echovlm_ray.serving.control.watchers import WatcherKind
    from echovlm_ray.serving.gates.evaluator import GateEvaluator
    from echovlm_ray.serving.served import ServedCheckpoint
    from experts.transport.inner_channel import InnerChannels
    from router.rollouts.controller import RolloutController
    from router.rollouts.store import RolloutStore

logger = logging.getLogger(__name__)

# A failed application's message holds a trace; its last line says what was wrong.
MAX_MESSAGE = 500
# The largest message is a manifest.
MAX_RECEIVE_BYTES = 8 * 1024 * 1024
MAX_RECEIVED_BYTES = 64 * MAX_RECEIVE_BYTES
# What a Control before this one may take to end, beyond the grace time of its calls.
LOCK_EXTRA_S = 10.0
STARTER = "start"


class ControlReplica(Replica):
    """Serves `echovlm.v1.ExpertControl` and `echovlm.v1.SystemStatus`, and to Routers `echovlm.v1.RolloutFeed`."""

    async def __init__(self, settings: dict[str, Any]) -> None:  # type: ignore[misc] # Serve awaits it
        """Takes the fields of `ControlSettings`."""

        from echovlm_ray.serving.bundles import open_kept, open_registry, signature_policy
        from echovlm_ray.serving.control import CONTROL_SERVICE, FEED_SERVICE, STATUS_SERVICE
        from echovlm_ray.serving.control.catalogue import Catalogue
        from echovlm_ray.serving.control.database_watch import DatabaseWatch
        from echovlm_ray.serving.control.feed import RolloutFeedService
        from echovlm_ray.serving.control.operation_threads import operation_threads
        from echovlm_ray.serving.control.policies import PolicyPublisher
        from echovlm_ray.serving.control.push import PushReceiver
        from echovlm_ray.serving.control.replay_check import ReplayCheck
        from echovlm_ray.serving.control.replays import Replays
        from echovlm_ray.serving.control.rollout_metrics import RolloutMetrics
        from echovlm_ray.serving.control.service import ExpertControlService
        from echovlm_ray.serving.control.state import StateReader, StateWatch
        from echovlm_ray.serving.control.status import SystemStatusService
        from echovlm_ray.serving.control.take_up import TakeUp
        from echovlm_ray.serving.control.watchers import Watchers
        from echovlm_ray.serving.served import served_checkpoint
        from router.rollouts.controller import RolloutController
        from router.rollouts.health import HealthMonitor
        from router.rollouts.leases import Leases
        from router.rollouts.operations import RolloutOperations

        parsed = ControlSettings.model_validate(settings)
        threads = operation_threads()
        # Before any other thread is started: on Linux it holds for this one and for those that it starts.
        os.nice(parsed.control.niceness)
        served = served_checkpoint(parsed.model)
        remote = parsed.experts_placement == "remote"
        files = RolloutFiles.of(parsed.rollouts, served.directory)
        state = ExitStack()
        store = await asyncio.to_thread(_open_store, state, parsed, served, files)

        organs = (await asyncio.to_thread(store.snapshot)).known_organs if remote else ()
        endpoints = Endpoints(DEPLOYMENTS | _watched(organs), parsed.system_id)
        endpoints.start()
        registry = open_registry(parsed.experts, served.directory)
        catalogue = Catalogue(registry, open_kept(parsed.experts, served.directory))
        monitor = HealthMonitor()
        channels = self._channels_of(parsed)
        watchers = Watchers()
        fleet = _fleet(parsed, endpoints, catalogue, watchers.connected, channels)
        endpoints.on_change(lambda: fleet.keep_only(_reachable(endpoints)))
        verifier = _verifier(parsed, store, catalogue)
        leases = Leases()
        evaluator = await asyncio.to_thread(_evaluator, parsed, served, endpoints, channels) if remote else None
        controller = RolloutController(store, fleet, verifier, parsed.rollouts, monitor, leases, evaluator)
        policies = PolicyPublisher(store, catalogue.version, files.policy if remote else None)
        await policies.start()
        feed = RolloutFeedService(policies, watchers, store, monitor, controller.wake, leases.ready_set)
        take_up = TakeUp(policies, watchers, lambda: _watchers(endpoints), parsed.rollouts.take_up_timeout_s)
        status_timeout_s = parsed.rollouts.status_timeout_s
        reader = StateReader(store, fleet, catalogue.version, status_timeout_s, controller, take_up.missing)
        watch = StateWatch(reader, store)
        metrics = RolloutMetrics(store, catalogue.version)
        pushes = PushReceiver(registry, files.incoming, parsed.rollouts.max_push_bytes)
        await asyncio.to_thread(pushes.clear)
        operations = None
        if remote:
            operations = RolloutOperations(store, fleet, parsed.rollouts, catalogue.version, evaluator)
        lost = DatabaseWatch(store.database, self._publish_control)
        notices = partial(_notices, lost, policies, fleet)
        check = ReplayCheck(registry, signature_policy(parsed.experts).admit, catalogue.version)
        replays = Replays(store, fleet, leases, controller, check, parsed.rollouts)
        service = ExpertControlService(
            store,
            operations,
            catalogue,
            pushes,
            reader,
            watch,
            take_up,
            parsed.model.default_organ,
            threads,
            notices,
            replays if remote else None,
        )
        status = SystemStatusService(
            lambda: _applications(store, policies, remote),
            endpoints.of,
            partial(_states, parsed.system_id),
            lambda: policies.current.stable.id,
            lambda: _problems(store, controller, catalogue),
            store.database.identity,
            notices,
            channels,
        )
        applications = _organ_applications(parsed, store, controller, endpoints)
        if remote:
            verifier.start()
            controller.start()
            applications.start()

        blocking: list[Callable[[], object]] = [threads.shutdown]
        if remote:
            blocking += [applications.stop, controller.stop, verifier.close]
        closing: list[Callable[[], object]] = [lost.stop, policies.stop, watch.stop, metrics.stop, replays.close]
        closing += [partial(asyncio.to_thread, stop) for stop in blocking]
        section = parsed.control
        part = Part(
            # Operators' calls come over the public server alone, which asks for their token.
            services=[Service(control_pb2_grpc.add_RolloutFeedServicer_to_server, feed, FEED_SERVICE)],
            queue_length=lambda: self._public.active_calls if self._public is not None else 0,
            healthy=lambda: not lost.must_restart,
            closing=[*closing, endpoints.stop, fleet.close, lambda: asyncio.to_thread(state.close)],
        )
        public = ServerOptions(
            section.host,
            section.port,
            section.tls,
            section.token_file,
            max_receive_bytes=MAX_RECEIVE_BYTES,
            max_received_bytes=MAX_RECEIVED_BYTES,
            idle_s=section.push_idle_s,
        )
        await self._start(
            parsed,
            part,
            public,
            [
                Service(control_pb2_grpc.add_ExpertControlServicer_to_server, service, CONTROL_SERVICE),
                Service(status_pb2_grpc.add_SystemStatusServicer_to_server, status, STATUS_SERVICE),
            ],
        )
        if remote:
            await lost.start()

    async def _publish_control(self, serving: bool) -> None:
        """The gateway asks for the health of the whole server, operators for that of the service."""
        from echovlm_ray.serving.control import CONTROL_SERVICE

        for service in ("", CONTROL_SERVICE):
            await self.publish_health(service, serving)


def _open_store(
    state: ExitStack, settings: ControlSettings, served: "ServedCheckpoint", files: RolloutFiles
) -> "RolloutStore":
    """Opens the database, for this Control alone, and gives it a live set if it has none; `state` closes it."""
    from router.errors import RolloutDatabaseError
    from router.rollouts.database import Database
    from router.rollouts.store import RolloutStore

    url = files.database
    if settings.experts_placement == "local":
        # Nothing can change, so nothing is to be kept.
        folder = Path(state.enter_context(tempfile.TemporaryDirectory(prefix="echovlm-control-")))
        url = f"{SQLITE}{folder / 'rollouts.db'}"
    else:
        lock = DatabaseLock(files.lock)
        lock.take(settings.serve.graceful_shutdown_timeout_s + LOCK_EXTRA_S)
        state.callback(lock.release)
    # `echoray serve` made it. Where it is missing or empty now, what it said is lost, and nothing may take its place.
    database = Database(url, create=settings.experts_placement == "local")
    state.callback(database.close)
    if settings.experts_placement == "local":
        database.take_identity(settings.identity)
    elif settings.identity not in ("", database.identity):
        raise RolloutDatabaseError(
            f"the rollouts' database {database.name} is of the deployment {database.identity[:12]}…, and this system "
            f"is {settings.identity[:12]}…: on every node rollouts.database must be the same database; to go on with "
            "this one, restart with `echoray serve --take-over`"
        )
    store = RolloutStore(database)
    if not store.adopt(served.expert_set, actor=STARTER) and store.snapshot().expert_set() != served.expert_set:
        logger.info("served is what the rollouts' database %s says, not what the checkpoint came with", database.name)
    return store


def _fleet(
    settings: ControlSettings,
    endpoints: Endpoints,
    catalogue: "Catalogue",
    watching: Callable[[], frozenset[str]],
    channels: "InnerChannels",
) -> "GrpcFleet":
    from echovlm_ray.serving.control.fleet import GrpcFleet
    from echovlm_ray.serving.served import expert_exchange

    return GrpcFleet(
        experts=lambda organ: endpoints.replicas(expert_application(organ)),
        routers=lambda: endpoints.replicas(ROUTER),
        watching=watching,
        manifest=catalogue.manifest,
        element_bytes=expert_exchange(settings.model).dtype.itemsize,
        channels=channels,
    )


def _verifier(settings: ControlSettings, store: "RolloutStore", catalogue: "Catalogue") -> "SubprocessVerifier":
    from echovlm_ray.serving.control.verifier import SubprocessVerifier

    return SubprocessVerifier(
        settings.model,
        settings.experts,
        settings.rollouts,
        lambda: catalogue.manifest(store.snapshot().organs[0].stable_digest),
    )


def _evaluator(
    settings: ControlSettings, served: "ServedCheckpoint", endpoints: Endpoints, channels: "InnerChannels"
) -> "GateEvaluator":
    from echovlm_ray.serving.gates.evaluator import GateEvaluator

    return GateEvaluator(
        served,
        endpoints.source(ROUTER),
        channels,
        settings.rollouts,
        settings.gateway,
        settings.router,
        settings.model.default_organ,
    )


def _organ_applications(
    settings: ControlSettings, store: "RolloutStore", controller: "RolloutController", endpoints: Endpoints
) -> "OrganApplications":
    from echovlm_ray.serving import serve_api
    from echovlm_ray.serving.control.organs import OrganApplications

    def deploy(organ: str) -> None:
        # Only here: it loads the other parts' deployments.
        from echovlm_ray.serving import applications

        applications.deploy(expert_application(organ), settings.expert_group(organ))

    return OrganApplications(
        store,
        lambda: controller.views,
        partial(_deployed_organs, settings.system_id),
        deploy,
        lambda organ: serve_api.delete_applications([settings.system_id.application(expert_application(organ))]),
        lambda organ: endpoints.watch(_watched([organ])),
    )


def _watched(organs: Any) -> dict[str, str]:
    return {expert_application(organ): EXPERT_DEPLOYMENT for organ in organs}


def _watchers(endpoints: Endpoints) -> "dict[WatcherKind, int]":
    """How many parts run that must take up a policy."""
    return {"router": len(endpoints.of(ROUTER)), "gateway": len(endpoints.of(GATEWAY))}


def _reachable(endpoints: Endpoints) -> set[str]:
    return {replica.address for replicas in endpoints.all().values() for replica in replicas}


def _applications(store: "RolloutStore", policies: "PolicyPublisher", remote: bool) -> list[str]:
    """Those that there should be, in the order in which status shows them."""
    from router.errors import RolloutDatabaseError

    if not remote:
        return list(DEPLOYMENTS)
    try:
        snapshot = store.snapshot()
        organs = [live.organ for live in snapshot.organs] + [rollout.organ for rollout in snapshot.in_flight]
    except RolloutDatabaseError:
        # What is served does not end with the database.
        current = policies.current
        organs = [member.organ for member in current.stable.members]
        organs += [candidate.organ for candidate in current.candidates]
    return [*DEPLOYMENTS, *map(expert_application, dict.fromkeys(organs))]


def _problems(
    store: "RolloutStore", controller: "RolloutController", catalogue: "Catalogue"
) -> "list[control_pb2.OrganProblem]":
    """What cannot be answered as it should be, as the controller saw it last."""
    from echovlm_ray.serving.control.messages import problem_to_proto
    from router.errors import RolloutDatabaseError
    from router.rollouts.answering import organ_problems

    try:
        snapshot = store.snapshot()
    except RolloutDatabaseError:
        # That it is lost is a notice of its own.
        return []
    found = organ_problems(snapshot, controller.views, controller.load_failures())
    return [problem_to_proto(problem, catalogue.version) for problem in found]


def _notices(lost: "DatabaseWatch", policies: "PolicyPublisher", fleet: "GrpcFleet") -> list[str]:
    """What an operator should know: that the database is gone, and that a Router applies something else."""
    notices = [lost.problem] if lost.problem else []
    applied, version = fleet.policies(), policies.current.version
    notices += [
        f"router {replica} applies policy {found or 'none'}, and the rollouts' database says policy {version}"
        for replica, found in sorted(applied.items())
        if found != version
    ]
    return notices


def _states(system: SystemId) -> "Mapping[str, ApplicationState]":
    """Part → what Serve says of it, of one system."""
    from ray import serve

    from echovlm_ray.serving.control.status import ApplicationState

    return {
        part: ApplicationState(overview.status.value, cause(overview))
        for name, overview in serve.status().applications.items()
        if (part := system.part(name)) is not None
    }


def _deployed_organs(system: SystemId) -> set[str]:
    return {
        name.removeprefix(EXPERT_PREFIX)
        for name, state in _states(system).items()
        if name.startswith(EXPERT_PREFIX) and state.status not in ("DELETING", "NOT_STARTED")
    }


def cause(overview: "ApplicationStatusOverview") -> str:
    """Why an application is not well: its deployment knows, and Serve's word for the application only names that."""
    told = [deployment.message for deployment in overview.deployments.values() if deployment.message]
    return brief(told[0] if told else overview.message)


def brief(message: str) -> str:
    """A message on one line; of a trace the last one, which has the exception's own words."""
    lines = [line.strip() for line in message.strip().splitlines() if line.strip()]
    traced = any(line.startswith(("Traceback", 'File "')) for line in lines)
    return (lines[-1] if traced else " ".join(lines))[:MAX_MESSAGE]
