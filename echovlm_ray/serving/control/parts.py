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
from echovlm_ray.serving.control.policy_propagation import PolicyPropagation
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

# How long an earlier Control may take to end, in addition to the grace time of its calls.
LOCK_EXTRA_S = 10.0
STARTER = "start"


@dataclass(frozen=True, slots=True)
class ControlParts:
    """The parts of Control.

    Attributes:
        store: the rollouts' database.
        files: the paths of the database, the last policy and incoming bundles.
        endpoints: the replicas of the other applications.
        registry: the registry of bundles.
        catalogue: the bundles by organ and version.
        channels: opens channels to other parts.
        fleet: the expert replicas and Routers.
        verifier: checks bundles in a separate process.
        leases: bundles that replicas hold for replays.
        evaluator: evaluates gates; None if experts cannot be replaced.
        controller: drives rollouts; not started.
        policies: publishes the policy; started.
        feed: the service for Routers and gateways.
        propagation: waits until all of them apply a policy.
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
    propagation: PolicyPropagation


async def control_parts(settings: ControlSettings, channels: InnerChannels, state: ExitStack) -> ControlParts:
    """Builds the parts in the order of their dependencies.

    Args:
        settings: the settings of this Control.
        channels: opens channels to other parts.
        state: the exit stack that closes the database.

    Raises:
        RolloutDatabaseError: opening the database failed, or it belongs to another deployment.
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
        element_bytes=expert_exchange(settings.model).element_bytes,
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
    propagation = PolicyPropagation(
        policies, watchers, lambda: _running(endpoints), settings.rollouts.take_up_timeout_s
    )
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
        propagation=propagation,
    )


def watched(organs: Iterable[str]) -> dict[str, str]:
    """Application → deployment of these organs' expert groups, for `Endpoints`."""
    return {expert_application(organ): EXPERT_DEPLOYMENT for organ in organs}


def _open_store(
    state: ExitStack, settings: ControlSettings, served: ServedCheckpoint, files: RolloutFiles
) -> RolloutStore:
    """Opens the database exclusively for this Control, and sets the live set if there is none; `state` closes it."""
    url = files.database
    if settings.experts_placement == "local":
        # Nothing can change, so nothing is stored.
        folder = Path(state.enter_context(tempfile.TemporaryDirectory(prefix="echovlm-control-")))
        url = f"{SQLITE}{folder / 'rollouts.db'}"
    else:
        lock = DatabaseLock(files.lock)
        lock.take(settings.serve.graceful_shutdown_timeout_s + LOCK_EXTRA_S)
        state.callback(lock.release)
    # `echoray serve` created it. If it is missing or empty now, its contents are lost, and it must not be replaced
    # silently.
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
    """The number of running parts that must apply a policy."""
    return {"router": len(endpoints.of(ROUTER)), "gateway": len(endpoints.of(GATEWAY))}


def _reachable(endpoints: Endpoints) -> set[str]:
    return {replica.address for replicas in endpoints.all().values() for replica in replicas}
