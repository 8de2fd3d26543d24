"""What a gateway says about the model that it serves."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class OrganDescription:
    """An organ that is served, and the live version of its experts."""

    organ: str
    bundle_version: str
    bundle_digest: str
    num_experts: int


@dataclass(frozen=True, slots=True)
class ModelDescription:
    """What the gateway says about the model.

    Attributes:
        description: what it is for and what it is not for.
        notices: sent with every answer, for example that the demo's text means nothing.
        policy_version: of Control's policy that it describes; 0 before the first one.
    """

    name: str
    version: str
    description: str
    backbone_digest: str
    expert_set_id: str
    organs: tuple[OrganDescription, ...]
    default_organ: str
    notices: tuple[str, ...] = ()
    policy_version: int = 0
