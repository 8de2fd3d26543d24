"""The admission of a request: the traits by which its experts are chosen, and the pinned experts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from router.gating.expert_set import ExpertSet
from router.gating.organ_gate import OrganChoice
from router.rollouts.traffic import CandidateTraffic


@dataclass(frozen=True, slots=True, eq=False)
class RequestTraits:
    """The traits of a request by which its organs and experts are chosen.

    Attributes:
        organs: the caller's organs.
        anatomy_terms: the anatomy terms of its DICOM objects.
        pooled_D: the mean of its vision embeddings; None without images.
        request_id: the key for canaries if there is no session key.
        session_key: all requests with the same one get the same experts.
        policy_version: the version of the newest policy that the gateway has; 0 for none.
    """

    organs: Sequence[str]
    anatomy_terms: Sequence[str]
    pooled_D: torch.Tensor | None
    request_id: str
    session_key: str = ""
    policy_version: int = 0


@dataclass(frozen=True, slots=True)
class UsedBundle:
    """The version of one organ's experts that a run uses.

    Attributes:
        rollout: its rollout if it was a candidate; None for the stable version.
    """

    organ: str
    digest: str
    version: str
    rollout: CandidateTraffic | None = None


@dataclass(frozen=True, slots=True, eq=False)
class PinnedExperts:
    """The experts of one run. Pinned until `release`, which must be called once, from any thread."""

    expert_set: ExpertSet
    choice: OrganChoice
    used: tuple[UsedBundle, ...]
    release: Callable[[], None]


@dataclass(frozen=True, slots=True, eq=False)
class Admission:
    """The experts of an admitted request.

    Attributes:
        experts: the experts that answer.
        shadow: the experts of its shadow, or None. Pinned separately.
    """

    experts: PinnedExperts
    shadow: PinnedExperts | None = None

    def release(self) -> None:
        """Releases the experts if no run has taken ownership of them."""
        self.experts.release()
        if self.shadow is not None:
            self.shadow.release()
