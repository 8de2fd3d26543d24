"""The organ gate: which organs' experts a request uses, with what shares, and how they were determined."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from protos import router_pb2
from router.errors import TooManyOrgansError, UnknownOrganError
from router.gating import anatomy
from router.gating.expert_set import ExpertSet


@dataclass(frozen=True, slots=True, eq=False)
class OrganProfile:
    """How an organ is recognised; part of its bundle.

    Attributes:
        organ: its name in expert sets.
        synonyms: words or phrases for it in a caller's hint or in a DICOM anatomy term, in addition to
            `router.gating.anatomy`, over which they take precedence.
        prototype_D: the mean direction of its images' pooled vision features, if it was measured.
    """

    organ: str
    synonyms: tuple[str, ...] = ()
    prototype_D: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class OrganChoice:
    """The gate's decision.

    Attributes:
        shares: organ and π, which add up to 1; empty for flat sets, which need no choice.
        source: what determined the organs.
    """

    shares: tuple[tuple[str, float], ...]
    source: router_pb2.OrganSource


class OrganGate:
    """Chooses by the caller's hint, else the DICOM terms, else the image, else the default."""

    def __init__(self, profiles: Iterable[OrganProfile], *, default_organ: str, max_organs: int) -> None:
        """
        Args:
            profiles: at most one per organ; an organ without one is recognised by its name and the anatomy table.
            default_organ: the organ of requests whose organ is unknown.
            max_organs: how many organs a request may use.
        """
        self._profiles = {profile.organ: profile for profile in profiles}
        self._default_organ = default_organ
        self._max_organs = max_organs
        # Loads the table, so that the first request does not wait for it.
        anatomy.is_known("")

    def with_profiles(self, profiles: Iterable[OrganProfile]) -> "OrganGate":
        """A gate with the same settings for bundles with other profiles."""
        return OrganGate(profiles, default_organ=self._default_organ, max_organs=self._max_organs)

    def check(self, expert_set: ExpertSet) -> None:
        """Checks the default organ; call it at start.

        Raises:
            ValueError: the set is routed by organ and does not have the default organ.
        """
        if expert_set.routing == "organs" and self._default_organ not in expert_set.organs:
            raise ValueError(
                f"the default organ {self._default_organ!r} (model.default_organ) is not in the expert set: "
                f"choose one of {', '.join(expert_set.organs)}"
            )

    def choose(
        self,
        organs: Sequence[str],
        anatomy_terms: Sequence[str],
        pooled_D: torch.Tensor | None,
        expert_set: ExpertSet,
    ) -> OrganChoice:
        """The organs of one request.

        For flat sets the caller's organs are checked but have no effect, which `source` reports.

        Args:
            organs: what the caller named: organs of the set or synonyms of them, in any case.
            anatomy_terms: the anatomy terms of DICOM objects.
            pooled_D: the mean of the request's vision embeddings; None without images.
            expert_set: the set to which the request will be pinned.

        Raises:
            UnknownOrganError: the caller named an organ that the set does not have, or the organ is unknown and the set
                does not have the default organ.
            TooManyOrgansError: the caller named more organs than a request may use.
        """
        named = self._named(organs, expert_set)
        if expert_set.routing == "flat":
            return OrganChoice((), router_pb2.ORGAN_SOURCE_FLAT)
        if named:
            return OrganChoice(_equal_shares(named), router_pb2.ORGAN_SOURCE_CALLER)
        if found := self._in_terms(anatomy_terms, expert_set):
            return OrganChoice(_equal_shares(found), router_pb2.ORGAN_SOURCE_DICOM)
        if pooled_D is not None and (nearest := self._nearest(pooled_D, expert_set)) is not None:
            return OrganChoice(_equal_shares([nearest]), router_pb2.ORGAN_SOURCE_PROTOTYPE)
        if self._default_organ not in expert_set.organs:
            raise UnknownOrganError(
                f"the organ is unknown, and {self._default_organ!r} (model.default_organ) is not served any more: "
                f"name one of {', '.join(expert_set.organs)}"
            )
        return OrganChoice(_equal_shares([self._default_organ]), router_pb2.ORGAN_SOURCE_DEFAULT)

    def _named(self, hints: Sequence[str], expert_set: ExpertSet) -> list[str]:
        named: set[str] = set()
        for hint in hints:
            found = self._organs_in([hint], expert_set)[0]
            if not found:
                raise UnknownOrganError(f"there is no organ {hint[:64]!r}: choose from {', '.join(expert_set.organs)}")
            named.update(found)
        if len(named) > self._max_organs:
            raise TooManyOrgansError(
                f"{len(named)} organs are named and a request may use {self._max_organs} "
                "(model.max_organs_per_request): name fewer"
            )
        return sorted(named, key=expert_set.organs.index)

    def _in_terms(self, terms: Sequence[str], expert_set: ExpertSet) -> list[str]:
        found = self._organs_in(terms, expert_set)
        votes = {organ: sum(organ in organs for organs in found) for organ in expert_set.organs}
        # Sorting is stable, so the set's order breaks ties.
        ranked = sorted((organ for organ in votes if votes[organ]), key=lambda organ: -votes[organ])
        return sorted(ranked[: self._max_organs], key=expert_set.organs.index)

    def _organs_in(self, terms: Sequence[str], expert_set: ExpertSet) -> list[list[str]]:
        own = self._own_phrases(expert_set)
        return [[organ for organ in anatomy.organs_in(term, own) if organ in expert_set.organs] for term in terms]

    def _own_phrases(self, expert_set: ExpertSet) -> Mapping[anatomy.Phrase, str]:
        """Phrase → organ, from the set's organs and their bundles' synonyms; the first organ in the set wins."""
        own: dict[anatomy.Phrase, str] = {}
        for organ in expert_set.organs:
            profile = self._profiles.get(organ)
            for term in (organ, *(profile.synonyms if profile else ())):
                for phrase in anatomy.phrases(term):
                    own.setdefault(phrase, organ)
        return own

    def _nearest(self, pooled_D: torch.Tensor, expert_set: ExpertSet) -> str | None:
        pooled_D = pooled_D.float().cpu()
        nearest, highest = None, -torch.inf
        for organ in expert_set.organs:
            profile = self._profiles.get(organ)
            if profile is None or profile.prototype_D is None:
                continue
            similarity = float(F.cosine_similarity(pooled_D, profile.prototype_D.float().cpu(), dim=0))
            if similarity > highest:
                nearest, highest = organ, similarity
        return nearest


def _equal_shares(organs: Sequence[str]) -> tuple[tuple[str, float], ...]:
    return tuple((organ, 1.0 / len(organs)) for organ in organs)
