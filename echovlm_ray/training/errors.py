"""Errors that end a training run early. Each text says what was kept and how to go on."""


class TrainingError(ValueError):
    """A run cannot begin or cannot go on. The text names the cause and the fix."""


class NotFiniteError(TrainingError):
    """The loss or the gradient is infinite or not a number."""


class TrainingInterrupted(Exception):  # noqa: N818
    """The user stopped the run; its state was saved."""


class MissingFindingsError(TrainingError):
    """A stage learns from what pictures show, and a record does not say it."""
