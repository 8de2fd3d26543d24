"""Gates: evaluations that a candidate must pass before it gets requests, and how their figures decide.

Two rules, both on the records of the gate's dataset:

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

    # Which records are asked: a JSON or JSON Lines file of the published record format, by its path on the machine of
    # Control. Images are found from its folder.
    dataset: Annotated[str, Field(min_length=1, max_length=MAX_PATH)]
    # What is computed: attribute_f1, diagnosis_accuracy and others, from 0 to 1.
    metric: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,63}$")]
    # Whose experts are evaluated: the rollout's organ. Records of other organs are left out.
    organ: Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]{0,39}$")]
    # When the candidate must be good in itself, the smallest score that passes.
    at_least: Share | None = None
    # When the candidate must not be worse than the stable version, the margin that it may lose.
    not_below_incumbent_by: Share | None = None
    # When the organ's pictures look like others', or callers always name the organ, "given" names it with every
    # question. "found" lets the routers find it, as `echoray eval` does: an answer by other experts counts as none.
    organs: Literal["found", "given"] = "found"
    # When the records and images must be known ones, their digest; otherwise it is fixed when the gate is declared.
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
        """What sentences call it, for example "attribute_f1 of breast"."""
        return f"{self.metric} of {self.organ}"


class Comparison(BaseModel):
    """The candidate against the incumbent on the same records.

    Attributes:
        incumbent_digest: the bundle that was compared with.
        incumbent_value: its score.
        difference: the candidate's score minus that, with the paired bootstrap's interval of 95 %.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    incumbent_digest: str
    incumbent_value: FiniteFloat
    difference: FiniteFloat
    low: FiniteFloat
    high: FiniteFloat


class Evidence(BaseModel):
    """What one evaluation measured.

    Attributes:
        value: the candidate's score, with the bootstrap's interval of 95 %; without one where there is one patient.
        records: how many records it is computed on.
        dataset_digest: SHA-256 over the records and images that were asked.
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
    """What the figures mean.

    Attributes:
        passed: whether the gate was passed.
        text: the figures in words; of a gate that was not passed, also what was demanded.
    """

    passed: bool
    text: str


def decide(gate: Gate, evidence: Evidence) -> Verdict:
    """Applies both rules of a gate; see the module's text."""
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
    """A gate cannot be evaluated, and a later try would not change that. The text says why."""


class EvaluationInterruptedError(RuntimeError):
    """An evaluation was cancelled, or the system could not answer for long; a later try may succeed."""


@dataclass(frozen=True, slots=True)
class GateRun:
    """One evaluation under way.

    Attributes:
        gate: as it was declared, with its dataset's digest.
        digest: the candidate.
        incumbent_digest: the stable version; None of a new organ.
        cancelled: set when the result is not needed any more.
        progress: called with the questions answered, and how many there are.
    """

    gate: Gate
    digest: str
    incumbent_digest: str | None
    cancelled: threading.Event
    progress: Callable[[int, int], None]


class Evaluator(Protocol):
    """Evaluates versions that are loaded. May be called from several threads; blocks."""

    def declare(self, gate: Gate) -> Gate:
        """The gate with its dataset's digest, once the dataset is read and the metric can be computed on it.

        Raises:
            UnusableGateError: it cannot, or the dataset has another digest than the gate says.
        """
        ...

    def evaluate(self, run: GateRun) -> Evidence:
        """Asks every record of the candidate, and of the incumbent where the gate compares.

        Raises:
            UnusableGateError: the dataset is gone or changed, or the candidate does not answer.
            EvaluationInterruptedError: it was cancelled, or the system is away.
        """
        ...
