"""Errors that end a training run early. Each text has what was saved and how to resume."""


class TrainingError(ValueError):
    """A run cannot begin or cannot go on. The text names the cause and the fix."""


class NotFiniteError(TrainingError):
    """The loss or the gradient is infinite or not a number."""


class TrainingInterrupted(Exception):  # noqa: N818
    """The user stopped the run; its state was saved."""


class MissingFindingsError(TrainingError):
    """A stage learns from the contents of images, which a record does not have."""
