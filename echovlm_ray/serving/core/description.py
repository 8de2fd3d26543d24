"""A gateway's description of the model."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class OrganDescription:
    """A live organ with the version of its experts."""

    organ: str
    bundle_version: str
    bundle_digest: str
    num_experts: int


@dataclass(frozen=True, slots=True)
class ModelDescription:
    """The description of the model.

    Attributes:
        description: the intended and the excluded use.
        notices: sent with every answer, for example that the demo's text means nothing.
        policy_version: the version of Control's policy that it describes; 0 before the first one.
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
