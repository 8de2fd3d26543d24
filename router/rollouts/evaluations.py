"""The evaluations in the database: the scores of each version, and the status of each gate of a rollout."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

from sqlalchemy import Connection, Row, insert, select

from router.rollouts import schema
from router.rollouts.gates import Evidence, Gate, Verdict
from router.rollouts.records import Rollout


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The result of one gate of one rollout. Written once.

    Attributes:
        position: the gate's index in the rollout, from 0.
        passed: whether the gate was passed.
        text: the figures as text.
        evaluated_at: seconds since 1970.
    """

    rollout_id: str
    position: int
    organ: str
    digest: str
    gate: Gate
    evidence: Evidence
    passed: bool
    text: str
    evaluated_at: float

    @classmethod
    def of_row(cls, row: Row[Any]) -> Self:
        """Reads a row of the table `evaluations`."""
        fields = dict(row._mapping)
        fields["gate"] = Gate.model_validate_json(fields["gate"])
        fields["evidence"] = Evidence.model_validate_json(fields["evidence"])
        return cls(**fields)


def add_evaluation(
    connection: Connection, rollout: Rollout, position: int, evidence: Evidence, verdict: Verdict, now: float
) -> None:
    """Stores the result of a gate."""
    connection.execute(
        insert(schema.evaluations).values(
            rollout_id=rollout.id,
            position=position,
            organ=rollout.organ,
            digest=rollout.digest,
            gate=rollout.plan.gates[position].model_dump_json(),
            evidence=evidence.model_dump_json(),
            passed=verdict.passed,
            text=verdict.text,
            evaluated_at=now,
        )
    )


def evaluations_of(connection: Connection, organs: Iterable[str]) -> list[Evaluation]:
    """All evaluations of some organs' versions, the newest first."""
    table = schema.evaluations
    query = select(table).where(table.c.organ.in_(list(organs)))
    rows = connection.execute(query.order_by(table.c.evaluated_at.desc(), table.c.rollout_id, table.c.position))
    return [Evaluation.of_row(row) for row in rows]


@dataclass(frozen=True, slots=True)
class GateStanding:
    """The status of a rollout's gates.

    Attributes:
        gates: all of them.
        found: position → evaluation, for the gates that were evaluated.
    """

    gates: tuple[Gate, ...]
    found: Mapping[int, Evaluation]

    @property
    def open(self) -> tuple[int, ...]:
        """The positions of the gates that are not evaluated yet."""
        return tuple(position for position in range(len(self.gates)) if position not in self.found)

    @property
    def failed(self) -> tuple[Evaluation, ...]:
        """The evaluations that were not passed."""
        return tuple(found for found in self.found.values() if not found.passed)

    @property
    def passed(self) -> bool:
        """Whether every gate is evaluated and passed."""
        return not self.open and not self.failed

    @property
    def figures(self) -> str:
        """The figures of the failed gates as text."""
        return "; ".join(f"gate {found.position + 1}: {found.text}" for found in self.failed)


def gate_standing(connection: Connection, rollout: Rollout) -> GateStanding:
    """Reads the status of a rollout's gates."""
    if not rollout.plan.gates:
        return GateStanding((), {})
    table = schema.evaluations
    rows = connection.execute(select(table).where(table.c.rollout_id == rollout.id).order_by(table.c.position))
    found = {row.position: Evaluation.of_row(row) for row in rows}
    return GateStanding(rollout.plan.gates, found)
