"""The whole system: deploys it to Ray Serve, waits until it serves, and shuts it down in order."""

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import grpc
import ray
from grpc_health.v1 import health_pb2, health_pb2_grpc
from ray import serve
from ray.serve import RunTarget
from ray.serve.schema import ApplicationStatus, ApplicationStatusOverview

from echovlm_ray.config import Config
from echovlm_ray.free_memory import return_free_memory
from echovlm_ray.serving.cluster import ray_internals
from echovlm_ray.serving.cluster.endpoints import Endpoints
from echovlm_ray.serving.cluster.ownership import (
    OwnedByAnotherError,
    SystemRecord,
    all_records,
    check_database,
    claim,
    is_ours,
    record_of,
    release,
    release_name,
)
from echovlm_ray.serving.cluster.ray_session import joined_ray, local_ray
from echovlm_ray.serving.cluster.ray_watch import RayWatch, essential_processes
from echovlm_ray.serving.cluster.served import ServedCheckpoint
from echovlm_ray.serving.cluster.settings import (
    CONTROL,
    DEPLOYMENTS,
    EXPERT_PREFIX,
    GATEWAY,
    ROUTER,
    Network,
    deployment_of,
)
from echovlm_ray.serving.cluster.system_id import SystemId
from echovlm_ray.serving.cluster.system_secret import delete_secret_file, delete_secrets, keep_secret
from echovlm_ray.serving.deploy import preflight
from echovlm_ray.serving.deploy.applications import build_applications
from echovlm_ray.serving.deploy.control_deployment import cause
from echovlm_ray.serving.grpc.health import OVERALL, organ_service
from experts.transport.inner_channel import InnerChannels

logger = logging.getLogger(__name__)

POLL_S = 0.2
# Serve's own view of all applications takes its controller tens of milliseconds; addresses arrive by themselves.
STATUS_PERIOD_S = 2.0
REMOVE_TIMEOUT_S = 60.0
# Two of the gateway's looks at the organs, and the answers.
ORGANS_KNOWN_S = 3.0

# Application → whether it listens.
Progress = Callable[[Mapping[str, bool]], None]
# What happened, and whether another system has the name now.
Replaced = Callable[[str, bool], None]


class StartError(RuntimeError):
    """The system could not start. The text names the part and the reason."""


class StoppedError(Exception):
    """The system was stopped while it was starting."""


@dataclass(frozen=True, slots=True)
class RunningSystem:
    """A system that answers.

    Attributes:
        gateway_addresses: host:port of each gateway; one per node if they share a configured port.
        control_address: host:port.
        served: what is served.
        start_s: seconds from the first step to the first moment at which it could answer.
        channels: connects to its parts below the gateway.
        unanswered: the organs that cannot be answered at that moment.
    """

    gateway_addresses: tuple[str, ...]
    control_address: str
    served: ServedCheckpoint
    start_s: float
    channels: InnerChannels
    unanswered: tuple[str, ...] = ()

    @property
    def gateway_address(self) -> str:
        """The first gateway's."""
        return self.gateway_addresses[0]


@contextmanager
def serve_system(
    config: Config,
    *,
    address: str | None = None,
    keep: bool = False,
    name: str = "",
    take_over: bool = False,
    progress: Progress = lambda states: None,
    stopping: Callable[[], bool] = lambda: False,
    lost: Callable[[str], None] = logger.error,
    replaced: Replaced = lambda what, by_another: logger.error("%s", what),
) -> Iterator[RunningSystem]:
    """Runs the whole system within the block.

    Args:
        config: what to serve and how.
        address: of a Ray cluster to join; by default a local Ray is started, and is gone afterwards. On a joined
            cluster only our own applications are touched.
        keep: leave the applications running on the joined cluster when the block ends.
        name: of the system on the cluster; several run side by side by name.
        take_over: replace another system of this name, or another deployment's policy file next to the database.
        progress: called again and again with which applications listen, while they start.
        stopping: polled while they start; true cancels the start and cleans up.
        lost: called on a thread, with what happened, once Ray has died or does not answer; no call to Ray may return
            any more, so that only the end of the process is left.
        replaced: called on a thread, again and again, once another `echoray serve` has taken the name on the cluster,
            or `echoray stop` has removed the applications; the block should end, and leaves the cluster as it is.

    Raises:
        ValueError: the configuration cannot be used; nothing was started.
        ConnectionError: no cluster at the address.
        StartError: a part did not start; everything is down again.
        StoppedError: `stopping` returned true; everything has been removed.
    """
    started_at = time.monotonic()
    config = preflight.resolve_paths(config)
    served = preflight.check(config, local=address is None, take_over=take_over)
    system = SystemId(name, served.identity)
    with (
        _lasting_ray(config, address, lost) as watch,
        _owned_name(system, config, attached=not keep, take_over=take_over, cluster=address is not None) as record,
    ):
        watch.also_ask(lambda: _notice_replacement(record, replaced))
        parts = build_applications(config, served.organs, _network(config), system)
        _check_capacity(config, served, may_grow=address is not None)
        _refuse_namesakes(system, parts)
        channels = InnerChannels(keep_secret(system))
        endpoints = Endpoints({part: deployment_of(part) for part in parts}, system)
        endpoints.start()
        ready = False
        try:
            serve.run_many(
                [RunTarget(target, name=system.application(part), route_prefix=None) for part, target in parts.items()],
                wait_for_ingress_deployment_creation=False,
                wait_for_applications_running=False,
            )
            _wait_until_serving(system, tuple(parts), endpoints, channels, progress, stopping)
            ready = True
            gateways = tuple(replica.public_address for replica in endpoints.replicas(GATEWAY))
            control = endpoints.replicas(CONTROL)[0].public_address
            start_s = time.monotonic() - started_at
            unanswered = _unanswered(channels, endpoints.of(GATEWAY)[0], served.organs)
            return_free_memory()
            yield RunningSystem(gateways, control, served, start_s, channels, unanswered)
        finally:
            watch.stop_asking()
            endpoints.stop()
            mine = is_ours(record)
            if ready and not keep and mine:
                _finish_requests(system)
            # A local Ray's processes end with it, and what still starts would only keep them.
            if address is not None and not (ready and keep) and mine:
                # With the expert groups of organs that appeared since.
                _remove(_ours(system) or tuple(map(system.application, parts)))
                release(record)
                delete_secrets(system.name)
            if address is None:
                delete_secret_file(system.identity)


@contextmanager
def _lasting_ray(config: Config, address: str | None, lost: Callable[[str], None]) -> Iterator[RayWatch]:
    """A Ray that is watched from its start to its end."""
    with local_ray(config) if address is None else joined_ray(address):
        watch = RayWatch(essential_processes() if address is None else {}, lost)
        watch.start()
        try:
            yield watch
        finally:
            watch.stop_asking()
            watch.stop()


@contextmanager
def _owned_name(
    system: SystemId, config: Config, *, attached: bool, take_over: bool, cluster: bool
) -> Iterator[SystemRecord]:
    """The name on the cluster, claimed for this process; what another deployment runs under it is removed first.

    Raises:
        StartError: it belongs to another system.
    """
    record = SystemRecord.of_this_process(system, config, attached=attached)
    try:
        if config.router.experts == "remote":
            check_database(record, lambda other: bool(_ours(other)))
        before = claim(record, deployed=cluster and bool(_ours(system)), take_over=take_over)
    except OwnedByAnotherError as error:
        raise StartError(str(error)) from None
    if before is not None:
        logger.warning("replacing %s, %s", before.system, before.owner)
        _finish_requests(system)
        _remove(_ours(system))
    try:
        yield record
    except BaseException:
        # It did not start, or Ray has ended and its key-value store with it.
        if not _ours(system):
            release(record)
        raise


def _notice_replacement(record: SystemRecord, replaced: Replaced) -> None:
    now = record_of(record.name)
    if now is None:
        replaced(f"{record.system} was removed from the cluster by `echoray stop`", False)
    elif now.run != record.run:
        replaced(f"{record.system} was taken over by {now.owner}; it stays as it is", True)


def remove_from_cluster(address: str, name: str = "") -> tuple[str, ...]:
    """Removes a system's applications from a cluster, and returns their names.

    Args:
        address: of the cluster.
        name: of the system.

    Raises:
        ConnectionError: no cluster at the address.
    """
    with joined_ray(address):
        system = SystemId(name)
        ours = _ours(system)
        if ours:
            # First, so that the process that runs it touches nothing any more.
            release_name(name)
            delete_secrets(name)
            _finish_requests(system)
            _remove(ours)
        return ours


def names_on_cluster(address: str) -> tuple[str, ...]:
    """The names of the systems that a cluster runs.

    Raises:
        ConnectionError: no cluster at the address.
    """
    with joined_ray(address):
        return tuple(sorted(all_records()))


def _network(config: Config) -> Network:
    if config.serve.internal_network != "auto":
        return config.serve.internal_network
    nodes = [node for node in ray.nodes() if node["Alive"]]
    if len(nodes) < 2:
        return "loopback"
    logger.warning(
        "the cluster has %d nodes, so the parts talk over the nodes' addresses, without encryption or tokens: "
        "let no one else into that network",
        len(nodes),
    )
    return "node"


def _check_capacity(config: Config, served: ServedCheckpoint, *, may_grow: bool) -> None:
    """Refuses what can never be placed on a local Ray; a cluster may yet grow."""
    parts = [config.gateway.resources, config.vision.resources, config.router.resources]
    if config.router.experts == "remote":
        parts += [config.experts.resources_of(organ) for organ in served.organs]
    needed = {
        "CPU": sum(part.num_cpus * part.replicas for part in parts) + config.control.num_cpus,
        "GPU": sum(part.num_gpus * part.replicas for part in parts),
    }
    fields = {kind: f"num_{kind.lower()}s" for kind in needed}
    for part in parts:
        for kind, amount in part.node_resources.items():
            needed[kind] = needed.get(kind, 0.0) + amount * part.replicas
            fields[kind] = f"node_resources.{kind}"
    there = ray.cluster_resources()
    for kind, amount in needed.items():
        if amount > there.get(kind, 0.0) + 1e-6:
            text = (
                f"the configuration reserves {amount:g} of {kind} ({fields[kind]} of all replicas) and Ray has "
                f"{there.get(kind, 0.0):g}: lower {fields[kind]} or replicas"
            )
            if not may_grow:
                raise StartError(text)
            logger.warning("%s, or let the cluster grow", text)


def _ours(system: SystemId) -> tuple[str, ...]:
    found = serve.status().applications
    return tuple(name for name, overview in found.items() if _is_part(system, name, overview))


def _is_part(system: SystemId, name: str, found: ApplicationStatusOverview) -> bool:
    """Whether an application of a cluster is a part of a system, by the names of both it and its deployment."""
    part = system.part(name)
    if part is None:
        return False
    named = part in DEPLOYMENTS or part.startswith(EXPERT_PREFIX)
    return named and set(found.deployments) <= {deployment_of(part)}


def _refuse_namesakes(system: SystemId, parts: Iterable[str]) -> None:
    there = serve.status().applications
    for name in map(system.application, parts):
        if name in there and not _is_part(system, name, there[name]):
            raise StartError(f"the cluster has an application {name!r} that is not EchoVLM-Ray's: rename or remove it")


def _wait_until_serving(
    system: SystemId,
    parts: Sequence[str],
    endpoints: Endpoints,
    channels: InnerChannels,
    progress: Progress,
    stopping: Callable[[], bool],
) -> None:
    """Running is not enough: the router must have reached the experts, and the gateway the router."""
    next_status = 0.0
    names = tuple(map(system.application, parts))
    while True:
        if stopping():
            raise StoppedError("stopped while starting")
        listening = {part for part in parts if endpoints.of(part)}
        progress({part: part in listening for part in parts})
        all_listen = listening == set(parts)
        if all_listen or time.monotonic() >= next_status:
            # The listening process may be one that an update is about to replace; only Serve has that information.
            settled = _all_settled(names)
            next_status = time.monotonic() + STATUS_PERIOD_S
            if all_listen and settled and _serves(channels, endpoints.of(GATEWAY)[0]):
                return
        time.sleep(POLL_S)


def _all_settled(names: Sequence[str]) -> bool:
    """Whether all applications run as they were deployed last.

    Raises:
        StartError: one of them was given up.
    """
    applications = serve.status().applications
    for name in names:
        if name in applications and applications[name].status == ApplicationStatus.DEPLOY_FAILED:
            raise StartError(f"{name} did not start: {cause(applications[name])}")
    return all(name in applications and applications[name].status == ApplicationStatus.RUNNING for name in names)


def _unanswered(channels: InnerChannels, gateway: str, organs: Iterable[str]) -> tuple[str, ...]:
    """The organs that do not serve; the gateway looks at them about once a second."""
    deadline = time.monotonic() + ORGANS_KNOWN_S
    missing = tuple(organs)
    while missing := tuple(organ for organ in missing if not _serves(channels, gateway, organ_service(organ))):
        if time.monotonic() >= deadline:
            break
        time.sleep(POLL_S)
    return missing


def _serves(channels: InnerChannels, address: str, service: str = OVERALL) -> bool:
    with channels.blocking(address) as channel:
        try:
            request = health_pb2.HealthCheckRequest(service=service)
            response = health_pb2_grpc.HealthStub(channel).Check(request, timeout=1.0)
        except grpc.RpcError:
            return False
        return bool(response.status == health_pb2.HealthCheckResponse.SERVING)


def _finish_requests(system: SystemId) -> None:
    """Ends the gateway, then the router: each finishes what it does while all that it calls is still there.

    Control then closes its database, so that SQLite removes its auxiliary files.
    """
    _remove([system.application(GATEWAY)])
    _remove([system.application(part) for part in (ROUTER, CONTROL)])


def _remove(names: Sequence[str]) -> None:
    try:
        ray_internals.delete_applications(names)
        deadline = time.monotonic() + REMOVE_TIMEOUT_S
        while set(names) & set(serve.status().applications):
            if time.monotonic() > deadline:
                logger.warning("%s did not end within %d s", ", ".join(names), REMOVE_TIMEOUT_S)
                return
            time.sleep(POLL_S)
    except ray.exceptions.RayError as error:
        logger.warning("Ray Serve could not be asked to remove %s: %s", ", ".join(names), type(error).__name__)
