"""Trains one stage, in this process or as one of several workers."""

# transformers leaves most of its methods untyped.
# mypy: disable-error-code="no-untyped-call"

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import PrinterCallback, TrainingArguments

from echovlm_ray.config import Section
from echovlm_ray.model.configuration import EchoVLMConfig
from echovlm_ray.model.processing import EchoVLMProcessor
from echovlm_ray.training.batches import collate
from echovlm_ray.training.encode import EncodedSource, ExampleEncoder, FreshlyEncoded
from echovlm_ray.training.errors import NotFiniteError, TrainingError, TrainingInterrupted
from echovlm_ray.training.example_cache import CachedExamples
from echovlm_ray.training.objective import TrainingObjective
from echovlm_ray.training.parts import merge_adapters, prepare_stage
from echovlm_ray.training.recipe import Recipe
from echovlm_ray.training.reporting import CURVES_NAME, LOG_NAME, LogFile, ProgressBar, draw_curves
from echovlm_ray.training.sources import DataFiles, open_sources
from echovlm_ray.training.start import Start, save_experts, save_model
from echovlm_ray.training.state import last_checkpoint, remove_unfinished, step_of
from echovlm_ray.training.stream import ExampleStream
from echovlm_ray.training.tracker import tracker_failure
from echovlm_ray.training.trainer import Checkpointing, EchoVLMTrainer, FiniteGradients, Interruption
from echovlm_ray.training.validation import Validation, ValidationResult, validate

MODEL_NAME = "model"
RESULT_NAME = "result.json"
HEADS_NAME = "finding-heads.safetensors"


class StageJob(Section):
    """One stage of a run; plain data, so that it can be sent to workers.

    Attributes:
        folder: the stage's own: checkpoints, log and curves.
        model: the folder to make for what was trained.
        number: which stage of the recipe, from 0.
        workers: how many processes train.
        device: "cpu", "cuda", or "auto" for a GPU where there is one.
        threads: torch's threads a process; None leaves them to torch.
        quiet: whether to print nothing.
        resume: the command that resumes the run, for messages.
        cache: the folder of cached examples, see `echovlm_ray.training.example_cache`.
        phantoms: the folder of the pool of phantoms, see `echovlm_ray.training.phantom_pool`.
        heads: the finding heads of the previous stage, with which this one continues; ignored if the file does not
            exist.
        experts_only: write the experts and gates alone, as `echoray experts pack` takes them.
    """

    folder: Path
    model: Path
    number: int
    recipe: Recipe
    start: Start
    files: DataFiles
    workers: int = 1
    device: str = "auto"
    threads: int | None = None
    quiet: bool = False
    resume: str = ""
    cache: Path | None = None
    phantoms: Path | None = None
    heads: Path | None = None
    experts_only: bool = False


def train_stage(job: StageJob) -> None:
    """Trains from the start, or from the stage's last complete checkpoint, and writes the model at the end.

    Raises:
        TrainingInterrupted: Ctrl-C; the state was saved.
        TrainingError: it cannot continue (a record is missing, the loss is NaN, the disk is full); the text has what
            was saved.
    """
    require_divisible(job)
    recipe, stage = job.recipe, job.recipe.stages[job.number]
    if job.threads is not None:
        torch.set_num_threads(job.threads)
    data = recipe.data
    model = job.start.load(recipe)
    # Adapters are drawn at random; a stage that is begun again must draw the same.
    torch.manual_seed(recipe.seed)
    prepare_stage(model, stage)
    if recipe.activation_checkpointing:
        # The reentrant kind runs the layers without gradients first, and the gates' logits would come out without any.
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    train, held_out, _ = open_encoded(job, model.config)
    steps = stage.steps or math.ceil(stage.epochs * len(train) / stage.batch_size)
    stream = ExampleStream(
        train,
        seed=recipe.seed,
        length=steps * stage.batch_size,
        skip_unusable=data.unusable == "skip",
    )
    if stage.learn == "findings":
        # What is kept back is measured by answers, which such a stage does not give.
        held_out = None
    objective = TrainingObjective(
        model, balancing=recipe.loss.balancing, learn=stage.learn, findings=recipe.loss.findings
    )
    if objective.heads is not None and job.heads is not None and job.heads.is_file():
        objective.heads.load_state_dict(load_file(job.heads))

    def measure() -> ValidationResult:
        assert held_out is not None
        return validate(
            objective,
            held_out,
            batch_size=stage.micro_batch_size,
            bfloat16=recipe.precision == "bfloat16",
        )

    bar = ProgressBar(stage.name, quiet=job.quiet)
    interruption = Interruption()
    trainer = EchoVLMTrainer(
        model=objective,
        args=_arguments(job, steps),
        train_dataset=stream,
        data_collator=collate,
        seed=recipe.seed,
        callbacks=[
            FiniteGradients(),
            interruption,
            Checkpointing(recipe.keep),
            LogFile(job.folder / LOG_NAME),
            bar,
        ],
    )
    trainer.remove_callback(PrinterCallback)
    if held_out is not None:
        trainer.add_callback(Validation(trainer, measure, recipe.validate_every))
    _run(job, trainer, interruption, bar)
    if trainer.is_world_process_zero():
        _finish(job, objective, steps, held_out, measure)
    trainer.end()


def open_encoded(job: StageJob, config: EchoVLMConfig) -> tuple[EncodedSource, EncodedSource | None, str]:
    """Opens the encoded training data, the validation data if any, and the description of the split.

    Cached embeddings are used if there are any.

    Raises:
        ExampleError: a file cannot be read.
    """
    data = job.recipe.data
    encoder = ExampleEncoder(
        EchoVLMProcessor.from_pretrained(job.start.companions),
        config,
        max_tokens=data.max_tokens,
        max_visual_tokens=data.max_visual_tokens,
        emphasis_weight=job.recipe.loss.emphasis_weight,
    )
    sources = open_sources(job.files, data, seed=job.recipe.seed, phantoms=job.phantoms)
    opened: list[EncodedSource | None] = []
    for name, source in (("train", sources.train), ("validation", sources.held_out)):
        fresh = None if source is None else FreshlyEncoded(source, encoder)
        kept = fresh is not None and job.cache is not None
        opened.append(CachedExamples(fresh, job.cache / name) if kept and fresh and job.cache else fresh)
    train, held_out = opened
    assert train is not None
    return train, held_out, sources.division


def _run(job: StageJob, trainer: EchoVLMTrainer, interruption: Interruption, bar: ProgressBar) -> None:
    checkpoint = last_checkpoint(job.folder)
    if trainer.is_world_process_zero():
        remove_unfinished(job.folder)
    try:
        with interruption.installed():
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except NotFiniteError as error:
        raise NotFiniteError(
            f"{error}; {_kept(job)}. Lower learning_rate or max_grad_norm, or set precision to float32, and look at "
            f"the records of that step. {_how_to_go_on(job)}"
        ) from None
    except Exception as error:
        if (tracker := tracker_failure(error, job.recipe.tracker)) is not None:
            raise TrainingError(f"{tracker}; {_kept(job)}. {_how_to_go_on(job)}") from None
        # Whatever the writer of one of its files raised: a checkpoint that is not whole was being written.
        if trainer.args.world_size > 1 or not remove_unfinished(job.folder):
            raise
        reason = getattr(error, "strerror", None) or "is the disk full?"
        raise TrainingError(
            f"{job.folder}: a checkpoint could not be written: {reason}; {_kept(job)}. {_how_to_go_on(job)}"
        ) from None
    finally:
        bar.close()
        if trainer.is_world_process_zero():
            draw_curves(job.folder / LOG_NAME, job.folder / CURVES_NAME, job.recipe.stages[job.number].name)
    if trainer.failure is not None:
        raise TrainingError(f"{trainer.failure}; {_kept(job)}. {_how_to_go_on(job)}")
    if interruption.requested and trainer.state.global_step < trainer.state.max_steps:
        raise TrainingInterrupted(f"Stopped; {_kept(job)}. {_how_to_go_on(job)}")


def _kept(job: StageJob) -> str:
    checkpoint = last_checkpoint(job.folder)
    return "nothing had been saved yet" if checkpoint is None else f"the state after step {step_of(checkpoint)} is kept"


def _how_to_go_on(job: StageJob) -> str:
    return f"Go on with: {job.resume}" if job.resume else ""


def _finish(
    job: StageJob,
    objective: TrainingObjective,
    steps: int,
    held_out: EncodedSource | None,
    measure: Callable[[], ValidationResult],
) -> None:
    result: dict[str, float] = {"steps": steps}
    if held_out is not None:
        measured = measure()
        result |= {
            "eval_answer_loss": measured.answer_loss,
            "eval_token_accuracy": measured.token_accuracy,
            "eval_tokens": measured.tokens,
        }
    if objective.heads is not None:
        save_file(objective.heads.state_dict(), job.folder / HEADS_NAME)
    model = objective.model
    if job.recipe.stages[job.number].adapters is not None:
        merge_adapters(model)
    last = job.number + 1 == len(job.recipe.stages)
    dtype = torch.bfloat16 if last and job.recipe.weights == "bfloat16" else torch.float32
    if job.experts_only:
        save_experts(model, job.model)
    else:
        save_model(model, job.start.companions, job.model, dtype=dtype)
    (job.folder / RESULT_NAME).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def micro_batches(job: StageJob) -> int:
    """The number of micro-batches of each worker in a step.

    Raises:
        TrainingError: a batch cannot be divided like that.
    """
    stage = job.recipe.stages[job.number]
    share, rest = divmod(stage.batch_size, stage.micro_batch_size * job.workers)
    if rest:
        raise TrainingError(
            f"stage {stage.name}: batch_size {stage.batch_size} cannot be divided among {job.workers} workers with "
            f"micro_batch_size {stage.micro_batch_size}: change one of the three"
        )
    return share


def require_divisible(job: StageJob) -> None:
    """Checks that weights can be sharded, if the recipe sets it.

    Raises:
        TrainingError: they cannot: accelerate divides them among GPUs alone, and leaves them whole without a word.
    """
    if job.recipe.shard and (job.workers == 1 or _on_cpu(job)):
        raise TrainingError(
            "shard divides the model among several GPUs: give --workers 2 or more and --device cuda, or set shard to "
            "false"
        )


def _on_cpu(job: StageJob) -> bool:
    return job.device == "cpu" or (job.device == "auto" and not torch.cuda.is_available())


def _arguments(job: StageJob, steps: int) -> TrainingArguments:
    recipe, stage = job.recipe, job.recipe.stages[job.number]
    schedules = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}
    on_cpu = _on_cpu(job)
    several: dict[str, Any] = {}
    if job.workers > 1:
        several = {"ddp_find_unused_parameters": False, "ddp_backend": "gloo" if on_cpu else "nccl"}
    if recipe.shard:
        layers = ["EchoVLMDecoderLayer", "Qwen2VLVisionBlock"]
        several |= {"fsdp": True, "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": layers}}
    return TrainingArguments(
        output_dir=str(job.folder),
        max_steps=steps,
        per_device_train_batch_size=stage.micro_batch_size,
        gradient_accumulation_steps=micro_batches(job),
        learning_rate=stage.learning_rate,
        lr_scheduler_type=schedules[stage.schedule],
        warmup_steps=math.ceil(stage.warmup_share * steps),
        weight_decay=stage.weight_decay,
        adam_beta1=stage.betas[0],
        adam_beta2=stage.betas[1],
        max_grad_norm=stage.max_grad_norm,
        optim="adamw_torch_fused",
        bf16=recipe.precision == "bfloat16",
        seed=recipe.seed,
        logging_steps=recipe.log_every,
        logging_nan_inf_filter=False,
        logging_first_step=True,
        save_strategy="steps",
        save_steps=recipe.save_every,
        # `Checkpointing` removes old ones: only what is known to be whole may take another's place.
        save_total_limit=None,
        report_to=recipe.tracker,
        use_cpu=on_cpu,
        dataloader_num_workers=recipe.data.workers,
        remove_unused_columns=False,
        disable_tqdm=True,
        **several,
    )
