"""Trains one organ's experts against a frozen backbone, and makes a bundle of them that can be pushed."""

import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from safetensors.torch import save_file

from echovlm_ray.checkpoint.bundle_card import BundleCard, read_card
from echovlm_ray.checkpoint.layout import backbone_directory
from echovlm_ray.checkpoint.pack import PackOptions, pack
from echovlm_ray.model.checkpoint import load_vision_tower
from echovlm_ray.model.configuration import EchoVLMConfig
from echovlm_ray.training.encode import IGNORED
from echovlm_ray.training.errors import TrainingError
from echovlm_ray.training.example_cache import CachedExamples, cache_examples, pooled_mean
from echovlm_ray.training.examples import ExampleError
from echovlm_ray.training.objective import TrainingObjective
from echovlm_ray.training.recipe import Recipe
from echovlm_ray.training.run import CACHE_NAME, Run, draw_phantoms, stage_folder, train_stages
from echovlm_ray.training.run_lock import lock_run
from echovlm_ray.training.stage import MODEL_NAME, RESULT_NAME, StageJob, open_encoded
from echovlm_ray.training.start import organ_bundle
from echovlm_ray.training.validation import ValidationResult, validate
from experts.bundles.layout import PROTOTYPE_TENSOR
from experts.bundles.manifest import Manifest, version_key

PROTOTYPE_NAME = "prototype.safetensors"
CARD_NAME = "MODEL_CARD.md"
BASE_NAME = "before.json"


def next_version(version: str) -> str:
    """The minor version after one: 1.1.0 after 1.0.3."""
    (major, minor, _), *_ = version_key(version)
    return f"{major}.{minor + 1}.0"


def require_later(version: str, base: str) -> None:
    """Checks that a new bundle's version comes after that of the one it starts from.

    Raises:
        TrainingError: it does not.
    """
    if version_key(version) <= version_key(base):
        raise TrainingError(
            f"version {version} does not come after {base}, which training starts from: give a later one, like "
            f"{next_version(base)}, or leave --version out"
        )


def require_experts_only(recipe: Recipe) -> None:
    """Checks that a recipe trains only weights that a bundle contains.

    Raises:
        TrainingError: it trains something else, or has adapters.
    """
    for stage in recipe.stages:
        if stage.adapters is not None or not set(stage.train) <= {"gates", "experts"}:
            raise TrainingError(
                f"stage {stage.name} trains more than gates and experts: a bundle carries nothing else, and all organs "
                "share the rest. Use the recipe `expert`, or `echoray train model`"
            )
    if len(recipe.stages) > 1:
        raise TrainingError("experts are trained in one stage: join the recipe's stages to one")


def train_expert(
    folder: Path,
    run: Run,
    recipe: Recipe,
    *,
    workers: int = 1,
    device: str = "auto",
    threads: int | None = None,
    quiet: bool = False,
) -> tuple[Path, Manifest]:
    """Trains the remaining steps of a run, and packs the bundle.

    Args:
        folder: made by `begin_run`, of kind "expert".
        run: what it says.
        recipe: likewise.
        workers: how many processes train.
        device: see `StageJob`.
        threads: see `StageJob`.
        quiet: whether to say nothing on the terminal.

    Returns:
        the bundle's folder and its manifest.

    Raises:
        TrainingInterrupted: Ctrl-C; the state was saved.
        TrainingError: it cannot go on, its pictures are missing, or another process trains it.
    """
    require_experts_only(recipe)
    with lock_run(folder):
        return _train_expert(folder, run, recipe, workers, device, threads, quiet)


def _train_expert(
    folder: Path, run: Run, recipe: Recipe, workers: int, device: str, threads: int | None, quiet: bool
) -> tuple[Path, Manifest]:
    assert run.start.organ is not None
    assert run.version is not None
    organ, bundle = run.start.organ, folder / f"{run.start.organ}-{run.version}"
    base = organ_bundle(run.start.folder, organ, run.start.version).manifest
    if threads is not None:
        torch.set_num_threads(threads)
    train, held_out, division = _keep_examples(folder, run, recipe, quiet)
    if held_out is not None and not (folder / BASE_NAME).is_file():
        before = _measure(run, recipe, held_out)
        (folder / BASE_NAME).write_text(json.dumps(_metrics("before", before), indent=2) + "\n", encoding="utf-8")
    experts = train_stages(folder, run, recipe, workers=workers, device=device, threads=threads, quiet=quiet)
    prototype = pooled_mean(train)
    if prototype is not None:
        save_file({PROTOTYPE_TENSOR: prototype}, folder / PROTOTYPE_NAME)
    said = BundleCard() if run.card is None else read_card(run.card)
    card = said.over(_card(folder, run, recipe, base, train, division))
    if not bundle.exists():
        options = PackOptions(
            organ=organ,
            checkpoint=run.start.folder,
            dtype=base.dtype,
            prototype=None if prototype is None else folder / PROTOTYPE_NAME,
        )
        pack(experts, bundle, card, options)
    manifest = Manifest.from_json((bundle / "manifest.json").read_bytes(), str(bundle))
    (folder / CARD_NAME).write_text(model_card(manifest, recipe, division), encoding="utf-8")
    return bundle, manifest


def model_card(manifest: Manifest, recipe: Recipe, division: str) -> str:
    """The bundle's model card, Markdown, after Mitchell et al. (arXiv 1810.03993).

    Args:
        manifest: the bundle's.
        recipe: what it was trained by.
        division: how the records were divided into trained on and measured on.
    """
    stage = recipe.stages[0]
    metrics = "\n".join(f"| {name} | {value:.4g} |" for name, value in sorted(manifest.eval_metrics.items()))
    changes = "\n".join(f"- {version}: {text}" for version, text in manifest.changelog.items())
    return f"""# {manifest.name} {manifest.version}

{manifest.description}

- **Intended use**: {manifest.intended_use}
- **Not for**: diagnosis or any other clinical decision. This is not a medical device.
- **Authors**: {manifest.authors}. Licence: {manifest.license}.
- **Organ**: {manifest.organ}. Works with one backbone only: `{manifest.backbone_digest}`.
- **Digest**: `{manifest.digest}`

## Data

{manifest.training_data}
{manifest.data_source}

## Training

{manifest.num_experts} experts and their gate rows in each of {manifest.num_layers} layers; all else was frozen.
AdamW, learning rate {stage.learning_rate:g} ({stage.schedule}), batches of {stage.batch_size}, seed {recipe.seed}.
The whole recipe is `recipe.yaml` beside this file; curves and log lie in the stage's folder.

## Metrics

On records that were not trained on; `before` is the version that training started from. {division}

| measure | value |
| --- | --- |
{metrics or "| none was kept back | |"}

Loss and accuracy of tokens say how well the wording is predicted, not whether a report is right: evaluate with
`echoray eval` before you promote.

## Changes

{changes}
"""


def _keep_examples(
    folder: Path, run: Run, recipe: Recipe, quiet: bool
) -> tuple[CachedExamples, CachedExamples | None, str]:
    job = StageJob(
        folder=folder,
        model=folder / MODEL_NAME,
        number=0,
        recipe=recipe,
        start=run.start,
        files=run.files,
        phantoms=draw_phantoms(folder, recipe, quiet=quiet),
    )
    *fresh, division = open_encoded(job, EchoVLMConfig.from_pretrained(backbone_directory(run.start.folder)))
    tower = load_vision_tower(run.start.folder, dtype=torch.float32)
    kept: list[CachedExamples | None] = []
    console = Console(stderr=True)
    for name, source in zip(("train", "validation"), fresh, strict=True):
        if source is None:
            kept.append(None)
            continue
        hidden = quiet or not console.is_terminal
        steps = iter(track(range(len(source)), f"encoding pictures ({name})", console=console, disable=hidden))
        skip = recipe.data.unusable == "skip"
        skipped = cache_examples(
            source,
            tower,
            folder / CACHE_NAME / name,
            skip_unusable=skip,
            progress=lambda _, steps=steps: next(steps, None),  # type: ignore[misc]
        )
        if skipped and not quiet:
            console.print(f"{skipped} of {len(source)} records cannot be used and were skipped")
        kept.append(CachedExamples(source, folder / CACHE_NAME / name))
    train, held_out = kept
    assert train is not None
    return train, held_out, division


def _measure(run: Run, recipe: Recipe, held_out: CachedExamples) -> ValidationResult:
    model = run.start.load(recipe)
    return validate(
        TrainingObjective(model, balancing=0.0),
        held_out,
        batch_size=recipe.stages[0].micro_batch_size,
        bfloat16=recipe.precision == "bfloat16",
    )


def _card(folder: Path, run: Run, recipe: Recipe, base: Manifest, train: CachedExamples, division: str) -> BundleCard:
    assert run.version is not None
    examples = pictures = tokens = 0
    for index in range(len(train)):
        try:
            example = train.encoded(index, 0)
        except ExampleError:
            continue
        examples += 1
        pictures += example.embeddings_VD is not None
        tokens += int((example.target_T != IGNORED).sum())
    result: dict[str, Any] = json.loads((stage_folder(folder, recipe, 0) / RESULT_NAME).read_text())
    metrics = {name.removeprefix("eval_"): value for name, value in result.items() if name.startswith("eval_")}
    if (folder / BASE_NAME).is_file():
        metrics |= json.loads((folder / BASE_NAME).read_text())
    inherited = base.model_dump(include={"name", "authors", "license", "copyright", "intended_use", "task"})
    return BundleCard(
        **{name: value for name, value in inherited.items() if value},
        version=run.version,
        description=f"Experts for {base.organ}, trained from version {base.version} against the frozen backbone.",
        changelog={**base.changelog, run.version: f"Trained from {base.version} on {examples} records."},
        training_data=(
            f"{examples} records, {pictures} of them with pictures, {tokens} tokens of answers; "
            f"{result['steps']:.0f} steps of {recipe.stages[0].batch_size} records. {division}"
        ),
        eval_metrics=metrics,
        references=base.references,
    )


def _metrics(when: str, result: ValidationResult) -> dict[str, float]:
    return {f"{when}_answer_loss": result.answer_loss, f"{when}_token_accuracy": result.token_accuracy}
