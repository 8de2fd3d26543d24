"""The Ray Serve applications: builders that Serve imports by name, and the declaration of the whole system.

Serve calls a builder with the arguments of its application, in this process's stead: `serve deploy`, KubeRay and
`echoray serve` all go the same way.
"""

import os
from typing import TYPE_CHECKING, Any

from ray import serve

from echovlm_ray.config import Config
from echovlm_ray.serving.deployments.control import ControlReplica
from echovlm_ray.serving.deployments.expert_group import ExpertGroupReplica
from echovlm_ray.serving.deployments.gateway import GatewayReplica
from echovlm_ray.serving.deployments.replica import Replica, actor_options_of, environment_of
from echovlm_ray.serving.deployments.router import RouterReplica
from echovlm_ray.serving.deployments.settings import (
    CONTROL,
    DEPLOYMENTS,
    EXPERT_DEPLOYMENT,
    GATEWAY,
    ROUTER,
    VISION,
    ControlSettings,
    ExpertGroupSettings,
    GatewaySettings,
    Network,
    ReplicaSettings,
    RouterSettings,
    VisionSettings,
    settings_of,
)
from echovlm_ray.serving.deployments.vision import VisionReplica

if TYPE_CHECKING:
    from ray.serve import Application
    from ray.serve.schema import ServeDeploySchema

# A replica whose constructor fails this often is given up, and the reason shown.
CONSTRUCTOR_ATTEMPTS = 2
# How often a stopping replica looks whether it may end.
SHUTDOWN_POLL_S = 0.05


def gateway(args: GatewaySettings) -> "Application":
    """Builds the gateway."""
    return _build(GatewayReplica, DEPLOYMENTS[GATEWAY], args)


def vision(args: VisionSettings) -> "Application":
    """Builds the vision encoder."""
    return _build(VisionReplica, DEPLOYMENTS[VISION], args)


def router(args: RouterSettings) -> "Application":
    """Builds the router."""
    return _build(RouterReplica, DEPLOYMENTS[ROUTER], args)


def expert_group(args: ExpertGroupSettings) -> "Application":
    """Builds one organ's expert group."""
    return _build(ExpertGroupReplica, EXPERT_DEPLOYMENT, args)


def control(args: ControlSettings) -> "Application":
    """Builds Control."""
    return _build(ControlReplica, DEPLOYMENTS[CONTROL], args)


BUILDERS = {
    GatewaySettings: "gateway",
    VisionSettings: "vision",
    RouterSettings: "router",
    ExpertGroupSettings: "expert_group",
    ControlSettings: "control",
}


def declare(config: Config, organs: tuple[str, ...], network: Network) -> dict[str, dict[str, Any]]:
    """Application → its entry in a Serve deploy configuration, in the order in which they are wanted.

    Args:
        config: with an absolute checkpoint path that all nodes can read.
        organs: of the checkpoint.
        network: where the servers between the parts listen.
    """
    return {
        name: {
            "name": name,
            "import_path": f"{__name__}:{BUILDERS[type(settings)]}",
            # Serve's own HTTP proxies serve none of it.
            "route_prefix": None,
            "runtime_env": {"env_vars": environment_of(settings)},
            "args": settings.model_dump(mode="json"),
        }
        for name, settings in settings_of(config, organs, network).items()
    }


def deploy_schema(applications: dict[str, dict[str, Any]]) -> "ServeDeploySchema":
    """The declaration that Serve's controller takes.

    Serve ignores fields that it does not know; these are all made above, and a misspelt one would be a defect here.
    """
    from ray.serve.schema import ServeDeploySchema

    return ServeDeploySchema.model_validate({"proxy_location": "Disabled", "applications": list(applications.values())})


def _build(replica: type[Replica], name: str, settings: ReplicaSettings) -> "Application":
    options = settings.serve
    deployment = serve.deployment(replica).options(
        name=name,
        num_replicas=settings.resources.replicas,
        ray_actor_options=actor_options_of(settings.resources),
        health_check_period_s=options.health_check_period_s,
        health_check_timeout_s=options.health_check_timeout_s,
        graceful_shutdown_timeout_s=options.graceful_shutdown_timeout_s,
        graceful_shutdown_wait_loop_s=SHUTDOWN_POLL_S,
        max_constructor_retry_count=CONSTRUCTOR_ATTEMPTS,
        # Requests come over our own servers; Serve's access log would only know of health checks.
        logging_config={"enable_access_log": False, "log_level": os.environ.get("ECHORAY_LOG_LEVEL", "INFO")},
    )
    return deployment.bind(settings.model_dump(mode="json"))
