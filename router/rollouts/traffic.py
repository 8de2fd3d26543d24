"""Traffic splitting: which requests a candidate gets. Sticky, uniform, and the same in every Router."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, combinations, islice
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field

from experts.bundles.digest import digest_of
from router.gating.expert_set import ExpertSet, ExpertSetMember
from router.rollouts.records import Snapshot
from router.rollouts.settings import Mode
from router.rollouts.states import State

# Enough for ten canaries at a time; with more, the sets with most candidates are omitted.
MAX_GIVEN_SETS = 1024


class CandidateTraffic(BaseModel):
    """An organ's candidate and its share of the requests."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    organ: str
    digest: str
    rollout_id: str
    mode: Mode
    percent: float = Field(ge=0, le=100)


class TrafficPolicy(BaseModel):
    """The assignment of new requests to expert sets. Running requests keep their set.

    Attributes:
        version: increases with every policy; a Router never applies an older one.
        stable: the expert set of requests without a candidate.
        candidates: at most one for each organ.
        identity: the deployment's identity; a Router applies no policy of another one. "" if it is unknown.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: int
    stable: ExpertSet
    candidates: tuple[CandidateTraffic, ...] = ()
    identity: str = ""

    @classmethod
    def of(cls, snapshot: Snapshot) -> Self:
        """The policy for a state of the database.

        A candidate that is evaluated before it has traffic is a shadow with 0 %, so that Routers load its gate rows.
        """
        candidates = tuple(
            CandidateTraffic(
                organ=rollout.organ,
                digest=rollout.digest,
                rollout_id=rollout.id,
                mode=rollout.mode or "shadow",
                percent=rollout.percent or 0.0,
            )
            for rollout in sorted(snapshot.in_flight, key=lambda rollout: rollout.organ)
            if rollout.mode is not None or (rollout.state == State.WARM and rollout.plan.gates)
        )
        return cls(
            version=snapshot.sequence + snapshot.policy_offset,
            stable=snapshot.expert_set(),
            candidates=candidates,
            identity=snapshot.identity,
        )

    def to_dict(self) -> dict[str, Any]:
        """The policy as strings, numbers, lists and dicts."""
        return self.model_dump(mode="json")

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> Self:
        """The inverse of `to_dict`.

        Raises:
            ValidationError: it is not a policy.
        """
        return cls.model_validate(value)

    @property
    def organs(self) -> tuple[str, ...]:
        """All organs that requests may use: the stable set's, then new organs of candidates."""
        new = [candidate.organ for candidate in self.candidates if candidate.organ not in self.stable.organs]
        return (*self.stable.organs, *new)

    @property
    def content_digest(self) -> str:
        """SHA-256 over all fields except the version: equal for equal assignments."""
        return digest_of(self.model_dump(mode="json", exclude={"version"}))

    @property
    def digests(self) -> frozenset[str]:
        """All bundles that new requests may get. A Router that applies this policy pins at least these."""
        stable = {member.bundle_digest for member in self.stable.members}
        return frozenset(stable | {candidate.digest for candidate in self.candidates})


@dataclass(frozen=True, slots=True)
class Assignment:
    """The experts of one request.

    Attributes:
        expert_set: the expert set that answers.
        shadow_set: the expert set of the shadow, or None.
    """

    expert_set: ExpertSet
    shadow_set: ExpertSet | None = None


def assign(
    policy: TrafficPolicy,
    organs: Iterable[str] | None,
    *,
    request_id: str,
    session_key: str = "",
) -> Assignment:
    """Assigns expert sets to one request.

    All Routers assign the same key to the same set while the rollout and its percentage stay; a larger percentage only
    adds requests. Assignments of different organs and rollouts are independent.

    Args:
        policy: the policy that the Router applies now.
        organs: the organs that the request uses; None for all organs, as with flat routing.
        request_id: the key if there is no session key.
        session_key: all requests with the same one get the same experts.
    """
    key = f"session\0{session_key}" if session_key else f"request\0{request_id}"
    wanted = None if organs is None else frozenset(organs)
    chosen = [
        candidate
        for candidate in policy.candidates
        if (wanted is None or candidate.organ in wanted) and _is_chosen(candidate, key)
    ]
    expert_set = with_candidates(policy.stable, [candidate for candidate in chosen if candidate.mode == "canary"])
    shadows = [candidate for candidate in chosen if candidate.mode == "shadow"]
    return Assignment(expert_set, with_candidates(expert_set, shadows) if shadows else None)


def given_sets(policy: TrafficPolicy) -> Iterator[ExpertSet]:
    """The sets that requests may get under a policy: the stable one, then those with one canary, with two, and so on.
    At most `MAX_GIVEN_SETS`.
    """
    canaries = [candidate for candidate in policy.candidates if candidate.mode == "canary"]
    chosen = chain.from_iterable(combinations(canaries, count) for count in range(len(canaries) + 1))
    return (with_candidates(policy.stable, candidates) for candidates in islice(chosen, MAX_GIVEN_SETS))


def with_candidates(expert_set: ExpertSet, candidates: Iterable[CandidateTraffic]) -> ExpertSet:
    """A copy of a set with other bundles for some organs; new organs come last."""
    digests = {candidate.organ: candidate.digest for candidate in candidates}
    if not digests:
        return expert_set
    members = [
        ExpertSetMember(organ=member.organ, bundle_digest=digests.pop(member.organ, member.bundle_digest))
        for member in expert_set.members
    ]
    members += [ExpertSetMember(organ=organ, bundle_digest=digest) for organ, digest in digests.items()]
    return ExpertSet(backbone_digest=expert_set.backbone_digest, routing=expert_set.routing, members=tuple(members))


def _is_chosen(candidate: CandidateTraffic, key: str) -> bool:
    text = f"{candidate.organ}\0{candidate.rollout_id}\0{key}"
    bucket = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
    # In integers, so that 100 % is all requests without a rounding error.
    return bucket < round(candidate.percent * 2**64 / 100)
