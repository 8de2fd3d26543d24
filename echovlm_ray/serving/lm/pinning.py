"""Pins requests to expert sets: the current policy, and the expert sets of running requests.

A set is registered in the dispatcher from before its first run is submitted until the engine has released its last one.
Reference counts change under the same lock as assignments, so that Control never sees a set as unused in between.
"""

import asyncio
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from echovlm_ray.serving.cluster.policy_follower import UnusablePolicyError
from echovlm_ray.serving.lm.admission import Admission, PinnedExperts, RequestTraits, UsedBundle
from protos import router_pb2
from router.dispatch.dispatcher import Dispatcher
from router.errors import OrganInCanaryError, OrganPendingError, TooManyOrgansError, UnknownOrganError
from router.gating.expert_gates import BundleGates, ExpertGates
from router.gating.expert_set import ExpertSet
from router.gating.organ_gate import OrganChoice, OrganGate
from router.rollouts.traffic import CandidateTraffic, TrafficPolicy, assign, given_sets, with_candidates

# Sets without a run that stay cached for the next request, in addition to the stable one.
MAX_IDLE_SETS = 16
MAX_ORGAN_GATES = 64


@dataclass(frozen=True, slots=True)
class _Assigned:
    """The sets of one request and the organs that it uses of each."""

    expert_set: ExpertSet
    choice: OrganChoice
    shadow_set: ExpertSet | None
    shadow_choice: OrganChoice


@dataclass(slots=True, eq=False)
class _KnownSet:
    expert_set: ExpertSet
    runs: int = 0


class ExpertSets:
    """The current policy and its expert sets. Thread-safe, except `take_up`."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        organ_gate: OrganGate,
        expert_set: ExpertSet,
        gates: Mapping[str, BundleGates],
        *,
        read: Callable[[str, Collection[str]], BundleGates],
        forget: Callable[[str], None],
        prepare: Callable[[TrafficPolicy], None] = lambda policy: None,
        identity: str = "",
    ) -> None:
        """Starts with the checkpoint's set for all requests, as policy 0.

        Args:
            dispatcher: sets are registered with it and removed from it.
            organ_gate: its settings count; the profiles come with the bundles.
            expert_set: the set.
            gates: bundle digest → what was read, of all its members.
            read: reads a bundle by its digest; also given the digests of all that is in use. Blocks.
            forget: drops what caches keep of a bundle that is not used any more, by its digest.
            prepare: called with a policy before it is in force; may block until its experts can be reached.
            identity: of the deployment; "" takes it from the first policy.

        Raises:
            ValueError: the set's bundles do not fit each other, or it does not have the default organ.
        """
        organ_gate.check(expert_set)
        self._dispatcher = dispatcher
        self._organ_gate = organ_gate
        self._read = read
        self._forget = forget
        self._prepare = prepare
        self._lock = threading.Lock()
        self._policy = TrafficPolicy(version=0, stable=expert_set, identity=identity)
        # The newest one from Control, applied or not.
        self._announced = self._policy
        # What requests may get now, by id.
        self._given = {expert_set.id: expert_set}
        self._gates = dict(gates)
        self._sets: dict[str, _KnownSet] = {}
        self._organ_gates: dict[str, OrganGate] = {}
        self._add(expert_set)

    @property
    def policy(self) -> TrafficPolicy:
        """The current policy."""
        return self._policy

    def pins(self) -> tuple[int, frozenset[str]]:
        """The version of the current policy, and all bundles that it or a running request may use."""
        with self._lock:
            return self._policy.version, self._needed(lambda known: known.runs > 0)

    def route(self, traits: RequestTraits) -> tuple[ExpertSet, OrganChoice]:
        """The assignment of a request with these traits, without pinning it.

        Raises:
            UnknownOrganError: the caller named an organ that there is not.
            OrganPendingError: it named one that is not known here, and a policy is on its way that brings new ones.
            OrganInCanaryError: it named a new organ whose canary serves other requests.
            TooManyOrgansError: it named more than a request may use.
        """
        with self._lock:
            assigned = self._assign(traits)
        return assigned.expert_set, assigned.choice

    def admit(self, traits: RequestTraits) -> Admission:
        """Pins a request. Raises the errors of `route`."""
        with self._lock:
            assigned = self._assign(traits)
            experts = self._hold(assigned.expert_set, assigned.choice)
            shadow = None
            if assigned.shadow_set is not None:
                shadow = self._hold(assigned.shadow_set, assigned.shadow_choice)
            return Admission(experts, shadow)

    def admit_to(self, traits: RequestTraits, expert_set_id: str) -> Admission | None:
        """Pins a request to a set of the policy or of a running request; None if it is another one.

        Raises what `route` raises.
        """
        with self._lock:
            known = self._sets.get(expert_set_id)
            expert_set = self._given.get(expert_set_id) if known is None else known.expert_set
            return None if expert_set is None else self._admit_to(traits, expert_set)

    async def admit_replayed(self, traits: RequestTraits, expert_set: ExpertSet) -> Admission:
        """Pins a request to the set of a replay, which is dropped when its last run has ended.

        Raises:
            UnusablePolicyError: it is for another backbone or another routing.
            Exception: what `route` raises, or one of its bundles cannot be read.
        """
        self._check_kind(expert_set)
        digests = {member.bundle_digest for member in expert_set.members}
        while True:
            read, gates = await asyncio.to_thread(self._read_set, expert_set)
            dropped: list[str] = []
            try:
                with self._lock:
                    # Meanwhile the last run may have ended of a set that had one of its bundles.
                    if digests <= {*read, *self._gates}:
                        self._gates.update(read)
                        self._add(expert_set, gates)
                        try:
                            return self._admit_to(traits, expert_set)
                        finally:
                            dropped = self._drop_unused()
            finally:
                self._forget_all(dropped)

    def admit_evaluation(self, traits: RequestTraits, digest: str) -> PinnedExperts:
        """Pins a request of an evaluation to the stable set, or to that with one candidate, for any traffic of it.

        Args:
            traits: of the request.
            digest: the candidate's bundle, or a stable one.

        Raises:
            OrganPendingError: the policy in force has no such bundle; a later one may bring it.
            UnknownOrganError: the request names an organ that the set does not have.
            TooManyOrgansError: it names more than a request may use.
        """
        with self._lock:
            policy = self._policy
            candidate = next((each for each in policy.candidates if each.digest == digest), None)
            if candidate is None and all(member.bundle_digest != digest for member in policy.stable.members):
                raise OrganPendingError
            expert_set = policy.stable if candidate is None else with_candidates(policy.stable, [candidate])
            return self._hold(expert_set, self._choose(expert_set, traits))

    def announce(self, policy: TrafficPolicy) -> None:
        """Announces a policy of Control before `take_up` is called with it."""
        with self._lock:
            if policy.version > self._announced.version:
                self._announced = policy

    async def take_up(self, policy: TrafficPolicy) -> bool:
        """Applies a policy to new requests, after reading the gate rows of all its bundles. Not thread-safe.

        If a bundle cannot be read, the previous policy stays.

        Returns:
            False, without effect, if this policy or a later one is applied already.

        Raises:
            UnusablePolicyError: it is another deployment's, or for another backbone or another routing.
            Exception: one of its bundles cannot be read, or does not fit the others; a later try may succeed.
        """
        own_identity = self._policy.identity
        if own_identity and policy.identity and policy.identity != own_identity:
            raise UnusablePolicyError(
                f"it is of the deployment {policy.identity[:12]}…, and this router belongs to {own_identity[:12]}…"
            )
        if policy.version <= self._policy.version:
            return False
        try:
            self._check_kind(policy.stable)
        except UnusablePolicyError:
            with self._lock:
                self._announced = self._policy
            raise
        while True:
            read, stable_gates = await asyncio.to_thread(self._read_all, policy)
            with self._lock:
                # Meanwhile the last run may have ended of a set that had one of its bundles.
                if all(digest in read or digest in self._gates for digest in policy.digests):
                    dropped = self._put_in_force(policy, read, stable_gates)
                    break
        self._forget_all(dropped)
        return True

    def _check_kind(self, expert_set: ExpertSet) -> None:
        for field in ("backbone_digest", "routing"):
            given, own = getattr(expert_set, field), getattr(self._policy.stable, field)
            if given != own:
                raise UnusablePolicyError(f"it has the {field} {given!r}, and this router serves {own!r}")

    def _read_set(self, expert_set: ExpertSet) -> tuple[dict[str, BundleGates], ExpertGates]:
        """What is missing of a set, and the gates of the whole."""
        with self._lock:
            known = dict(self._gates)
        digests = sorted({member.bundle_digest for member in expert_set.members} - set(known))
        missing = {digest: self._read(digest, self.pins()[1]) for digest in digests}
        return missing, ExpertGates.of(expert_set, known | missing)

    def _read_all(self, policy: TrafficPolicy) -> tuple[dict[str, BundleGates], ExpertGates]:
        """What is missing, checked together with what is there; and the stable set's gates."""
        with self._lock:
            known = dict(self._gates)
        digests = sorted(policy.digests - set(known))
        missing = {digest: self._read(digest, self.pins()[1]) for digest in digests}
        if policy.candidates:
            ExpertGates.of(with_candidates(policy.stable, policy.candidates), known | missing)
        stable_gates = ExpertGates.of(policy.stable, known | missing)
        self._prepare(policy)
        return missing, stable_gates

    def _put_in_force(
        self, policy: TrafficPolicy, read: Mapping[str, BundleGates], stable_gates: ExpertGates
    ) -> list[str]:
        self._gates.update(read)
        self._policy = policy
        self._given = {expert_set.id: expert_set for expert_set in given_sets(policy)}
        self._organ_gates.clear()
        self._add(policy.stable, stable_gates)
        return self._drop_unused()

    def _assign(self, traits: RequestTraits) -> _Assigned:
        policy = self._policy
        key = {"request_id": traits.request_id, "session_key": traits.session_key}
        # All candidates that this request would get: of an organ that only a candidate has, whether it may use it.
        offered = assign(policy, None, **key)
        try:
            choice = self._choose(offered.expert_set, traits)
        except UnknownOrganError:
            self._check_new_organs(offered.expert_set, traits)
            raise
        assignment = assign(policy, _organs_of(choice), **key)
        shadow_choice, shadow_set = choice, assignment.shadow_set
        if offered.shadow_set is not None and len(offered.shadow_set.members) > len(offered.expert_set.members):
            shadow_choice = self._choose(offered.shadow_set, traits)
            shadow_set = assign(policy, _organs_of(shadow_choice), **key).shadow_set
        return _Assigned(assignment.expert_set, choice, shadow_set, shadow_choice)

    def _check_new_organs(self, offered: ExpertSet, traits: RequestTraits) -> None:
        """Raises a more specific error than "unknown organ" for a new organ that does not serve this request, or not
        yet.
        """
        policy, announced = self._policy, self._announced
        new = set(announced.organs) - set(policy.organs) | set(announced.stable.organs) - set(policy.stable.organs)
        # By which words a bundle is named is known only once its gates are read, so any unknown word may mean it.
        if new or traits.policy_version > policy.version:
            raise OrganPendingError
        canaries = [each for each in policy.candidates if each.mode == "canary" and each.organ not in offered.organs]
        if not canaries or not traits.organs:
            return
        try:
            choice = self._choose(with_candidates(offered, canaries), traits)
        except (UnknownOrganError, TooManyOrgansError):
            return
        for organ, _ in choice.shares:
            for canary in canaries:
                if canary.organ == organ:
                    raise OrganInCanaryError(organ, canary.percent)

    def _choose(self, expert_set: ExpertSet, traits: RequestTraits) -> OrganChoice:
        gate = self._organ_gates.get(expert_set.id)
        if gate is None:
            if len(self._organ_gates) >= MAX_ORGAN_GATES:
                self._organ_gates.clear()
            profiles = [self._gates[member.bundle_digest].profile for member in expert_set.members]
            gate = self._organ_gates[expert_set.id] = self._organ_gate.with_profiles(profiles)
        return gate.choose(traits.organs, traits.anatomy_terms, traits.pooled_D, expert_set)

    def _admit_to(self, traits: RequestTraits, expert_set: ExpertSet) -> Admission:
        return Admission(self._hold(expert_set, self._choose(expert_set, traits)))

    def _hold(self, expert_set: ExpertSet, choice: OrganChoice) -> PinnedExperts:
        known = self._add(expert_set)
        known.runs += 1
        organs = _organs_of(choice) or expert_set.organs
        used = tuple(self._used(organ, expert_set.bundle_digest(organ)) for organ in organs)
        return PinnedExperts(expert_set, choice, used, lambda: self._release(known))

    def _used(self, organ: str, digest: str) -> UsedBundle:
        return UsedBundle(organ, digest, self._gates[digest].version, _candidate(self._policy, organ, digest))

    def _release(self, known: _KnownSet) -> None:
        with self._lock:
            known.runs -= 1
            assert known.runs >= 0, "a run let go of its experts twice"
            if known.runs:
                return
            # Put last: the first of those without a run is the one that was not used for longest.
            self._sets[known.expert_set.id] = self._sets.pop(known.expert_set.id)
            dropped = self._drop_unused()
        self._forget_all(dropped)

    def _add(self, expert_set: ExpertSet, gates: ExpertGates | None = None) -> _KnownSet:
        known = self._sets.get(expert_set.id)
        if known is None:
            self._dispatcher.add_set(gates if gates is not None else ExpertGates.of(expert_set, self._gates))
            known = self._sets[expert_set.id] = _KnownSet(expert_set)
        return known

    def _drop_unused(self) -> list[str]:
        """Drops unused sets and returns the digests of their bundles, whose cache entries must be evicted."""
        idle = [known for known in self._sets.values() if not known.runs]
        given = [known for known in idle if _is_given(self._policy, known.expert_set)]
        kept = [known for known in given if known.expert_set.id != self._policy.stable.id][-MAX_IDLE_SETS:]
        for known in idle:
            if known not in kept and known.expert_set.id != self._policy.stable.id:
                del self._sets[known.expert_set.id]
                self._dispatcher.remove_set(known.expert_set.id)
        needed = self._needed(lambda _: True)
        dropped = [digest for digest in self._gates if digest not in needed]
        for digest in dropped:
            del self._gates[digest]
        return dropped

    def _needed(self, counts: Callable[[_KnownSet], bool]) -> frozenset[str]:
        held = {
            member.bundle_digest
            for known in self._sets.values()
            if counts(known)
            for member in known.expert_set.members
        }
        return self._policy.digests | held

    def _forget_all(self, digests: Sequence[str]) -> None:
        # Without the lock: the thread that releases a run may have the engine's.
        for digest in digests:
            self._forget(digest)


def _organs_of(choice: OrganChoice) -> tuple[str, ...] | None:
    """The organs that a request uses; none for flat sets, which use all."""
    if choice.source == router_pb2.ORGAN_SOURCE_FLAT:
        return None
    return tuple(organ for organ, _ in choice.shares)


def _candidate(policy: TrafficPolicy, organ: str, digest: str) -> CandidateTraffic | None:
    found = (each for each in policy.candidates if each.organ == organ and each.digest == digest)
    return next(found, None)


def _is_given(policy: TrafficPolicy, expert_set: ExpertSet) -> bool:
    """Whether some request may still get a set."""
    digests = {member.bundle_digest for member in expert_set.members}
    return digests <= policy.digests and set(policy.stable.organs) <= set(expert_set.organs)
