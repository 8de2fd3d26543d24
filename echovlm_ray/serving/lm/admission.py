"""What is known of a request when its experts are chosen, and what it is given."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from router.gating.expert_set import ExpertSet
from router.gating.organ_gate import OrganChoice
from router.rollouts.traffic import CandidateTraffic


@dataclass(frozen=True, slots=True, eq=False)
class RequestTraits:
    """By what a request's organs and experts are chosen.

    Attributes:
        organs: what the caller named.
        anatomy_terms: what its DICOM objects say.
        pooled_D: the mean of its vision embeddings; None without images.
        request_id: decides about candidates where there is no session.
        session_key: when given, all requests with it get the same experts.
        policy_version: of the newest policy that the caller knows of; 0 of none.
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
        rollout: in which it was a candidate when the run got it; None of the stable one.
    """

    organ: str
    digest: str
    version: str
    rollout: CandidateTraffic | None = None


@dataclass(frozen=True, slots=True, eq=False)
class PinnedExperts:
    """The experts of one run. Held until `release`, which is called once, from any thread."""

    expert_set: ExpertSet
    choice: OrganChoice
    used: tuple[UsedBundle, ...]
    release: Callable[[], None]


@dataclass(frozen=True, slots=True, eq=False)
class Admission:
    """What a request computes with.

    Attributes:
        experts: what answers.
        shadow: what is computed beside it and is not answered, or none. Held on its own.
    """

    experts: PinnedExperts
    shadow: PinnedExperts | None = None

    def release(self) -> None:
        """Lets go of the experts, where no run takes them over."""
        self.experts.release()
        if self.shadow is not None:
            self.shadow.release()
