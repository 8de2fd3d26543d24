"""The contents of the database as plain frozen objects."""

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from router.errors import RolloutStateError
from router.gating.expert_set import ExpertSet, ExpertSetMember, Routing
from router.rollouts.settings import Mode, RolloutPlan
from router.rollouts.states import IN_FLIGHT, WITH_TRAFFIC, State

if TYPE_CHECKING:
    # Only Control reads the database; routers know these objects too.
    from sqlalchemy import Row


@dataclass(frozen=True, slots=True)
class LiveOrgan:
    """An organ that is served, and by which bundle.

    Attributes:
        previous: the bundles that were stable before, the last one newest.
    """

    organ: str
    stable_digest: str
    previous: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Rollout:
    """One attempt to bring a bundle to an organ.

    Attributes:
        id: unique forever, for example "heart-12".
        incumbent_digest: what was stable when it was staged; none for a new organ.
        percent: of the requests, in shadow and canary.
        reason: why it is in its state, where there is something to say.
        actor: who staged it.
        restores: whether it brings back an earlier stable version; only the controller moves it.
        automatic: whether the plan's steps are still followed.
        next_step: how many of the plan's steps were begun.
        state_since: seconds since 1970.
        traffic_since: when requests first reached it.
        verify_attempts: verifications begun, also by processes that died of them.
        replica_losses: replicas that were lost while they loaded it.
        watching: whether it is judged after its promotion, if it is stable.
    """

    id: str
    sequence: int
    organ: str
    digest: str
    incumbent_digest: str | None
    state: State
    percent: float | None
    reason: str
    actor: str
    restores: bool
    plan: RolloutPlan
    automatic: bool
    next_step: int
    created_at: float
    state_since: float
    traffic_since: float | None
    verify_attempts: int
    replica_losses: int
    watching: bool = False

    @classmethod
    def of_row(cls, row: "Row[Any]") -> Self:
        """Reads a row of the table `rollouts`."""
        fields = dict(row._mapping)
        fields["state"] = State(fields["state"])
        fields["plan"] = RolloutPlan.model_validate_json(fields["plan"])
        return cls(**fields)

    @property
    def in_flight(self) -> bool:
        """Whether it has not ended."""
        return self.state in IN_FLIGHT

    @property
    def mode(self) -> Mode | None:
        """How requests reach it, if they do."""
        if self.state not in WITH_TRAFFIC:
            return None
        return "canary" if self.state == State.CANARY else "shadow"

    @property
    def subject(self) -> str:
        """What errors and logs call it."""
        return f"the rollout of {self.organ!r} ({self.id}, bundle {self.digest[:12]}…)"


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All that decisions are made from, at one moment.

    Attributes:
        sequence: the number of the newest history entry: a later snapshot never has a smaller one.
        organs: in the live set's order.
        in_flight: at most one rollout per organ.
        known_organs: all that were ever served or staged: a replica of any of them may still hold something.
        retired: (organ, digest) of what was retired; the digest of a whole organ is "".
        ended: (organ, digest) of the rollouts that ended last: requests may still be pinned to them.
        watched: the stable ones that are judged after their promotion.
        identity: of the deployment.
        policy_offset: what is added to `sequence` to number the policy.
    """

    sequence: int
    backbone_digest: str
    routing: Routing
    organs: tuple[LiveOrgan, ...]
    in_flight: tuple[Rollout, ...]
    known_organs: tuple[str, ...]
    retired: frozenset[tuple[str, str]]
    ended: frozenset[tuple[str, str]] = frozenset()
    watched: tuple[Rollout, ...] = ()
    identity: str = ""
    policy_offset: int = 0

    def live(self, organ: str) -> LiveOrgan | None:
        """An organ that is served, or none."""
        return next((live for live in self.organs if live.organ == organ), None)

    def candidate(self, organ: str) -> Rollout | None:
        """An organ's rollout in flight, or none."""
        return next((rollout for rollout in self.in_flight if rollout.organ == organ), None)

    def kept(self, organ: str) -> str | None:
        """The version that an organ's stable one replaced, which stays in memory to go back to; none without one."""
        live = self.live(organ)
        if live is None or not live.previous or all(rollout.organ != organ for rollout in self.watched):
            return None
        return live.previous[-1]

    def earlier(self, organ: str) -> frozenset[str]:
        """The versions that an organ's requests may have begun with, and new ones do not get."""
        live = self.live(organ)
        ended = {digest for known, digest in self.ended if known == organ}
        return frozenset(ended.union(live.previous if live else ()))

    def expert_set(self) -> ExpertSet:
        """The stable set: what new requests get, candidates apart."""
        members = tuple(ExpertSetMember(organ=live.organ, bundle_digest=live.stable_digest) for live in self.organs)
        return ExpertSet(backbone_digest=self.backbone_digest, routing=self.routing, members=members)


def live_organ_of_row(row: "Row[Any]") -> LiveOrgan:
    """Reads a row of the table `live_organs`."""
    return LiveOrgan(row.organ, row.stable_digest, tuple(json.loads(row.previous)))


def not_adopted() -> RolloutStateError:
    """The error for a database that no live set was ever written to."""
    return RolloutStateError("the rollouts' database has no live expert set yet: adopt one when the system starts")
