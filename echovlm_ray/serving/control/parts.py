"""The parts of Control and how they are connected; `echovlm_ray.serving.deploy.control_deployment` serves them."""

import asyncio
import logging
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from echovlm_ray.serving.cluster.endpoints import Endpoints
from echovlm_ray.serving.cluster.rollout_files import SQLITE, DatabaseLock, RolloutFiles
from echovlm_ray.serving.cluster.served import ServedCheckpoint, expert_exchange, served_checkpoint
from echovlm_ray.serving.cluster.settings import (
    DEPLOYMENTS,
    EXPERT_DEPLOYMENT,
    GATEWAY,
    ROUTER,
    ControlSettings,
    expert_application,
)
from echovlm_ray.serving.control.bundles import open_kept, open_registry
from echovlm_ray.serving.control.catalogue import Catalogue
from echovlm_ray.serving.control.feed import RolloutFeedService
from echovlm_ray.serving.control.fleet import GrpcFleet
from echovlm_ray.serving.control.policies import PolicyPublisher
from echovlm_ray.serving.control.take_up import TakeUp
from echovlm_ray.serving.control.verifier import SubprocessVerifier
from echovlm_ray.serving.control.watchers import WatcherKind, Watchers
from echovlm_ray.serving.gates.evaluator import GateEvaluator
from experts.registry.registry import Registry
from experts.transport.inner_channel import InnerChannels
from router.errors import RolloutDatabaseError
from router.rollouts.controller import RolloutController
from router.rollouts.database import Database
from router.rollouts.health import HealthMonitor
from router.rollouts.leases import Leases
from router.rollouts.store import RolloutStore

logger = logging.getLogger(__name__)

# What a Control before this one may take to end, beyond the grace time of its calls.
LOCK_EXTRA_S = 10.0
STARTER = "start"


@dataclass(frozen=True, slots=True)
class ControlParts:
    """What the services of Control work with.

    Attributes:
        store: the rollouts' database.
        files: where the database, the last policy and incoming bundles lie.
        endpoints: the replicas of the other applications.
        registry: where bundles are.
        catalogue: the bundles by organ and version.
        channels: connects to other parts.
        fleet: the expert replicas and Routers.
        verifier: checks bundles in a separate process.
        leases: bundles that replicas keep for replays.
        evaluator: evaluates gates; None where experts cannot be replaced.
        controller: drives rollouts; not started.
        policies: publishes the policy; started.
        feed: the service that Routers and gateways call.
        take_up: waits until all of them apply a policy.
    """

    store: RolloutStore
    files: RolloutFiles
    endpoints: Endpoints
    registry: Registry
    catalogue: Catalogue
    channels: InnerChannels
    fleet: GrpcFleet
    verifier: SubprocessVerifier
    leases: Leases
    evaluator: GateEvaluator | None
    controller: RolloutController
    policies: PolicyPublisher
    feed: RolloutFeedService
    take_up: TakeUp


async def control_parts(settings: ControlSettings, channels: InnerChannels, state: ExitStack) -> ControlParts:
    """Builds the parts, each before those that need it.

    Args:
        settings: of this Control.
        channels: connects to other parts.
        state: closes the database.

    Raises:
        RolloutDatabaseError: the database cannot be opened, or belongs to another deployment.
    """
    served = served_checkpoint(settings.model)
    remote = settings.experts_placement == "remote"
    files = RolloutFiles.of(settings.rollouts, served.directory)
    store = await asyncio.to_thread(_open_store, state, settings, served, files)
    organs = (await asyncio.to_thread(store.snapshot)).known_organs if remote else ()
    endpoints = Endpoints(DEPLOYMENTS | watched(organs), settings.system_id)
    endpoints.start()
    registry = open_registry(settings.experts, served.directory)
    catalogue = Catalogue(registry, open_kept(settings.experts, served.directory))
    watchers = Watchers()
    fleet = GrpcFleet(
        experts=lambda organ: endpoints.replicas(expert_application(organ)),
        routers=lambda: endpoints.replicas(ROUTER),
        watching=watchers.connected,
        manifest=catalogue.manifest,
        element_bytes=expert_exchange(settings.model).dtype.itemsize,
        channels=channels,
    )
    endpoints.on_change(lambda: fleet.keep_only(_reachable(endpoints)))
    verifier = SubprocessVerifier(
        settings.model,
        settings.experts,
        settings.rollouts,
        lambda: catalogue.manifest(store.snapshot().organs[0].stable_digest),
    )
    evaluator = await asyncio.to_thread(_evaluator, settings, served, endpoints, channels) if remote else None
    monitor, leases = HealthMonitor(), Leases()
    controller = RolloutController(store, fleet, verifier, settings.rollouts, monitor, leases, evaluator)
    policies = PolicyPublisher(store, catalogue.version, files.policy if remote else None)
    await policies.start()
    feed = RolloutFeedService(policies, watchers, store, monitor, controller.wake, leases.ready_set)
    take_up = TakeUp(policies, watchers, lambda: _running(endpoints), settings.rollouts.take_up_timeout_s)
    return ControlParts(
        store=store,
        files=files,
        endpoints=endpoints,
        registry=registry,
        catalogue=catalogue,
        channels=channels,
        fleet=fleet,
        verifier=verifier,
        leases=leases,
        evaluator=evaluator,
        controller=controller,
        policies=policies,
        feed=feed,
        take_up=take_up,
    )


def watched(organs: Iterable[str]) -> dict[str, str]:
    """Application → deployment of these organs' expert groups, as `Endpoints` takes them."""
    return {expert_application(organ): EXPERT_DEPLOYMENT for organ in organs}


def _open_store(
    state: ExitStack, settings: ControlSettings, served: ServedCheckpoint, files: RolloutFiles
) -> RolloutStore:
    """Opens the database, for this Control alone, and gives it a live set if it has none; `state` closes it."""
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


def _evaluator(
    settings: ControlSettings, served: ServedCheckpoint, endpoints: Endpoints, channels: InnerChannels
) -> GateEvaluator:
    return GateEvaluator(
        served,
        endpoints.source(ROUTER),
        channels,
        settings.rollouts,
        settings.gateway,
        settings.router,
        settings.model.default_organ,
    )


def _running(endpoints: Endpoints) -> Mapping[WatcherKind, int]:
    """How many parts run that must take up a policy."""
    return {"router": len(endpoints.of(ROUTER)), "gateway": len(endpoints.of(GATEWAY))}


def _reachable(endpoints: Endpoints) -> set[str]:
    return {replica.address for replicas in endpoints.all().values() for replica in replicas}
