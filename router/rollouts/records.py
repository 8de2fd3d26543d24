"""The contents of the database as frozen dataclasses."""

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
    """A live organ and its stable bundle.

    Attributes:
        previous: earlier stable bundles, the newest last.
    """

    organ: str
    stable_digest: str
    previous: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Rollout:
    """One rollout of a bundle for an organ.

    Attributes:
        id: never reused, for example "heart-12".
        incumbent_digest: the stable version at the time of staging; None for a new organ.
        percent: the share of the requests, in shadow and canary.
        reason: why it is in its state, or "".
        actor: the operator who staged it.
        restores: whether it restores an earlier stable version; then only the controller moves it.
        automatic: whether the plan's steps still run.
        next_step: how many of the plan's steps have begun.
        state_since: seconds since 1970.
        traffic_since: when it first got requests, in seconds since 1970.
        verify_attempts: verifications begun, including those that crashed their process.
        replica_losses: replicas that died while they loaded it.
        watching: whether it is still judged after its promotion.
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
        """Whether the rollout has not ended."""
        return self.state in IN_FLIGHT

    @property
    def mode(self) -> Mode | None:
        """How it gets requests, or None."""
        if self.state not in WITH_TRAFFIC:
            return None
        return "canary" if self.state == State.CANARY else "shadow"

    @property
    def subject(self) -> str:
        """Its name in errors and logs."""
        return f"the rollout of {self.organ!r} ({self.id}, bundle {self.digest[:12]}…)"


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A consistent snapshot of the state for all decisions.

    Attributes:
        sequence: the number of the newest history entry, which never decreases.
        organs: in the live set's order.
        in_flight: at most one rollout per organ.
        known_organs: all organs that were ever live or staged; their replicas may still hold bundles.
        retired: (organ, digest) of retired versions; the digest of a retired organ is "".
        ended: (organ, digest) of recently ended rollouts; requests may still be pinned to them.
        watched: stable rollouts that are still judged after their promotion.
        identity: the deployment's identity.
        policy_offset: added to `sequence` to number the policy.
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
        """The live organ of this name, or None."""
        return next((live for live in self.organs if live.organ == organ), None)

    def candidate(self, organ: str) -> Rollout | None:
        """An organ's rollout in flight, or None."""
        return next((rollout for rollout in self.in_flight if rollout.organ == organ), None)

    def rollback_target(self, organ: str) -> str | None:
        """The previous version, which stays in memory for a rollback while the stable one is watched; or None."""
        live = self.live(organ)
        if live is None or not live.previous or all(rollout.organ != organ for rollout in self.watched):
            return None
        return live.previous[-1]

    def earlier(self, organ: str) -> frozenset[str]:
        """Versions that running requests may be pinned to, and new requests are not assigned to."""
        live = self.live(organ)
        ended = {digest for known, digest in self.ended if known == organ}
        return frozenset(ended.union(live.previous if live else ()))

    def expert_set(self) -> ExpertSet:
        """The stable expert set, without candidates."""
        members = tuple(ExpertSetMember(organ=live.organ, bundle_digest=live.stable_digest) for live in self.organs)
        return ExpertSet(backbone_digest=self.backbone_digest, routing=self.routing, members=members)


def live_organ_of_row(row: "Row[Any]") -> LiveOrgan:
    """Reads a row of the table `live_organs`."""
    return LiveOrgan(row.organ, row.stable_digest, tuple(json.loads(row.previous)))


def not_adopted() -> RolloutStateError:
    """The error for a database without a live set."""
    return RolloutStateError("the rollouts' database has no live expert set yet: adopt one when the system starts")
