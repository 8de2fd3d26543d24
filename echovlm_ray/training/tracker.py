"""Experiment trackers through transformers' callbacks: TensorBoard and MLflow."""

from importlib.util import find_spec

from echovlm_ray.training.errors import TrainingError

# One of these packages must be there.
_PACKAGES = {"tensorboard": ("tensorboard", "tensorboardX"), "mlflow": ("mlflow",)}


def require_tracker(tracker: str) -> None:
    """Checks that a recipe's tracker is installed, before a run begins.

    Raises:
        TrainingError: it is not.
    """
    packages = _PACKAGES.get(tracker, ())
    if packages and not any(find_spec(package) for package in packages):
        raise TrainingError(
            f"the recipe's tracker is {tracker}, which is not installed: `pip install {packages[0]}`, or set tracker "
            "to none; log and curves are made in any case"
        )


def tracker_failure(error: BaseException, tracker: str) -> str | None:
    """What a tracker says that it cannot write; None where an error is not the tracker's."""
    if tracker not in _PACKAGES or type(error).__module__.partition(".")[0] not in _PACKAGES[tracker]:
        return None
    reason = str(error).strip().partition("\n")[0] or type(error).__name__
    return f"{tracker} cannot be written to: {reason}"
