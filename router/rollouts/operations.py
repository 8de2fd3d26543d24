"""The operators' operations. Each is one transaction; the controller does the rest.

All of them block and may be called from any thread. With `dry_run` an operation makes the same checks, raises the same
errors and describes its steps, but changes nothing. Operations are idempotent: one that changes nothing is not in the
history.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from router.errors import InvalidRolloutRequestError, RolloutStateError
from router.rollouts.argument_checks import check_actor, check_digest, check_organ, check_percent
from router.rollouts.fleet import Fleet
from router.rollouts.formatting import stage_steps, traffic_steps
from router.rollouts.gate_operations import GateOperations, check_gates, check_override
from router.rollouts.gates import Evaluator, Gate
from router.rollouts.operation_checks import already, already_applied, checked_candidate
from router.rollouts.outcome import Outcome, memory_plan, not_resident
from router.rollouts.precondition import NO_PRECONDITION, Names, Precondition
from router.rollouts.records import Rollout
from router.rollouts.retiring import organ_to_retire, version_to_retire
from router.rollouts.rollback import candidate_to_roll_back, version_to_restore
from router.rollouts.rollout_file import RolloutFile
from router.rollouts.settings import RolloutPlan, RolloutSettings
from router.rollouts.staging import resolved, version_to_stage
from router.rollouts.states import Action, State
from router.rollouts.store import RolloutStore
from router.rollouts.transaction import Transaction

MANUAL = RolloutPlan()


class RolloutOperations:
    """The operations on a store and a fleet."""

    def __init__(
        self,
        store: RolloutStore,
        fleet: Fleet,
        settings: RolloutSettings,
        version_of: Names = lambda digest: "",
        evaluator: Evaluator | None = None,
    ) -> None:
        """
        Args:
            store: the state.
            fleet: the replicas.
            settings: the defaults.
            version_of: digest → version, for messages; "" if it is unknown.
            evaluator: evaluates gates; without one, gates are refused.
        """
        self._store = store
        self._fleet = fleet
        self._settings = settings
        self._names: Names = lambda digest: version_of(digest) or f"{digest[:12]}…"
        self._gates = GateOperations(store, evaluator, self._names)

    def stage(
        self,
        organ: str,
        digest: str,
        *,
        actor: str,
        reason: str = "",
        plan: RolloutPlan = MANUAL,
        dry_run: bool = False,
    ) -> Outcome:
        """Begins a rollout: the bundle is verified and loaded on every replica, without traffic.

        An organ that is not in the live set is a new organ.

        Args:
            organ: the organ.
            digest: the bundle's digest.
            actor: the operator.
            reason: the reason for the history.
            plan: the automatic steps once it is warm.
            dry_run: only describe the steps.

        Raises:
            InvalidRolloutRequestError: the organ, digest or actor is invalid.
            RolloutStateError: another rollout of the organ is in flight, or the version was retired.
        """
        return self._stage(organ, digest, actor=actor, reason=reason, plan=plan, dry_run=dry_run)

    def apply(
        self, file: RolloutFile, resolve: Callable[[str, str], str], *, actor: str, dry_run: bool = False
    ) -> Outcome:
        """Begins the rollout that a file describes. Applying the same file again changes nothing.

        Args:
            file: the file.
            resolve: organ and version → digest; may raise the registry's errors.
            actor: the operator.
            dry_run: only describe the steps.

        Raises:
            InvalidRolloutRequestError: a gate that cannot be evaluated.
            RolloutStateError: another rollout of the organ is in flight, or the version was retired.
        """
        digest = file.digest or resolve(file.organ, file.version or "")
        identity = file.identity(digest)
        with self._store.read() as transaction:
            # The datasets of a file that was applied before may not exist any more.
            if applied := transaction.applied(identity):
                return Outcome(file.organ, False, (already_applied(applied),), applied)
            has_incumbent = transaction.snapshot().live(file.organ) is not None
        gates = self._gates.declared(file.gates, file.organ, has_incumbent)
        return self._stage(
            file.organ,
            digest,
            actor=actor,
            reason=file.reason,
            plan=file.plan.model_copy(update={"gates": gates}),
            dry_run=dry_run,
            file_digest=identity,
        )

    def canary(
        self,
        organ: str,
        percent: float,
        *,
        actor: str,
        reason: str = "",
        digest: str | None = None,
        expected: Precondition = NO_PRECONDITION,
        dry_run: bool = False,
        gates: Sequence[Gate] = (),
        override: bool = False,
    ) -> Outcome:
        """Sends a share of the requests to the candidate. Ends the plan's automatic steps.

        Args:
            organ: the organ.
            percent: above 0, at most 100.
            actor: the operator.
            reason: the reason for the history.
            digest: when given, only if this is the candidate.
            expected: the precondition.
            dry_run: only describe the steps.
            gates: evaluations that the candidate must pass first; then the operation follows automatically.
            override: ignore gates that failed or are not evaluated yet; needs a reason.

        Raises:
            InvalidRolloutRequestError: the percentage is out of bounds, a gate cannot be evaluated, or the reason is
                missing.
            UnknownOrganError: there is no such organ.
            RolloutStateError: there is no candidate, it is not warm on every replica, it has not passed its gates, or
                the precondition does not hold.
        """
        percent = check_percent(percent)
        if gates:
            return self._demand(
                Action.CANARY, organ, percent, gates, override, actor, reason, digest, expected, dry_run
            )
        return self._advance(Action.CANARY, organ, percent, actor, reason, digest, expected, dry_run, override)

    def shadow(
        self,
        organ: str,
        percent: float,
        *,
        actor: str,
        reason: str = "",
        digest: str | None = None,
        expected: Precondition = NO_PRECONDITION,
        dry_run: bool = False,
    ) -> Outcome:
        """Mirrors a share of the requests to the candidate. The incumbent answers; the candidate's answers are
        discarded.

        Arguments and errors as in `canary`. A new organ cannot be shadowed, because it has no incumbent.
        """
        percent = check_percent(percent)
        return self._advance(Action.SHADOW, organ, percent, actor, reason, digest, expected, dry_run)

    def promote(
        self,
        organ: str,
        *,
        actor: str,
        reason: str = "",
        digest: str | None = None,
        expected: Precondition = NO_PRECONDITION,
        dry_run: bool = False,
        gates: Sequence[Gate] = (),
        override: bool = False,
    ) -> Outcome:
        """Makes the candidate the organ's version for all new requests, in one transaction.

        Arguments and errors as in `canary`.
        """
        if gates:
            return self._demand(Action.PROMOTE, organ, None, gates, override, actor, reason, digest, expected, dry_run)
        return self._advance(Action.PROMOTE, organ, None, actor, reason, digest, expected, dry_run, override)

    def rollback(
        self,
        organ: str,
        *,
        actor: str,
        reason: str = "",
        digest: str | None = None,
        expected: Precondition = NO_PRECONDITION,
        dry_run: bool = False,
    ) -> Outcome:
        """Rolls back the candidate. Never changes the stable version; see `roll_back_stable`.

        Args:
            organ: the organ.
            actor: the operator.
            reason: the reason for the history.
            digest: when given, only if this is the candidate.
            expected: the precondition; without a rollout's id it applies to any candidate in flight.
            dry_run: only describe the steps.

        Raises:
            UnknownOrganError: there is no such organ.
            UnknownRolloutError: there is no such rollout.
            RolloutStateError: nothing is in flight, or the precondition does not hold; the text has the last event.
        """
        check_actor(actor)
        with self._transaction(dry_run) as transaction:
            found = candidate_to_roll_back(transaction, organ, digest, expected, self._names)
            if isinstance(found, Outcome):
                return found
            if not dry_run:
                reason = reason or "asked by an operator"
                found = transaction.move(found, Action.ROLL_BACK, actor=actor, reason=reason)
        steps = (
            "the candidate gets no new request; those under way end with it",
            "then it is unloaded from all replicas",
        )
        return Outcome(organ, True, steps, found)

    def roll_back_stable(
        self,
        organ: str,
        digest: str,
        *,
        actor: str,
        reason: str = "",
        expected: Precondition = NO_PRECONDITION,
        dry_run: bool = False,
    ) -> Outcome:
        """Rolls back an organ's stable version to the previous one.

        The controller verifies, loads and promotes the previous version; the stable one serves until then.

        Args:
            organ: the organ.
            digest: the version to roll back, which must be the stable one.
            actor: the operator.
            reason: the reason for the history.
            expected: the precondition.
            dry_run: only describe the steps.

        Raises:
            UnknownOrganError: there is no such organ.
            RolloutStateError: another version is stable, a candidate is in flight, or there is no previous version.
        """
        check_actor(actor)
        check_digest(digest)
        with self._transaction(dry_run) as transaction:
            previous = version_to_restore(transaction, organ, digest, expected, self._names)
            if isinstance(previous, Outcome):
                return previous
            rollout = None
            if not dry_run:
                plan = resolved(RolloutPlan(promote=True), self._settings)
                rollout = transaction.stage(organ, previous, plan, actor=actor, reason=reason, restores=True)
        steps = (
            f"{self._names(previous)}, stable before, is verified and loaded on every replica of {organ}",
            f"then it replaces {self._names(digest)} for new requests; until then nothing changes",
        )
        memory = memory_plan(self._fleet, organ, previous) if dry_run else ()
        return Outcome(organ, True, steps, rollout, memory)

    def retire_organ(
        self,
        organ: str,
        *,
        actor: str,
        reason: str = "",
        expected: Precondition = NO_PRECONDITION,
        dry_run: bool = False,
    ) -> Outcome:
        """Removes an organ from the live set. Its bundles are unloaded once no request uses them.

        Raises:
            UnknownOrganError: there is no such organ.
            RolloutStateError: a rollout of it is in flight, it is the last one, or the precondition does not hold.
        """
        check_actor(actor)
        with self._transaction(dry_run) as transaction:
            if done := organ_to_retire(transaction, organ, expected, self._names):
                return done
            if not dry_run:
                transaction.retire_organ(organ, actor=actor, reason=reason)
        steps = (
            f"new requests no longer find {organ}",
            "requests under way end with the experts that they have",
            f"then every version of {organ} is unloaded from its replicas",
        )
        return Outcome(organ, True, steps)

    def retire_version(
        self,
        organ: str,
        digest: str,
        *,
        actor: str,
        reason: str = "",
        expected: Precondition = NO_PRECONDITION,
        dry_run: bool = False,
    ) -> Outcome:
        """Bars a version from staging and from rollbacks.

        Raises:
            UnknownOrganError: there is no such organ.
            RolloutStateError: the version is stable or in flight.
        """
        check_actor(actor)
        check_digest(digest)
        with self._transaction(dry_run) as transaction:
            if done := version_to_retire(transaction, organ, digest, expected, self._names):
                return done
            if not dry_run:
                transaction.retire_version(organ, digest, actor=actor, reason=reason)
        return Outcome(organ, True, (f"{digest[:12]}… can no longer be staged for {organ} or rolled back to",))

    @contextmanager
    def _transaction(self, dry_run: bool) -> Iterator[Transaction]:
        with self._store.read() if dry_run else self._store.write() as transaction:
            yield transaction

    def _stage(
        self,
        organ: str,
        digest: str,
        *,
        actor: str,
        reason: str,
        plan: RolloutPlan,
        dry_run: bool,
        file_digest: str | None = None,
    ) -> Outcome:
        check_actor(actor)
        check_organ(organ)
        check_digest(digest)
        with self._transaction(dry_run) as transaction:
            if done := version_to_stage(transaction, organ, digest, plan, file_digest, self._names):
                return done
            snapshot = transaction.snapshot()
            rollout = None
            plan = resolved(plan, self._settings)
            if not dry_run:
                rollout = transaction.stage(organ, digest, plan, actor=actor, reason=reason, file_digest=file_digest)
        memory = memory_plan(self._fleet, organ, digest, snapshot.rollback_target(organ)) if dry_run else ()
        return Outcome(organ, True, stage_steps(organ, snapshot.live(organ) is None, plan), rollout, memory)

    def _demand(
        self,
        action: Action,
        organ: str,
        percent: float | None,
        gates: Sequence[Gate],
        override: bool,
        actor: str,
        reason: str,
        digest: str | None,
        expected: Precondition,
        dry_run: bool,
    ) -> Outcome:
        if override:
            raise InvalidRolloutRequestError("override", "and gates exclude each other: demand them, or override them")
        return self._gates.demand(
            action,
            organ,
            percent,
            gates,
            actor=actor,
            reason=reason,
            digest=digest,
            expected=expected,
            dry_run=dry_run,
        )

    def _advance(
        self,
        action: Action,
        organ: str,
        percent: float | None,
        actor: str,
        reason: str,
        digest: str | None,
        expected: Precondition,
        dry_run: bool,
        override: bool = False,
    ) -> Outcome:
        check_actor(actor)
        check_override(override, reason)
        details: Mapping[str, Any] = {}

        def checked(transaction: Transaction, digest: str | None) -> tuple[Rollout, State, str]:
            nonlocal details
            found, target = checked_candidate(transaction, action, organ, digest, percent, expected, self._names)
            if found.state == target and found.percent == percent:
                return found, target, already(transaction, found, self._names)
            details = check_gates(transaction, found, action, override)
            return found, target, ""

        with self._store.read() as transaction:
            rollout, target, done = checked(transaction, digest)
        if done:
            return Outcome(organ, False, (done,), rollout)
        # Outside the write transaction, because replicas may be slow to answer.
        if problem := not_resident(self._fleet, organ, rollout.digest):
            raise RolloutStateError(f"{rollout.subject} cannot get traffic now: {problem}; ask again in a moment")
        if not dry_run:
            with self._store.write() as transaction:
                rollout, _, done = checked(transaction, digest or rollout.digest)
                if done:
                    # A concurrent operation was faster.
                    return Outcome(organ, False, (done,), rollout)
                if action == Action.PROMOTE:
                    rollout = transaction.promote(
                        rollout,
                        actor=actor,
                        reason=reason,
                        max_previous=self._settings.max_previous,
                        details=details,
                    )
                else:
                    rollout = transaction.move(
                        rollout,
                        action,
                        actor=actor,
                        reason=reason,
                        percent=percent,
                        details=details,
                        automatic=False,
                    )
        return Outcome(organ, True, traffic_steps(target, organ, percent, rollout), rollout)
