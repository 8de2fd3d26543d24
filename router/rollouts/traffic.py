"""Traffic splitting: which requests a candidate gets; sticky, uniform, and decided by every Router alike."""

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

# Ten canaries at one time; of more, the sets with most candidates are left out.
MAX_GIVEN_SETS = 1024


class CandidateTraffic(BaseModel):
    """An organ's candidate, and the part of the requests that it gets."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    organ: str
    digest: str
    rollout_id: str
    mode: Mode
    percent: float = Field(ge=0, le=100)


class TrafficPolicy(BaseModel):
    """What Routers apply to new requests. Requests under way keep the set that they were given.

    Attributes:
        version: a later policy has a larger number; a Router never goes back.
        stable: the set of requests that get no candidate.
        candidates: at most one per organ.
        identity: of the deployment; a Router takes up no other's. "" where it is not known.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: int
    stable: ExpertSet
    candidates: tuple[CandidateTraffic, ...] = ()
    identity: str = ""

    @classmethod
    def of(cls, snapshot: Snapshot) -> Self:
        """The policy that a state of the database asks for.

        A candidate that is evaluated before it has traffic is a shadow of no request: Routers then know its gates.
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
        """Only strings, numbers, lists and dicts."""
        return self.model_dump(mode="json")

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> Self:
        """The inverse of `to_dict`.

        Raises:
            ValidationError: it is no policy.
        """
        return cls.model_validate(value)

    @property
    def organs(self) -> tuple[str, ...]:
        """All organs that some request may use: the stable set's, then those that only a candidate has."""
        new = [candidate.organ for candidate in self.candidates if candidate.organ not in self.stable.organs]
        return (*self.stable.organs, *new)

    @property
    def content_digest(self) -> str:
        """SHA-256 over all but the number: the same for policies that say the same."""
        return digest_of(self.model_dump(mode="json", exclude={"version"}))

    @property
    def digests(self) -> frozenset[str]:
        """All bundles that a new request may get: what a Router that applies this policy pins at least."""
        stable = {member.bundle_digest for member in self.stable.members}
        return frozenset(stable | {candidate.digest for candidate in self.candidates})


@dataclass(frozen=True, slots=True)
class Assignment:
    """The experts of one request.

    Attributes:
        expert_set: what answers.
        shadow_set: what is computed beside it and is not answered, or none.
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
    """The sets of one request.

    The same key gets the same answer from every Router, for as long as the rollout and its percentage stay; a larger
    percentage only adds requests. What a key gets of one organ or rollout says nothing about any other.

    Args:
        policy: the policy that the Router applies now.
        organs: the organs that the request uses; none where all are used, as with flat routing.
        request_id: decides where there is no session.
        session_key: when given, all requests with it get the same experts.
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
    """A set with other bundles for some organs; an organ that it does not have comes last. The set itself stays."""
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
    # In whole numbers: 100 % is all of them, without a rounding that leaves one out.
    return bucket < round(candidate.percent * 2**64 / 100)
