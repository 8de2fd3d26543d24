"""An evaluator that reads its results from files, like the bundles of `FolderFleet`."""

import hashlib
import json
import threading
from pathlib import Path

from router.rollouts.gates import (
    Comparison,
    EvaluationInterruptedError,
    Evidence,
    Gate,
    GateRun,
    UnusableGateError,
)


class FileEvaluator:
    """A dataset is a JSON file of bundle → score; its digest is of its content. Waits while `proceed` is not set."""

    def __init__(self) -> None:
        self.proceed = threading.Event()
        self.proceed.set()
        self.runs: list[str] = []
        self.interruptions = 0

    def declare(self, gate: Gate) -> Gate:
        return gate.model_copy(update={"dataset_digest": self._read(gate)[1]})

    def evaluate(self, run: GateRun) -> Evidence:
        self.runs.append(run.digest)
        run.progress(3, 10)
        while not self.proceed.wait(0.005):
            if run.cancelled.is_set():
                raise EvaluationInterruptedError("not wanted any more")
        if self.interruptions:
            self.interruptions -= 1
            raise EvaluationInterruptedError("no router answers")
        scores, digest = self._read(run.gate)
        value = scores[run.digest]
        comparison = None
        if run.gate.not_below_incumbent_by is not None:
            assert run.incumbent_digest is not None
            before = scores[run.incumbent_digest]
            gap = value - before
            comparison = Comparison(
                incumbent_digest=run.incumbent_digest,
                incumbent_value=before,
                difference=gap,
                low=gap - 0.05,
                high=gap + 0.05,
            )
        return Evidence(
            value=value, low=value - 0.1, high=value + 0.1, records=10, dataset_digest=digest, comparison=comparison
        )

    def _read(self, gate: Gate) -> tuple[dict[str, float], str]:
        path = Path(gate.dataset)
        if not path.exists():
            raise UnusableGateError(f"the dataset {path} is gone")
        content = path.read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        if gate.dataset_digest not in (None, digest):
            raise UnusableGateError(f"the dataset {path} has changed")
        return json.loads(content), digest


def write_scores(path: Path, **scores: float) -> None:
    """Writes a dataset: bundle → the score that it gets."""
    path.write_text(json.dumps(scores))
