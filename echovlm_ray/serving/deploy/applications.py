"""The Ray Serve applications of the whole system, built from the configuration.

They are handed to Serve's controller built, not as names to import: for a name, Serve starts a process per application
just to build it, which on two cores costs six seconds of every start. What a declaration would give is kept: each
application carries a version made of all that its replicas are started with, so deploying again restarts only what
changed, and other people's applications on the same cluster are not touched.
"""

from importlib import metadata

from ray import serve
from ray.serve import Application, Deployment

from echovlm_ray.config import Config
from echovlm_ray.serving.cluster import ray_internals
from echovlm_ray.serving.cluster.settings import (
    ControlSettings,
    ExpertGroupSettings,
    GatewaySettings,
    Network,
    ReplicaSettings,
    RouterSettings,
    VisionSettings,
    deployment_of,
    settings_of,
)
from echovlm_ray.serving.cluster.system_id import DEFAULT_SYSTEM, SystemId
from echovlm_ray.serving.deploy.control_deployment import ControlReplica
from echovlm_ray.serving.deploy.expert_group_deployment import ExpertGroupReplica
from echovlm_ray.serving.deploy.gateway_deployment import GatewayReplica
from echovlm_ray.serving.deploy.replica import Replica, environment_of
from echovlm_ray.serving.deploy.router_deployment import RouterReplica
from echovlm_ray.serving.deploy.vision_deployment import VisionReplica
from experts.bundles.digest import digest_of

# A replica whose constructor fails this often is given up, and the reason shown.
CONSTRUCTOR_ATTEMPTS = 2
# How often a stopping replica looks whether it may end.
SHUTDOWN_POLL_S = 0.05

REPLICAS: dict[type[ReplicaSettings], type[Replica]] = {
    GatewaySettings: GatewayReplica,
    VisionSettings: VisionReplica,
    RouterSettings: RouterReplica,
    ExpertGroupSettings: ExpertGroupReplica,
    ControlSettings: ControlReplica,
}


def build_applications(
    config: Config, organs: tuple[str, ...], network: Network, system: SystemId = DEFAULT_SYSTEM
) -> dict[str, Application]:
    """Part → application, those first that take longest to start.

    Args:
        config: with a checkpoint path that is absolute and can be read on all nodes.
        organs: of the checkpoint.
        network: where the servers between the parts listen.
        system: that they are the parts of.
    """
    return {part: _build(part, settings) for part, settings in settings_of(config, organs, network, system).items()}


def deploy(part: str, settings: ReplicaSettings) -> None:
    """Declares one application to Serve and returns before it runs; one that is as it should be stays as it is."""
    serve.run_many(
        [serve.RunTarget(_build(part, settings), name=settings.system_id.application(part), route_prefix=None)],
        wait_for_ingress_deployment_creation=False,
        wait_for_applications_running=False,
    )


def version_of(settings: ReplicaSettings) -> str:
    """What a replica is: while it stays the same, deploying again leaves the replica alone.

    Left out is what Serve can change under a running replica: how many there are, and how they are checked.
    """
    started_with = settings.model_dump(mode="json", exclude={"serve"})
    package = metadata.version("echovlm-ray")
    return digest_of({"package": package, "environment": environment_of(settings), "settings": started_with})


def _build(part: str, settings: ReplicaSettings) -> Application:
    options, resources = settings.serve, settings.resources
    undeployed: Deployment = serve.deployment(REPLICAS[type(settings)])  # type: ignore[assignment] # its overloads
    deployment = undeployed.options(
        name=deployment_of(part),
        num_replicas=resources.replicas,
        ray_actor_options={
            "num_cpus": resources.num_cpus,
            "num_gpus": resources.num_gpus,
            "resources": resources.node_resources,
            "runtime_env": {"env_vars": environment_of(settings)},
        },
        health_check_period_s=options.health_check_period_s,
        health_check_timeout_s=options.health_check_timeout_s,
        graceful_shutdown_timeout_s=options.graceful_shutdown_timeout_s,
        graceful_shutdown_wait_loop_s=SHUTDOWN_POLL_S,
        max_constructor_retry_count=CONSTRUCTOR_ATTEMPTS,
        # An update starts the new replicas beside the old, so that no moment is without one; of Control there must
        # never be two.
        max_surge_percent=0 if isinstance(settings, ControlSettings) else 100,
        # Requests come over our own servers; Serve's access log would only know of health checks.
        logging_config={"enable_access_log": False},
    )
    return ray_internals.with_version(deployment, version_of(settings)).bind(settings.model_dump(mode="json"))
