"""The changes of the database, each with its history entry, inside one transaction."""

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from sqlalchemy import Connection, delete, func, insert, select, update

from router.errors import RolloutStateError, UnknownRolloutError
from router.gating.expert_set import ExpertSet
from router.rollouts import history, schema
from router.rollouts.evaluations import GateStanding, add_evaluation, gate_standing
from router.rollouts.gates import Evidence, Verdict, decide
from router.rollouts.records import LiveOrgan, Rollout, Snapshot, live_organ_of_row, not_adopted
from router.rollouts.settings import RolloutPlan
from router.rollouts.states import IN_FLIGHT, WITH_TRAFFIC, Action, State, next_state

# The actor of automatic changes.
CONTROLLER = "controller"
MAX_REASON = 500
# A request lasts minutes. No request uses a version whose rollout ended this many rollouts ago.
MAX_ENDED = 256


class Transaction:
    """Reads and writes one consistent state. Writing methods need a write transaction."""

    def __init__(self, connection: Connection, now: float) -> None:
        """Joins an open transaction. `now` is the time of all its writes, in seconds since 1970."""
        self.connection = connection
        self.now = now
        # Whether subscribers must be notified.
        self.changed = False

    def adopted(self) -> bool:
        """Whether there is a live set."""
        return self.connection.execute(select(schema.live_set.c.id)).first() is not None

    def snapshot(self) -> Snapshot:
        """A snapshot of the state for decisions.

        Raises:
            RolloutStateError: no live set was adopted.
        """
        row = self.connection.execute(select(schema.live_set)).first()
        if row is None:
            raise not_adopted()
        organs = tuple(map(live_organ_of_row, self._live_rows()))
        in_flight = tuple(self.rollouts(states=IN_FLIGHT))
        rollouts = schema.rollouts.c
        ended = self.connection.execute(
            select(rollouts.organ, rollouts.digest)
            # Failed versions may crash the replica that loads them, and hardly ever had a request.
            .where(rollouts.state.not_in([str(state) for state in (*IN_FLIGHT, State.FAILED)]))
            .order_by(rollouts.sequence.desc())
            .limit(MAX_ENDED)
        ).all()
        retired = self.connection.execute(select(schema.retired.c.organ, schema.retired.c.digest)).all()
        staged = self.connection.execute(select(schema.rollouts.c.organ).distinct()).scalars()
        known = {live.organ for live in organs} | {organ for organ, _ in retired} | set(staged)
        deployment = self.connection.execute(select(schema.deployment)).one()
        return Snapshot(
            sequence=history.head_of(self.connection).count,
            backbone_digest=row.backbone_digest,
            routing=row.routing,
            organs=organs,
            in_flight=in_flight,
            known_organs=tuple(sorted(known)),
            retired=frozenset((organ, digest) for organ, digest in retired),
            ended=frozenset((organ, digest) for organ, digest in ended),
            watched=tuple(rollout for rollout in self.rollouts(states=(State.STABLE,)) if rollout.watching),
            identity=deployment.identity,
            policy_offset=deployment.policy_offset,
        )

    def rollouts(
        self, *, organ: str | None = None, states: tuple[State, ...] | None = None, limit: int | None = None
    ) -> list[Rollout]:
        """Rollouts, the newest first."""
        query = select(schema.rollouts).order_by(schema.rollouts.c.sequence.desc()).limit(limit)
        if organ is not None:
            query = query.where(schema.rollouts.c.organ == organ)
        if states is not None:
            query = query.where(schema.rollouts.c.state.in_([str(state) for state in states]))
        return [Rollout.of_row(row) for row in self.connection.execute(query)]

    def rollout(self, rollout_id: str) -> Rollout:
        """One rollout.

        Raises:
            UnknownRolloutError: there is no rollout with this id.
        """
        row = self.connection.execute(select(schema.rollouts).where(schema.rollouts.c.id == rollout_id)).first()
        if row is None:
            raise UnknownRolloutError(f"there is no rollout {rollout_id[:100]!r}; `list` shows those that there are")
        return Rollout.of_row(row)

    def applied(self, file_digest: str) -> Rollout | None:
        """The rollout that a file began, if it was applied before."""
        query = select(schema.applied_files.c.rollout_id).where(schema.applied_files.c.file_digest == file_digest)
        rollout_id = self.connection.execute(query).scalar()
        return None if rollout_id is None else self.rollout(rollout_id)

    def adopt(self, expert_set: ExpertSet, actor: str) -> None:
        """Makes an expert set live in a database without one."""
        self.connection.execute(
            insert(schema.live_set).values(id=1, backbone_digest=expert_set.backbone_digest, routing=expert_set.routing)
        )
        for member in expert_set.members:
            self._add_live(LiveOrgan(member.organ, member.bundle_digest, ()))
        members = {member.organ: member.bundle_digest for member in expert_set.members}
        self._note(Action.ADOPT, actor=actor, details={"expert_set_id": expert_set.id, "members": members})

    def stage(
        self,
        organ: str,
        digest: str,
        plan: RolloutPlan,
        *,
        actor: str,
        reason: str,
        restores: bool = False,
        file_digest: str | None = None,
    ) -> Rollout:
        """Begins a rollout of an organ without one in flight."""
        live = self._live(organ)
        incumbent = live.stable_digest if live else None
        sequence = history.head_of(self.connection).count + 1
        rollout_id = f"{organ}-{sequence}"
        details: dict[str, Any] = {"incumbent": incumbent, "plan": plan.model_dump(mode="json")}
        if restores:
            details["restores"] = True
        if file_digest is not None:
            details["file"] = file_digest
        self._note(
            Action.STAGE,
            actor=actor,
            organ=organ,
            digest=digest,
            rollout_id=rollout_id,
            to_state=State.STAGED,
            reason=reason,
            details=details,
        )
        self.connection.execute(
            insert(schema.rollouts).values(
                id=rollout_id,
                sequence=sequence,
                organ=organ,
                digest=digest,
                incumbent_digest=incumbent,
                state=str(State.STAGED),
                percent=None,
                reason=_one_line(reason),
                actor=actor,
                restores=restores,
                plan=plan.model_dump_json(),
                automatic=plan.promote or bool(plan.steps),
                next_step=0,
                created_at=self.now,
                state_since=self.now,
                traffic_since=None,
                verify_attempts=0,
                replica_losses=0,
            )
        )
        if file_digest is not None:
            self.connection.execute(
                insert(schema.applied_files).values(
                    file_digest=file_digest, organ=organ, rollout_id=rollout_id, applied_at=self.now
                )
            )
        return self.rollout(rollout_id)

    def move(
        self,
        rollout: Rollout,
        action: Action,
        *,
        actor: str,
        reason: str = "",
        percent: float | None = None,
        details: Mapping[str, Any] | None = None,
        **changes: Any,
    ) -> Rollout:
        """Moves a rollout one step along `TRANSITIONS`.

        Args:
            rollout: the rollout.
            action: the action.
            actor: the operator, or `CONTROLLER`.
            reason: the reason for the history.
            percent: the share of the requests, for a state with traffic.
            details: further details for the history.
            changes: further columns to change.

        Raises:
            RolloutStateError: the action is not possible in its state.
        """
        state = next_state(rollout.state, action, rollout.subject)
        reason = _one_line(reason)
        traffic_since = rollout.traffic_since
        if state in WITH_TRAFFIC and traffic_since is None:
            traffic_since = self.now
        all_details = {**({"percent": percent} if percent is not None else {}), **(details or {})}
        self._note_of(
            rollout,
            action,
            actor=actor,
            from_state=rollout.state,
            to_state=state,
            reason=reason,
            details=all_details,
        )
        moved = replace(rollout, state=state, percent=percent, reason=reason, state_since=self.now, **changes)
        moved = replace(moved, traffic_since=traffic_since)
        self._update(
            rollout,
            state=str(state),
            percent=percent,
            reason=reason,
            state_since=self.now,
            traffic_since=traffic_since,
            **changes,
        )
        return moved

    def promote(
        self,
        rollout: Rollout,
        *,
        actor: str,
        reason: str = "",
        max_previous: int,
        details: Mapping[str, Any] | None = None,
    ) -> Rollout:
        """Makes a candidate the organ's stable version. The previous one becomes superseded, or rolled back if the
        candidate restores an earlier version. `details` are for the history.

        Raises:
            RolloutStateError: the candidate is not warm.
        """
        live = self._live(rollout.organ)
        promoted = self.move(
            rollout,
            Action.PROMOTE,
            actor=actor,
            reason=reason,
            details={"replaced": live.stable_digest if live else None, **(details or {})},
            # A restored version is not judged again: a fault that all versions share would roll back one after the
            # other.
            watching=not rollout.restores and bool(rollout.plan.watch_after_promotion_s),
        )
        if live is None:
            self._add_live(LiveOrgan(rollout.organ, rollout.digest, ()))
        else:
            if rollout.restores:
                previous = live.previous[:-1] if live.previous[-1:] == (rollout.digest,) else live.previous
            else:
                previous = (*live.previous, live.stable_digest)[-max_previous:]
            self._set_live(LiveOrgan(rollout.organ, rollout.digest, previous))
            action = Action.ROLL_BACK if rollout.restores else Action.SUPERSEDE
            for former in self.rollouts(organ=rollout.organ, states=(State.STABLE,)):
                if former.id != rollout.id:
                    because = f": {reason}" if rollout.restores and reason else ""
                    self.move(former, action, actor=actor, reason=f"{rollout.id} took its place{because}")
        self.connection.execute(
            delete(schema.retired).where(schema.retired.c.organ == rollout.organ, schema.retired.c.digest == "")
        )
        return promoted

    def retire_organ(self, organ: str, *, actor: str, reason: str) -> None:
        """Removes an organ without a rollout in flight from the live set."""
        self._note(Action.RETIRE_ORGAN, actor=actor, organ=organ, reason=reason)
        for rollout in self.rollouts(organ=organ, states=(State.STABLE, State.SUPERSEDED)):
            self.move(rollout, Action.RETIRE, actor=actor, reason="its organ was retired")
        self.connection.execute(delete(schema.live_organs).where(schema.live_organs.c.organ == organ))
        self._add_retired(organ, "")

    def retire_version(self, organ: str, digest: str, *, actor: str, reason: str) -> None:
        """Bars a bundle, neither stable nor in flight, from staging and from rollbacks."""
        self._note(Action.RETIRE_VERSION, actor=actor, organ=organ, digest=digest, reason=reason)
        for rollout in self.rollouts(organ=organ, states=(State.SUPERSEDED,)):
            if rollout.digest == digest:
                self.move(rollout, Action.RETIRE, actor=actor, reason="its version was retired")
        if live := self._live(organ):
            kept = tuple(previous for previous in live.previous if previous != digest)
            self._set_live(replace(live, previous=kept))
        self._add_retired(organ, digest)

    def require_gates(self, rollout: Rollout, plan: RolloutPlan, *, actor: str, reason: str) -> Rollout:
        """Replaces a rollout's plan by one with further gates, and restarts it."""
        details = {"plan": plan.model_dump(mode="json", include={"gates", "steps", "promote"})}
        self._note_of(rollout, Action.GATE, actor=actor, reason=reason, details=details)
        self._update(rollout, plan=plan.model_dump_json(), automatic=True, next_step=0)
        return replace(rollout, plan=plan, automatic=True, next_step=0)

    def gate_standing(self, rollout: Rollout) -> GateStanding:
        """The status of a rollout's gates."""
        return gate_standing(self.connection, rollout)

    def note_evaluation(self, rollout: Rollout, position: int, evidence: Evidence) -> Verdict:
        """Records the result of a gate in the history and in the table of evaluations."""
        gate = rollout.plan.gates[position]
        verdict = decide(gate, evidence)
        details = {"gate": gate.model_dump(mode="json"), "passed": verdict.passed, **evidence.model_dump(mode="json")}
        self._note_of(
            rollout,
            Action.EVALUATE,
            actor=CONTROLLER,
            reason=f"{'passed' if verdict.passed else 'not passed'}: {verdict.text}",
            details=details,
        )
        add_evaluation(self.connection, rollout, position, evidence, verdict, self.now)
        return verdict

    def end_watch(self, rollout: Rollout) -> None:
        """Ends the time in which a stable version is judged. Not in the history, because nothing changed."""
        self._update(rollout, watching=False)

    def note_failing(self, rollout: Rollout, reason: str) -> None:
        """Records that a stable version fails and stays, because it has no predecessor; ends its watch."""
        reason = _one_line(f"it fails, and there is no version before it to go back to: {reason}")
        self._note_of(rollout, Action.FAILING, actor=CONTROLLER, reason=reason)
        self._update(rollout, watching=False, reason=reason)

    def count_verify_attempt(self, rollout: Rollout) -> None:
        """Records that a verification begins. Not in the history, because nothing changed yet."""
        self._update(rollout, verify_attempts=rollout.verify_attempts + 1)

    def count_replica_loss(self, rollout: Rollout) -> None:
        """Records that a replica was lost while it loaded the candidate."""
        self._update(rollout, replica_losses=rollout.replica_losses + 1)

    def _update(self, rollout: Rollout, **values: Any) -> None:
        table = schema.rollouts
        statement = update(table).where(table.c.id == rollout.id, table.c.state == str(rollout.state)).values(**values)
        if self.connection.execute(statement).rowcount != 1:
            raise RolloutStateError(f"{rollout.subject} is no longer {rollout.state}; look at it and ask again")

    def _note(self, action: Action, *, actor: str, reason: str = "", **fields: Any) -> None:
        history.append(self.connection, action, now=self.now, actor=actor, reason=_one_line(reason), **fields)
        self.changed = True

    def _note_of(self, rollout: Rollout, action: Action, *, actor: str, reason: str, **fields: Any) -> None:
        named = {"organ": rollout.organ, "digest": rollout.digest, "rollout_id": rollout.id}
        self._note(action, actor=actor, reason=reason, **named, **fields)

    def _live_rows(self) -> list[Any]:
        return list(self.connection.execute(select(schema.live_organs).order_by(schema.live_organs.c.position)))

    def _live(self, organ: str) -> LiveOrgan | None:
        row = self.connection.execute(select(schema.live_organs).where(schema.live_organs.c.organ == organ)).first()
        return None if row is None else live_organ_of_row(row)

    def _add_live(self, live: LiveOrgan) -> None:
        last = self.connection.execute(select(func.max(schema.live_organs.c.position))).scalar()
        self.connection.execute(
            insert(schema.live_organs).values(
                organ=live.organ,
                position=0 if last is None else last + 1,
                stable_digest=live.stable_digest,
                previous=json.dumps(live.previous),
            )
        )

    def _set_live(self, live: LiveOrgan) -> None:
        self.connection.execute(
            update(schema.live_organs)
            .where(schema.live_organs.c.organ == live.organ)
            .values(stable_digest=live.stable_digest, previous=json.dumps(live.previous))
        )

    def _add_retired(self, organ: str, digest: str) -> None:
        self.connection.execute(insert(schema.retired).values(organ=organ, digest=digest, retired_at=self.now))


def _one_line(reason: str) -> str:
    """A reason for the history: one printable line of bounded length."""
    printable = "".join(character if character.isprintable() else " " for character in reason)
    return " ".join(printable.split())[:MAX_REASON]
