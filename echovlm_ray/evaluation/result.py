"""The result of an evaluation, as it is stored in JSON.

A group of records shows text metrics only together with clinical ones."""

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, model_validator

from echovlm_ray.evaluation.baselines import Variant
from echovlm_ray.evaluation.settings import AskSettings, ScoreSettings, Target

FORMAT = 1
Dimension = Literal["all", "organ", "task", "language", "class"]
# An n-gram metric is shown only with one of these, because n-gram metrics reward wrong reports.
SUBSTANCE = ("attribute F1", "diagnosis accuracy")
WITHHELD = (
    "withheld: these records carry neither attributes nor a diagnosis, and a score of words alone rewards wrong reports"
)


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Score(_Model):
    """One metric on some records.

    Attributes:
        value: None if it cannot be computed; then `error` has the reason.
        low, high: the interval of 95 %, where there is one.
        records: how many it is computed on.
        signature: what another program needs to know to get the same number.
    """

    value: float | None = None
    low: float | None = None
    high: float | None = None
    records: int = 0
    error: str = ""
    signature: str = ""

    @model_validator(mode="after")
    def _value_or_reason(self) -> Self:
        if (self.value is None) != bool(self.error):
            raise ValueError("a score has either a value or the reason why it has none")
        return self


class GroupScores(_Model):
    """All metrics on one group of records, for the model or for a baseline.

    Attributes:
        by: what the records have in common.
        name: the organ, task, language or class; empty for all.
        substance: the clinical metrics, from 0 to 1.
        words: n-gram metrics, from 0 to 100.
    """

    variant: Variant
    by: Dimension
    name: str
    records: int
    substance: dict[str, Score]
    words: dict[str, Score]

    @model_validator(mode="after")
    def _words_never_alone(self) -> Self:
        if any(score.value is not None for score in self.words.values()) and not shows_substance(self.substance):
            raise ValueError("n-gram metrics are not shown without attribute F1 or diagnosis accuracy beside them")
        return self


def shows_substance(scores: dict[str, Score]) -> bool:
    """Whether text metrics may be shown with these."""
    return any(name in scores and scores[name].value is not None for name in SUBSTANCE)


class Example(_Model):
    """One record for the report page: the picture, what is right, and what was answered.

    Attributes:
        image: a small PNG in base64; empty where there is none.
        verdict: in a few words.
    """

    organ: str
    task: str
    language: str
    question: str
    image: str
    reference: str
    answer: str
    verdict: str
    right: bool | None


class EvaluationResult(_Model):
    """The result of an evaluation.

    Attributes:
        format: of this file.
        dataset: the file's path as it was given.
        dataset_digest: SHA-256 of the questions and right answers.
        settings: digest of what decides the answers.
        notices: notes for the reader.
        failed: questions without an answer, by the reason; the evaluation is not complete then.
    """

    format: int = FORMAT
    dataset: str
    dataset_digest: str
    target: Target
    settings: str
    asking: AskSettings
    scoring: ScoreSettings
    records: int
    notices: list[str]
    failed: dict[str, int]
    groups: list[GroupScores]
    examples: list[Example]

    def group(self, variant: Variant, by: Dimension = "all", name: str = "") -> GroupScores | None:
        """The scores of one group, if there is one."""
        wanted = (variant, by, name)
        return next((found for found in self.groups if (found.variant, found.by, found.name) == wanted), None)
