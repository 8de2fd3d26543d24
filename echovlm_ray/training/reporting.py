"""Progress of a run: a line a step on the terminal, a log as JSON Lines, and curves as PNG."""

import json
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainingArguments

from echovlm_ray.training.trainer import scalars

LOG_NAME = "log.jsonl"
CURVES_NAME = "curves.png"


class LogFile(TrainerCallback):
    """Appends every log entry to a file; a resumed run first removes the entries after its checkpoint."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Makes the file fit the step that training goes on from."""
        if state.is_world_process_zero and self._path.is_file():
            kept = [
                line for line in self._path.read_text().splitlines() if json.loads(line)["step"] <= state.global_step
            ]
            self._path.write_text("".join(f"{line}\n" for line in kept))

    def on_log(self, args: TrainingArguments, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """One entry."""
        if state.is_world_process_zero and logs:
            entry = {"step": state.global_step, **scalars(logs)}
            entry.pop("epoch", None)
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")


class ProgressBar(TrainerCallback):
    """A bar on a terminal; elsewhere a line a minute."""

    def __init__(self, title: str, *, quiet: bool = False) -> None:
        """Takes the stage's name, and whether to be quiet."""
        self._console = Console(stderr=True, markup=False)
        self._quiet = quiet
        self._title = title
        self._bar: Progress | None = None
        self._task: Any = None
        self._loss = ""
        self._said = 0.0
        self._began = (0.0, 0)

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Opens the bar."""
        self._began = (time.monotonic(), state.global_step)
        if self._quiet or not state.is_world_process_zero or not self._console.is_terminal:
            return
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        self._bar = Progress(*columns, console=self._console)
        self._task = self._bar.add_task(
            self._title, total=state.max_steps, completed=state.global_step, loss=self._loss or "-"
        )
        self._bar.start()

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Moves it on."""
        if self._bar is not None:
            self._bar.update(self._task, completed=state.global_step)
        elif not self._quiet and state.is_world_process_zero and time.monotonic() - self._said > 60:
            self._said = time.monotonic()
            seconds = self._said - self._began[0]
            each = seconds / max(state.global_step - self._began[1], 1)
            left = (state.max_steps - state.global_step) * each
            self._console.print(
                f"{self._title}: step {state.global_step} of {state.max_steps}, loss {self._loss or '-'}, "
                f"{left / 60:.0f} minutes left"
            )

    def on_log(self, args: TrainingArguments, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Shows the last loss."""
        loss = next((logs[name] for name in ("answer_loss", "finding_loss") if name in logs), None) if logs else None
        if loss is not None:
            self._loss = f"{loss:.3f}"
            if self._bar is not None:
                self._bar.update(self._task, loss=self._loss)

    def close(self) -> None:
        """Ends the bar, however the run ended."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def read_log(path: Path) -> list[dict[str, float]]:
    """The entries of a log file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def draw_curves(log: Path, picture: Path, title: str) -> None:
    """Plots losses, learning rate, and the gates' statistics over the steps; nothing without matplotlib or entries."""
    entries = read_log(log)
    try:
        import matplotlib
    except ModuleNotFoundError:
        return
    if not entries:
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    curves: defaultdict[str, list[tuple[float, float]]] = defaultdict(list)
    for entry in entries:
        for name, value in entry.items():
            curves[name].append((entry["step"], value))
    figure, axes = pyplot.subplots(2, 2, figsize=(11, 7), layout="constrained")
    panels = (
        (axes[0][0], "cross entropy", ["answer_loss", "eval_answer_loss", "finding_loss"]),
        (axes[0][1], "learning rate", ["learning_rate"]),
        (axes[1][0], "load: share of the tokens by expert and layer", [name for name in curves if "load/" in name]),
        (axes[1][1], "entropy of the gates, 1 is even", [name for name in curves if "gate_entropy/" in name]),
    )
    for axis, label, names in panels:
        for name in names:
            if curves[name]:
                axis.plot(*zip(*curves[name], strict=True), label=name, linewidth=1)
        axis.set_title(label, fontsize=10)
        axis.set_xlabel("step")
        if 0 < len([name for name in names if curves[name]]) <= 8:
            axis.legend(fontsize=7)
    dead = curves["dead_experts"][-1][1] if curves["dead_experts"] else 0
    figure.suptitle(f"{title}; dead experts at the end: {dead:.0f}")
    figure.savefig(picture, dpi=110)
    pyplot.close(figure)
