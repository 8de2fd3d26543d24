"""The whole system: declared to Ray Serve, waited for, and taken down in order."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import grpc
import ray
from grpc_health.v1 import health_pb2, health_pb2_grpc
from ray import serve

from echovlm_ray.config import Config
from echovlm_ray.serving import preflight, serve_api
from echovlm_ray.serving.applications import declare, deploy_schema
from echovlm_ray.serving.deployments.control import brief
from echovlm_ray.serving.deployments.settings import CONTROL, GATEWAY, ROUTER, Network, deployments_of
from echovlm_ray.serving.endpoints import Endpoints
from echovlm_ray.serving.health import MODEL
from echovlm_ray.serving.ray_session import joined_ray, local_ray
from echovlm_ray.serving.served import ServedCheckpoint

if TYPE_CHECKING:
    from ray.serve.schema import ServeApplicationSchema

logger = logging.getLogger(__name__)

POLL_S = 0.2
REMOVE_TIMEOUT_S = 60.0
OUR_BUILDERS = "echovlm_ray.serving.applications:"
STARTING, RUNNING, FAILED = "DEPLOYING", "RUNNING", "DEPLOY_FAILED"

# Application → Serve's word for its state.
Progress = Callable[[Mapping[str, str]], None]


class StartError(RuntimeError):
    """The system could not start. The text names the part and the reason."""


class StoppedError(Exception):
    """Somebody asked to stop while the system was starting."""


@dataclass(frozen=True, slots=True)
class RunningSystem:
    """A system that answers.

    Attributes:
        gateway_addresses: host:port of each gateway; one per node if they share a configured port.
        control_address: host:port.
        served: what is served.
        start_s: seconds from the first step to the first moment at which it could answer.
    """

    gateway_addresses: tuple[str, ...]
    control_address: str
    served: ServedCheckpoint
    start_s: float

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
    progress: Progress = lambda states: None,
    stopping: Callable[[], bool] = lambda: False,
) -> Iterator[RunningSystem]:
    """Runs the whole system while the block lasts.

    Args:
        config: what to serve and how.
        address: of a Ray cluster to join; by default a local Ray is started, and is gone afterwards. On a joined
            cluster only our own applications are touched.
        keep: leave the applications running on the joined cluster when the block ends.
        progress: told of every application's state while they start.
        stopping: asked while they start; true gives up, and cleans up.

    Raises:
        ValueError: the configuration cannot be used; nothing was started.
        ConnectionError: no cluster at the address.
        StartError: a part did not start; everything is down again.
        StoppedError: `stopping` said so; everything is down again.
    """
    started_at = time.monotonic()
    config = preflight.resolve_paths(config)
    served = preflight.check(config, local=address is None)
    with local_ray(config) if address is None else joined_ray(address):
        network = _network(config)
        applications = declare(config, served.organs, network)
        _check_capacity(config, served, wait=address is not None)
        others = _other_applications(applications.keys())
        endpoints = Endpoints(deployments_of(served.organs))
        endpoints.start()
        try:
            declared = {name: entry.model_dump(exclude_unset=True) for name, entry in others.items()}
            serve_api.declare_applications(deploy_schema(declared | applications))
            _wait_until_running(applications.keys(), progress, stopping)
            _wait_until_serving(endpoints, progress, stopping, list(applications))
            gateways = tuple(replica.public_address for replica in endpoints.replicas(GATEWAY))
            control = endpoints.replicas(CONTROL)[0].public_address
            yield RunningSystem(gateways, control, served, time.monotonic() - started_at)
        finally:
            endpoints.stop()
            if not keep:
                _take_down(list(applications), others, local=address is None)


def remove_from_cluster(address: str) -> list[str]:
    """Removes our applications from a cluster, and returns their names.

    Raises:
        ConnectionError: no cluster at the address.
    """
    with joined_ray(address):
        declared = serve_api.declared_applications()
        ours = [name for name, entry in declared.items() if entry.import_path.startswith(OUR_BUILDERS)]
        others = {name: entry for name, entry in declared.items() if name not in ours}
        if ours:
            _take_down(ours, others, local=False)
        return ours


def _network(config: Config) -> Network:
    if config.serve.internal_network != "auto":
        return config.serve.internal_network
    nodes = [node for node in ray.nodes() if node["Alive"]]
    if len(nodes) < 2:
        return "loopback"
    logger.warning(
        "the cluster has %d nodes, so the parts talk over the nodes' addresses, without encryption or tokens: "
        "let nobody else into that network",
        len(nodes),
    )
    return "node"


def _check_capacity(config: Config, served: ServedCheckpoint, *, wait: bool) -> None:
    """Refuses what can never be placed on a local Ray; a cluster may yet grow."""
    parts = [config.gateway.resources, config.vision.resources, config.router.resources]
    if config.router.experts == "remote":
        parts += [config.experts.resources_of(organ) for organ in served.organs]
    needed = {
        "CPU": sum(part.num_cpus * part.replicas for part in parts) + config.control.num_cpus,
        "GPU": sum(part.num_gpus * part.replicas for part in parts),
    }
    there = ray.cluster_resources()
    for kind, amount in needed.items():
        if amount > there.get(kind, 0.0) + 1e-6:
            field = f"num_{kind.lower()}s"
            text = (
                f"the configuration reserves {amount:g} {kind}s ({field} of all replicas) and Ray has "
                f"{there.get(kind, 0.0):g}: lower {field} or replicas"
            )
            if not wait:
                raise StartError(text)
            logger.warning("%s, or let the cluster grow", text)


def _other_applications(ours: "Mapping[str, object] | object") -> "dict[str, ServeApplicationSchema]":
    names = set(ours)  # type: ignore[call-overload]
    others = {}
    for name, entry in serve_api.declared_applications().items():
        if entry.import_path.startswith(OUR_BUILDERS):
            continue
        if name in names:
            raise StartError(f"the cluster has an application {name!r} that is not EchoVLM-Ray's: rename or remove it")
        others[name] = entry
    return others


def _states(names: "list[str]") -> dict[str, tuple[str, str]]:
    applications = serve.status().applications
    return {
        name: (applications[name].status.value, applications[name].message)
        if name in applications
        else ("NOT_STARTED", "")
        for name in names
    }


def _wait_until_running(names: "object", progress: Progress, stopping: Callable[[], bool]) -> None:
    wanted = list(names)  # type: ignore[call-overload]
    while True:
        _stop_if_asked(stopping)
        states = _states(wanted)
        progress({name: status for name, (status, _) in states.items()})
        for name, (status, message) in states.items():
            if status == FAILED:
                raise StartError(f"{name} did not start: {brief(message)}")
        if all(status == RUNNING for status, _ in states.values()):
            return
        time.sleep(POLL_S)


def _wait_until_serving(
    endpoints: Endpoints, progress: Progress, stopping: Callable[[], bool], names: list[str]
) -> None:
    """Running is not enough: the router must have reached the experts, and the gateway the router."""
    while not (endpoints.of(GATEWAY) and endpoints.of(CONTROL) and _serves(endpoints.of(GATEWAY)[0])):
        _stop_if_asked(stopping)
        progress(dict.fromkeys(names, RUNNING))
        time.sleep(POLL_S)


def _serves(address: str) -> bool:
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            request = health_pb2.HealthCheckRequest(service=MODEL)
            response = health_pb2_grpc.HealthStub(channel).Check(request, timeout=1.0)
        except grpc.RpcError:
            return False
        return bool(response.status == health_pb2.HealthCheckResponse.SERVING)


def _stop_if_asked(stopping: Callable[[], bool]) -> None:
    if stopping():
        raise StoppedError("stopped while starting")


def _take_down(names: list[str], others: "Mapping[str, ServeApplicationSchema]", *, local: bool) -> None:
    """Removes the applications from the top down, so that each finds what it calls still there while it drains."""
    try:
        for group in ([GATEWAY], [ROUTER]):
            _remove([name for name in group if name in names])
        if local:
            # The processes below hold nothing, and end with their Ray.
            return
        remaining = {name: entry.model_dump(exclude_unset=True) for name, entry in others.items()}
        # Forgets the declaration too, so that a restarted controller does not bring the parts back.
        serve_api.declare_applications(deploy_schema(remaining))
        _remove(names)
    except (ray.exceptions.RayError, ValueError) as error:
        logger.warning("Ray Serve could not be told to stop (%s); its processes are ended", type(error).__name__)


def _remove(names: list[str]) -> None:
    serve_api.delete_applications(names)
    deadline = time.monotonic() + REMOVE_TIMEOUT_S
    while any(name in serve.status().applications for name in names):
        if time.monotonic() > deadline:
            logger.warning("%s did not end within %d s", ", ".join(names), REMOVE_TIMEOUT_S)
            return
        time.sleep(POLL_S)
