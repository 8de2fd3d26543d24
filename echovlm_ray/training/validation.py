"""The validation loss."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import TrainerCallback, TrainingArguments

from echovlm_ray.training.batches import collate
from echovlm_ray.training.encode import EncodedSource
from echovlm_ray.training.errors import TrainingError
from echovlm_ray.training.examples import ExampleError
from echovlm_ray.training.objective import TrainingObjective


@dataclass(frozen=True, slots=True)
class ValidationResult:
    """The validation metrics of a model.

    Attributes:
        answer_loss: mean cross entropy of the answers' tokens, in nats, all counting alike.
        token_accuracy: the share of tokens that are the model's most likely ones, given the previous tokens.
        tokens: the number of tokens.
    """

    answer_loss: float
    token_accuracy: float
    tokens: int


def validate(
    objective: TrainingObjective,
    source: EncodedSource,
    *,
    batch_size: int,
    bfloat16: bool,
) -> ValidationResult:
    """Measures a model without changing it.

    Raises:
        TrainingError: an example cannot be used.
    """
    device = next(objective.parameters()).device
    was_training = objective.training
    objective.eval()
    loss, right, tokens = 0.0, 0, 0
    try:
        for batch in _batches(source, batch_size):
            inputs = {name: value.to(device) for name, value in batch.items()}
            wanted = inputs["target_weights"] > 0
            inputs["target_weights"] = wanted.float()
            with torch.no_grad(), torch.autocast(device.type, dtype=torch.bfloat16, enabled=bfloat16):
                outputs = objective(**inputs)
            count = int(wanted.sum())
            loss += float(outputs["answer_loss"]) * count
            right += int((outputs["logits"].argmax(dim=-1) == inputs["targets"][wanted]).sum())
            tokens += count
    finally:
        objective.train(was_training)
    return ValidationResult(loss / tokens, right / tokens, tokens)


def _batches(source: EncodedSource, batch_size: int) -> Iterator[dict[str, Any]]:
    for first in range(0, len(source), batch_size):
        rows = []
        for index in range(first, min(first + batch_size, len(source))):
            try:
                rows.append(source.encoded(index, 0))
            except ExampleError as error:
                raise TrainingError(
                    f"{error}. Mend {source.place(index)}, or leave it out of what is measured on"
                ) from None
        yield collate(rows)


class Validation(TrainerCallback):
    """Measures every so many steps and at the end of the stage; the numbers go to the log."""

    def __init__(self, trainer: Any, measure: Any, every: int | None) -> None:
        """Takes the trainer that logs, a function that measures its model, and how often."""
        self._trainer = trainer
        self._measure = measure
        self._every = every

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Measures when it is time; every worker does, so that none waits for another."""
        last = state.global_step >= state.max_steps
        if last or (self._every is not None and state.global_step % self._every == 0):
            result: ValidationResult = self._measure()
            self._trainer.log({"eval_answer_loss": result.answer_loss, "eval_token_accuracy": result.token_accuracy})
