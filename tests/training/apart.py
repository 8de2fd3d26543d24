"""What the processes run that tests kill."""

import resource
import signal
import sys
from pathlib import Path

from echovlm_ray.cli.main import app
from echovlm_ray.training import state, trainer


def run_command(arguments: list[str], errors: Path, limit_bytes: int | None) -> None:
    """`echoray` with these arguments; see `tests.training.test_run.train_apart`."""
    sys.stderr = errors.open("w", buffering=1)
    if limit_bytes is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        whole = state.mark_complete

        def limit(checkpoint: Path) -> None:
            whole(checkpoint)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))

        setattr(trainer, "mark_complete", limit)  # noqa: B010
    app(arguments)
