"""The settings of each deployment: only the sections of the configuration that it needs.

Serve restarts an application's replicas when what they were started with changes. As each part gets only what it
uses, a new limit of the gateway restarts no expert group.
"""

from pathlib import Path
from typing import Any, Literal

from echovlm_ray.config import (
    Config,
    ControlSection,
    ExpertsSection,
    GatewaySection,
    ModelSection,
    Resources,
    RolloutsSection,
    RouterSection,
    Section,
    ServeSection,
    VisionSection,
)
from echovlm_ray.serving.cluster.rollout_files import RolloutFiles
from echovlm_ray.serving.cluster.system_id import DEFAULT_SYSTEM, SystemId

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


# What an evaluation has in common with callers' requests.
ANSWER_LIMITS = {
    "max_images",
    "max_image_bytes",
    "max_image_pixels",
    "crop_to_regions",
    "max_frames",
    "max_visual_tokens",
    "default_new_tokens",
    "max_request_bytes",
    "decoders",
}
TOKEN_LIMITS = {"max_prompt_tokens", "max_new_tokens"}


class ReplicaSettings(Section):
    """What every replica needs to know.

    Attributes:
        network: where the servers between the parts listen.
        system: the system's name on its cluster.
        identity: of the deployment; what carries another one is refused.
    """

    model: ModelSection
    serve: ServeSection
    network: Network
    system: str = ""
    identity: str = ""

    @property
    def system_id(self) -> SystemId:
        """The system that the replica belongs to."""
        return SystemId(self.system, self.identity)

    @property
    def resources(self) -> Resources:
        """What one replica occupies, and how many there are."""
        raise NotImplementedError


class GatewaySettings(ReplicaSettings):
    """The gateway's; `experts` says where the live bundles are described."""

    gateway: GatewaySection
    router: RouterSection
    experts: ExpertsSection

    @property
    def resources(self) -> Resources:
        return self.gateway.resources


class VisionSettings(ReplicaSettings):
    """The vision encoder's."""

    vision: VisionSection

    @property
    def resources(self) -> Resources:
        return self.vision.resources


class RouterSettings(ReplicaSettings):
    """The router's; `experts` counts where they run in its process.

    Attributes:
        policy_file: where Control leaves what is to be served; none where nothing can change.
    """

    router: RouterSection
    experts: ExpertsSection
    policy_file: Path | None

    @property
    def resources(self) -> Resources:
        return self.router.resources


class ExpertGroupSettings(ReplicaSettings):
    """One organ's expert group's.

    Attributes:
        policy_file: where Control leaves what is to be served.
    """

    organ: str
    experts: ExpertsSection
    policy_file: Path

    @property
    def resources(self) -> Resources:
        return self.experts.resources_of(self.organ)


class ControlSettings(ReplicaSettings):
    """Control's; `experts` says how it verifies bundles and deploys the group of a new organ."""

    control: ControlSection
    rollouts: RolloutsSection
    experts: ExpertsSection
    experts_placement: Literal["remote", "local"]
    # Only what callers' requests may hold, and so those of an evaluation: no other change restarts Control.
    gateway: GatewaySection
    router: RouterSection

    @property
    def resources(self) -> Resources:
        return Resources(replicas=1, num_cpus=self.control.num_cpus)

    def expert_group(self, organ: str) -> ExpertGroupSettings:
        """What an organ's expert group is started with, by `serve` and by Control alike."""
        # Other organs' resources are no business of this one.
        update = {"resources": self.experts.resources_of(organ), "organs": {}}
        return ExpertGroupSettings(
            model=self.model,
            serve=self.serve,
            network=self.network,
            system=self.system,
            identity=self.identity,
            organ=organ,
            experts=self.experts.model_copy(update=update),
            policy_file=RolloutFiles.of(self.rollouts, self.model.checkpoint).policy,
        )


def settings_of(
    config: Config, organs: tuple[str, ...], network: Network, system: SystemId = DEFAULT_SYSTEM
) -> dict[str, ReplicaSettings]:
    """Part → what its replicas are started with; expert groups only where experts run apart.

    Those that take longest to start come first: then no core idles while the last of them starts.
    """
    common: dict[str, Any] = {
        "model": config.model,
        "serve": config.serve,
        "network": network,
        "system": system.name,
        "identity": system.identity,
    }
    policy_file = RolloutFiles.of(config.rollouts, config.model.checkpoint).policy
    settings: dict[str, ReplicaSettings] = {
        ROUTER: RouterSettings(
            **common,
            router=config.router,
            experts=config.experts,
            policy_file=policy_file if config.router.experts == "remote" else None,
        ),
        GATEWAY: GatewaySettings(
            **common,
            gateway=config.gateway,
            router=config.router,
            # What runs the experts is no business of the gateway.
            experts=config.experts.model_copy(update={"resources": Resources(), "organs": {}}),
        ),
        VISION: VisionSettings(**common, vision=config.vision),
    }
    control = ControlSettings(
        **common,
        control=config.control,
        rollouts=config.rollouts,
        experts=config.experts,
        experts_placement=config.router.experts,
        gateway=config.gateway.model_validate(config.gateway.model_dump(include=ANSWER_LIMITS)),
        router=config.router.model_validate(config.router.model_dump(include=TOKEN_LIMITS)),
    )
    if config.router.experts == "remote":
        settings |= {expert_application(organ): control.expert_group(organ) for organ in organs}
    settings[CONTROL] = control
    return settings
