"""One cell of the paper's comparison: a variant, trained with one seed and tested on the held-out phantoms."""

# transformers leaves most of its methods untyped.
# mypy: disable-error-code="no-untyped-call"

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from transformers import PrinterCallback, TrainerCallback, TrainingArguments

from benchmarks.paper_table_data import START_NAME, TOWER_NAME, Reports, Scale, collate_reports
from benchmarks.paper_table_variants import Variant, build, objective_of, set_organs, size_of
from echovlm_ray.model.modeling import EchoVLMForConditionalGeneration
from echovlm_ray.training.encode import IGNORED
from echovlm_ray.training.objective import TrainingObjective
from echovlm_ray.training.stream import ExampleStream
from echovlm_ray.training.trainer import EchoVLMTrainer

MAX_NEW_TOKENS = 200
# Pictures that are answered together.
_TOGETHER = 34


class Cell(BaseModel):
    """The result of one variant and one seed.

    Attributes:
        answers: one a held-out picture, in order.
        organs: of each, the place of the organ that the organ gate chose.
        total, active: parameters, and those that a token meets.
        step_seconds: processor time of an optimizer step, the median, without the reading of examples.
        answer_loss, token_accuracy: on the held-out reports, given the words before.
        dead_experts: at the end of training, over all layers.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    variant: str
    seed: int
    answers: list[str]
    organs: list[int]
    total: int
    active: int
    step_seconds: float
    answer_loss: float
    token_accuracy: float
    dead_experts: float


class _Steps(TrainerCallback):
    """Measures steps, and reports progress."""

    def __init__(self, progress: Callable[[int], None]) -> None:
        self.seconds: list[float] = []
        self._progress = progress
        self._begin = 0.0

    def on_step_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        self._begin = time.process_time()

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds.append(time.process_time() - self._begin)
        self._progress(1)


def run_cell(
    variant: Variant,
    seed: int,
    scale: Scale,
    train: Reports,
    held_out: Reports,
    gated: Sequence[int],
    folder: Path,
    progress: Callable[[int], None] = lambda _: None,
) -> Cell:
    """Trains and tests.

    Args:
        variant: the model.
        seed: of its random weights and of the order of the examples.
        scale: how long.
        train: what is learnt from.
        held_out: the test phantoms.
        gated: of each held-out picture the organ that the organ gate chose.
        folder: where the start and the vision tower are.
        progress: called with 1 after every step.
    """
    model = build(
        variant, folder / START_NAME, folder / TOWER_NAME, organs=len(scale.organs), layers=scale.layers, seed=seed
    )
    objective = objective_of(variant, model, balancing=scale.balancing)
    seconds, dead = _train(objective, seed, scale, train, progress)
    loss, accuracy = _measure(objective, held_out)
    size = size_of(variant, model)
    return Cell(
        variant=variant.name,
        seed=seed,
        answers=ask(model, held_out, gated),
        organs=list(gated),
        total=size.total,
        active=size.active,
        step_seconds=seconds,
        answer_loss=loss,
        token_accuracy=accuracy,
        dead_experts=dead,
    )


def _train(
    objective: TrainingObjective, seed: int, scale: Scale, train: Reports, progress: Callable[[int], None]
) -> tuple[float, float]:
    """The median of a step in seconds, and how many experts were dead in the end."""
    steps = _Steps(progress)
    with tempfile.TemporaryDirectory() as output:
        arguments = TrainingArguments(
            output_dir=output,
            max_steps=scale.steps,
            per_device_train_batch_size=scale.batch,
            learning_rate=scale.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=max(scale.steps // 20, 1),
            weight_decay=0.05,
            adam_beta1=0.9,
            adam_beta2=0.98,
            max_grad_norm=1.0,
            optim="adamw_torch_fused",
            bf16=True,
            seed=seed,
            logging_steps=max(scale.steps // 10, 1),
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            remove_unused_columns=False,
            disable_tqdm=True,
        )
        trainer = EchoVLMTrainer(
            model=objective,
            args=arguments,
            train_dataset=ExampleStream(train, seed=seed, length=scale.steps * scale.batch),
            data_collator=collate_reports,
            seed=seed,
            callbacks=[steps],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    dead = [entry["dead_experts"] for entry in trainer.state.log_history if "dead_experts" in entry]
    return median(steps.seconds), float(dead[-1])


@torch.inference_mode()
def _measure(objective: TrainingObjective, held_out: Reports) -> tuple[float, float]:
    """On the held-out reports, given the words before: loss in nats a token, and the share of tokens that are right."""
    objective.eval()
    loss, right, tokens = 0.0, 0, 0
    for begin in range(0, len(held_out), _TOGETHER):
        indices = range(begin, min(begin + _TOGETHER, len(held_out)))
        batch = collate_reports([held_out.encoded(index, 0) for index in indices])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs = objective(**batch)
        wanted = batch["targets"] != IGNORED
        count = int(wanted.sum())
        loss += float(outputs["answer_loss"]) * count
        right += int((outputs["logits"].argmax(dim=-1) == batch["targets"][wanted]).sum())
        tokens += count
    return loss / tokens, right / tokens


@torch.inference_mode()
def ask(model: EchoVLMForConditionalGeneration, held_out: Reports, gated: Sequence[int]) -> list[str]:
    """The report on each picture: the likeliest token each time.

    Pictures of one organ are asked about together, since the experts of a forward pass are those of one organ.
    """
    model.eval()
    model.config.text_config._attn_implementation = "sdpa"
    answers = [""] * len(held_out)
    for organ in sorted(set(gated)):
        set_organs(model, torch.tensor([organ]))
        members = [index for index, each in enumerate(gated) if each == organ]
        for begin in range(0, len(members), _TOGETHER):
            chosen = members[begin : begin + _TOGETHER]
            for index, tokens in zip(chosen, _continue(model, held_out, chosen), strict=True):
                answers[index] = held_out.decode(tokens)
    return answers


def _continue(model: EchoVLMForConditionalGeneration, held_out: Reports, chosen: Sequence[int]) -> list[list[int]]:
    """What follows the prompt for each picture, up to the token that ends a turn."""
    prompt_BT = held_out.prompt().expand(len(chosen), -1)
    embeddings = model.model.language_model.embed_tokens(prompt_BT)
    is_picture = (prompt_BT == model.config.image_token_id)[..., None]
    embeddings = embeddings.masked_scatter(is_picture, held_out.embeddings[list(chosen)])
    position_3BT = held_out.encoded(0, 0).position_3T[:, None, : prompt_BT.shape[1]].expand(-1, len(chosen), -1)
    outputs = model(inputs_embeds=embeddings, position_ids=position_3BT, use_cache=True, logits_to_keep=1)
    tokens: list[list[int]] = [[] for _ in chosen]
    ended = torch.zeros(len(chosen), dtype=torch.bool)
    place = int(position_3BT.max())
    for _ in range(MAX_NEW_TOKENS):
        next_B = outputs.logits[:, -1].argmax(dim=-1)
        ended |= next_B == held_out.end
        if ended.all():
            break
        for row in (~ended).nonzero().flatten().tolist():
            tokens[row].append(int(next_B[row]))
        place += 1
        outputs = model(
            input_ids=next_B[:, None],
            position_ids=torch.full((3, len(chosen), 1), place),
            past_key_values=outputs.past_key_values,
            use_cache=True,
            logits_to_keep=1,
        )
    return tokens
