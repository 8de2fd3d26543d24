"""Rollout gates: evaluations that a candidate must pass before it gets requests, and their pass criteria.

There are two criteria, both on the records of the gate's dataset:

- `at_least` compares the candidate's own score, the point estimate. The interval is recorded and does not decide.
- `not_below_incumbent_by` is a margin. The candidate is refused when it is worse than the incumbent by more than the
  margin beyond what chance explains: when the paired bootstrap's interval of 95 % of the difference, candidate minus
  incumbent, lies below minus the margin as a whole. A candidate that is as good as the incumbent is refused in 2.5 % of
  cases at most. The fewer records there are, the larger the loss that passes; `docs/rollouts.md` has numbers.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal, Protocol, Self

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, model_validator

# A path, and the name of a metric, as operators write them.
MAX_PATH = 1024
Share = Annotated[FiniteFloat, Field(ge=0, le=1)]


class Gate(BaseModel):
    """One evaluation that a candidate must pass."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    # A JSON or JSON Lines file in the published record format, as a path on Control's machine. Paths of images are
    # relative to its folder.
    dataset: Annotated[str, Field(min_length=1, max_length=MAX_PATH)]
    # The metric, from 0 to 1: attribute_f1, diagnosis_accuracy and others.
    metric: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,63}$")]
    # The rollout's organ. Records of other organs are skipped.
    organ: Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]{0,39}$")]
    # When the candidate must reach a score, the lowest one that passes.
    at_least: Share | None = None
    # When the candidate must not be worse than the stable version, the margin by which it may be.
    not_below_incumbent_by: Share | None = None
    # When the organ's images resemble others', or callers always name the organ, "given" sends it with every question.
    # With "found" the organ gate chooses, as in `echoray eval`; answers of other organs' experts do not count.
    organs: Literal["found", "given"] = "found"
    # When the records and images must be certain ones, their digest. Otherwise it is set when the gate is declared.
    dataset_digest: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None

    @model_validator(mode="after")
    def _demands_something(self) -> Self:
        if self.at_least is None and self.not_below_incumbent_by is None:
            raise ValueError("a gate needs at_least, not_below_incumbent_by, or both")
        if not self.dataset.isprintable():
            raise ValueError("dataset must be a printable path")
        return self

    @property
    def subject(self) -> str:
        """Its name in messages, for example "attribute_f1 of breast"."""
        return f"{self.metric} of {self.organ}"


class Comparison(BaseModel):
    """The candidate against the incumbent on the same records.

    Attributes:
        incumbent_digest: the incumbent's bundle.
        incumbent_value: its score.
        difference: the candidate's score minus the incumbent's, with the 95 % interval of a paired bootstrap.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    incumbent_digest: str
    incumbent_value: FiniteFloat
    difference: FiniteFloat
    low: FiniteFloat
    high: FiniteFloat


class Evidence(BaseModel):
    """The measurements of one evaluation.

    Attributes:
        value: the candidate's score with a 95 % bootstrap interval; no interval with a single patient.
        records: the number of records.
        dataset_digest: SHA-256 over the records and images.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    value: FiniteFloat
    low: FiniteFloat | None
    high: FiniteFloat | None
    records: int
    dataset_digest: str
    comparison: Comparison | None = None


@dataclass(frozen=True, slots=True)
class Verdict:
    """The decision on a gate.

    Attributes:
        passed: whether the gate was passed.
        text: the figures as text; for a failed gate also its criteria.
    """

    passed: bool
    text: str


def decide(gate: Gate, evidence: Evidence) -> Verdict:
    """Applies both criteria of a gate, which the module's docstring describes."""
    figures = [f"{gate.subject} is {_figure(evidence.value, evidence.low, evidence.high)}"]
    failures = []
    if gate.at_least is not None and evidence.value < gate.at_least:
        failures.append(f"it must be at least {gate.at_least:g}")
    if (margin := gate.not_below_incumbent_by) is not None:
        found = evidence.comparison
        assert found is not None, "a gate that compares was evaluated without the incumbent"
        figures.append(
            f"the incumbent's is {found.incumbent_value:.3f}, a difference of "
            f"{_figure(found.difference, found.low, found.high)}"
        )
        if found.high < -margin:
            failures.append(f"it may be worse than the incumbent by {margin:g} at most, beyond chance")
    where = f"on {evidence.records} records of the dataset {evidence.dataset_digest[:12]}…"
    return Verdict(not failures, f"{'; '.join([', '.join(figures), *failures])} ({where})")


def _figure(value: float, low: float | None, high: float | None) -> str:
    return f"{value:.3f}" if low is None or high is None else f"{value:.3f} [{low:.3f}, {high:.3f}]"


class UnusableGateError(ValueError):
    """A gate cannot be evaluated, and a retry would not help. The text names the reason."""


class EvaluationInterruptedError(RuntimeError):
    """An evaluation was cancelled, or the system did not answer for too long; a retry may succeed."""


@dataclass(frozen=True, slots=True)
class GateRun:
    """One running evaluation.

    Attributes:
        gate: the declared gate, with its dataset's digest.
        digest: the candidate's digest.
        incumbent_digest: the stable version's digest; None for a new organ.
        cancelled: set when the result is not needed any more.
        progress: called with the numbers of answered and of all questions.
    """

    gate: Gate
    digest: str
    incumbent_digest: str | None
    cancelled: threading.Event
    progress: Callable[[int, int], None]


class Evaluator(Protocol):
    """Evaluates loaded versions. Blocks; may be called from several threads."""

    def declare(self, gate: Gate) -> Gate:
        """Reads the dataset, checks that the metric can be computed on it, and returns the gate with its digest.

        Raises:
            UnusableGateError: it cannot be computed, or the dataset's digest differs from the gate's.
        """
        ...

    def evaluate(self, run: GateRun) -> Evidence:
        """Sends every record to the candidate, and to the incumbent if the gate compares the two.

        Raises:
            UnusableGateError: the dataset is missing or changed, or the candidate does not answer.
            EvaluationInterruptedError: it was cancelled, or the system is unavailable.
        """
        ...
