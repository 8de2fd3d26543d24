"""transformers' `Trainer` with this project's loss, order of examples and checkpoints."""

# transformers leaves most of its methods untyped.
# mypy: disable-error-code="no-untyped-call"

import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments

from echovlm_ray.training.batches import UNUSABLE
from echovlm_ray.training.errors import NotFiniteError, TrainingError
from echovlm_ray.training.objective import StepTotals, TrainingObjective
from echovlm_ray.training.state import mark_complete, remove_old


class EchoVLMTrainer(Trainer):
    """Trains a `TrainingObjective` on an `ExampleStream`.

    Attributes:
        failure: why the run ended early with its state saved; None otherwise.
    """

    # The objective divides by what `get_batch_samples` counted over the whole step.
    loss_is_scaled_for_ga = True

    def __init__(self, *args: Any, seed: int, **kwargs: Any) -> None:
        """As `Trainer`; the seed is that of the worker processes."""
        super().__init__(*args, **kwargs)
        self.failure: TrainingError | None = None
        self._loader_seed = seed
        self._parts: dict[str, list[float]] = {}

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Places of the stream from first to last; each worker gets its micro-batches in turn."""
        assert self.train_dataset is not None
        dataset: Any = self.train_dataset
        workers = self.args.dataloader_num_workers
        loader: DataLoader[Any] = DataLoader(
            dataset,
            batch_size=self.args.per_device_train_batch_size,
            sampler=SequentialSampler(dataset),
            collate_fn=self.data_collator,
            num_workers=workers,
            persistent_workers=workers > 0,
            # A forked worker notices when this process is killed; one of a fork server would wait forever.
            multiprocessing_context="fork" if workers else None,
            # Of its own, so that beginning to read leaves torch's global generator alone.
            generator=torch.Generator().manual_seed(self._loader_seed),
        )
        prepared: DataLoader[Any] = self.accelerator.prepare(loader)
        return prepared

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """The micro-batches of one step, and what its loss is divided by.

        A batch that cannot be used ends the run with its state saved; with several workers, where the others would
        wait for this one forever, it ends at once.
        """
        batches = [batch for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
        unusable = next((batch[UNUSABLE] for batch in batches if UNUSABLE in batch), None)
        if unusable is not None:
            failure = TrainingError(f"{unusable}. Mend the record, or set data.unusable to skip")
            if self.args.world_size > 1:
                raise failure
            self.failure = failure
            self.control.should_save = self.state.global_step > 0
            self.control.should_training_stop = True
            return [], None
        totals = torch.tensor(
            [
                sum(float(batch["target_weights"].double().sum()) for batch in batches),
                float(sum(len(batch["sequence_lengths"]) for batch in batches)),
            ],
            dtype=torch.float64,
        ).to(device)
        if self.args.world_size > 1:
            totals = self.accelerator.reduce(totals, reduction="sum")
        return batches, StepTotals(float(totals[0]), int(totals[1]))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """This micro-batch's part of the step's loss, times the number of workers, whose gradients are averaged.

        Raises:
            NotFiniteError: it is NaN or infinite; no weight has been changed.
        """
        totals = num_items_in_batch if isinstance(num_items_in_batch, StepTotals) else None
        outputs = model(**inputs, totals=totals)
        loss = outputs["loss"] * self.args.world_size if model.training else outputs["loss"]
        if not torch.isfinite(loss):
            raise NotFiniteError(f"the loss of step {self.state.global_step + 1} is {loss.item()}")
        if model.training:
            for name, value in outputs.items():
                if name.endswith("_loss"):
                    self._parts.setdefault(name, []).append(float(value))
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds both parts of the loss and the gates' statistics."""
        if "loss" in logs:
            steps = self.args.logging_steps
            logs |= {name: self._over_workers(sum(values)) / steps for name, values in self._parts.items()}
            self._parts = {}
            objective = self.model
            assert isinstance(objective, TrainingObjective)
            logs |= objective.counts.take(self._over_workers)
        super().log(logs, start_time)

    def _over_workers(self, value: Any) -> Any:
        """The sum over all workers, which all log at the same steps."""
        if self.args.world_size == 1:
            return value
        total = self.accelerator.reduce(torch.as_tensor(value, device=self.args.device), reduction="sum")
        return total if isinstance(value, torch.Tensor) else float(total)


class Checkpointing(TrainerCallback):
    """Marks complete checkpoints, and removes old ones."""

    def __init__(self, keep: int) -> None:
        self._keep = keep

    def on_save(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """After all files of a checkpoint were written, by all workers."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.barrier()
        if not state.is_world_process_zero:
            return
        assert args.output_dir is not None
        folder = Path(args.output_dir)
        mark_complete(folder / f"checkpoint-{state.global_step}")
        remove_old(folder, self._keep)


class FiniteGradients(TrainerCallback):
    """Ends a run before gradients that are not finite change a weight."""

    def on_pre_optimizer_step(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Checks all gradients.

        Raises:
            NotFiniteError: one is NaN or infinite.
        """
        model: nn.Module = kwargs["model"]
        gradients = [value.grad for value in model.parameters() if value.grad is not None]
        if not torch.isfinite(torch.nn.utils.get_total_norm(gradients)):
            raise NotFiniteError(f"the gradient of step {state.global_step + 1} is infinite or not a number")


class Interruption(TrainerCallback):
    """Ctrl-C and SIGTERM: finishes the current step and saves the state; a second one ends immediately.

    Attributes:
        requested: whether it came.
    """

    def __init__(self) -> None:
        self.requested = False

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Listens while the block runs; only a main thread can."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Between two steps, on every worker alike."""
        requested = self.requested
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            # Signals reach workers at different steps; all must stop after the same one.
            flag = torch.tensor(int(requested), device=args.device)
            torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
            requested = bool(flag)
        if requested:
            self.requested = True
            control.should_save = True
            control.should_training_stop = True


def scalars(logs: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a log entry."""
    return {name: float(value) for name, value in logs.items() if isinstance(value, int | float)}
