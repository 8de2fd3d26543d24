"""An expert set: the immutable choice of one bundle per organ that a request is pinned to."""

from collections.abc import Iterable
from functools import cached_property
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, model_validator

from experts.bundles.digest import digest_of

Routing = Literal["organs", "flat"]


class ExpertSetMember(BaseModel):
    """One organ and its bundle."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    organ: str
    bundle_digest: str


class ExpertSet(BaseModel):
    """One bundle for each organ, for one backbone.

    The order of the members is the order in which partial sums of different organs are added, so it is part of the
    identity.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    backbone_digest: str
    routing: Routing
    members: tuple[ExpertSetMember, ...]

    @model_validator(mode="after")
    def _organs_are_distinct(self) -> Self:
        if not self.members:
            raise ValueError("an expert set needs at least one organ")
        organs = [member.organ for member in self.members]
        if repeated := sorted({organ for organ in organs if organs.count(organ) > 1}):
            raise ValueError(f"an expert set has one bundle per organ, but {', '.join(repeated)} occurs twice")
        return self

    @cached_property
    def id(self) -> str:
        """SHA-256 over the canonical form."""
        return digest_of(self.model_dump(mode="json"))

    @property
    def organs(self) -> tuple[str, ...]:
        """The organs in the set's order."""
        return tuple(member.organ for member in self.members)

    def used(self, shares: Iterable[tuple[str, float]]) -> tuple[ExpertSetMember, ...]:
        """The members that a request with these organs uses, in the set's order; all members of a flat set."""
        if self.routing == "flat":
            return self.members
        organs = {organ for organ, _ in shares}
        return tuple(member for member in self.members if member.organ in organs)

    def bundle_digest(self, organ: str) -> str:
        """The bundle of an organ.

        Raises:
            KeyError: the set has no such organ.
        """
        for member in self.members:
            if member.organ == organ:
                return member.bundle_digest
        raise KeyError(organ)
