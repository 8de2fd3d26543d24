"""What each deployment is started with: its own sections of the configuration and no other.

Serve restarts an application's replicas when what they were started with changes. As each part gets only what it
uses, a new limit of the gateway restarts no expert group.
"""

from typing import Any, Literal

from echovlm_ray.config import (
    Config,
    ControlSection,
    ExpertsSection,
    GatewaySection,
    ModelSection,
    Resources,
    RouterSection,
    Section,
    ServeSection,
    VisionSection,
)

GATEWAY = "gateway"
VISION = "vision"
ROUTER = "router"
CONTROL = "control"
EXPERT_PREFIX = "expert-"
# Application → name of its one deployment. The expert groups' applications all have `EXPERT_DEPLOYMENT`.
DEPLOYMENTS = {GATEWAY: "Gateway", VISION: "VisionEncoder", ROUTER: "Router", CONTROL: "Control"}
EXPERT_DEPLOYMENT = "ExpertGroup"

Network = Literal["loopback", "node"]


def expert_application(organ: str) -> str:
    """The Serve application of an organ's expert group."""
    return f"{EXPERT_PREFIX}{organ}"


def deployment_of(application: str) -> str:
    """The name of an application's one deployment."""
    return DEPLOYMENTS.get(application, EXPERT_DEPLOYMENT)


def deployments_of(organs: tuple[str, ...]) -> dict[str, str]:
    """Application → deployment, of the whole system."""
    return DEPLOYMENTS | {expert_application(organ): EXPERT_DEPLOYMENT for organ in organs}


class ReplicaSettings(Section):
    """What every replica needs to know.

    Attributes:
        network: where the servers between the parts listen.
    """

    model: ModelSection
    serve: ServeSection
    network: Network

    @property
    def resources(self) -> Resources:
        """What one replica occupies, and how many there are."""
        raise NotImplementedError


class GatewaySettings(ReplicaSettings):
    """The gateway's."""

    gateway: GatewaySection
    router: RouterSection

    @property
    def resources(self) -> Resources:
        """See `ReplicaSettings`."""
        return self.gateway.resources


class VisionSettings(ReplicaSettings):
    """The vision encoder's."""

    vision: VisionSection

    @property
    def resources(self) -> Resources:
        """See `ReplicaSettings`."""
        return self.vision.resources


class RouterSettings(ReplicaSettings):
    """The router's; `experts` counts where they run in its process."""

    router: RouterSection
    experts: ExpertsSection

    @property
    def resources(self) -> Resources:
        """See `ReplicaSettings`."""
        return self.router.resources


class ExpertGroupSettings(ReplicaSettings):
    """One organ's expert group's."""

    organ: str
    experts: ExpertsSection

    @property
    def resources(self) -> Resources:
        """See `ReplicaSettings`."""
        return self.experts.resources_of(self.organ)


class ControlSettings(ReplicaSettings):
    """Control's."""

    control: ControlSection
    experts_placement: Literal["remote", "local"]

    @property
    def resources(self) -> Resources:
        """See `ReplicaSettings`."""
        return Resources(replicas=1, num_cpus=self.control.num_cpus)


def settings_of(config: Config, organs: tuple[str, ...], network: Network) -> dict[str, ReplicaSettings]:
    """Application → what its replicas are started with; expert groups only where experts run apart.

    Those that take longest to start come first: then no core idles while the last of them starts.
    """
    common: dict[str, Any] = {"model": config.model, "serve": config.serve, "network": network}
    settings: dict[str, ReplicaSettings] = {
        ROUTER: RouterSettings(**common, router=config.router, experts=config.experts),
        GATEWAY: GatewaySettings(**common, gateway=config.gateway, router=config.router),
        VISION: VisionSettings(**common, vision=config.vision),
    }
    if config.router.experts == "remote":
        for organ in organs:
            # Other organs' resources are no business of this one.
            update = {"resources": config.experts.resources_of(organ), "organs": {}}
            experts = config.experts.model_copy(update=update)
            settings[expert_application(organ)] = ExpertGroupSettings(**common, organ=organ, experts=experts)
    settings[CONTROL] = ControlSettings(**common, control=config.control, experts_placement=config.router.experts)
    return settings
