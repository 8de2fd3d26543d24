"""Trains the demo: a backbone with its experts on phantoms of all regions, then a second version for the breast.

What comes out is the folder that `echovlm_ray.checkpoint.demo` makes a checkpoint of.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from echovlm_ray.checkpoint.atomic import new_folder
from echovlm_ray.checkpoint.bundle_card import BundleCard
from echovlm_ray.checkpoint.demo import (
    ABOUT_NAME,
    BACKBONE_WEIGHTS_NAME,
    PROTOTYPES_NAME,
    DemoAbout,
    DemoBundle,
    prototype_name,
)
from echovlm_ray.checkpoint.groups import clone_groups
from echovlm_ray.checkpoint.layout import DEMO_NAME, ORGANS, backbone_directory
from echovlm_ray.checkpoint.reader import CONFIG_NAME
from echovlm_ray.checkpoint.released import copy_companions
from echovlm_ray.checkpoint.schema import is_routed
from echovlm_ray.checkpoint.split import Labels, split
from echovlm_ray.data.phantom.phantom import NOTICE, attributes_at
from echovlm_ray.model.checkpoint import load_vision_tower
from echovlm_ray.model.processing import EchoVLMProcessor
from echovlm_ray.training.expert import CARD_NAME, train_expert
from echovlm_ray.training.kept_examples import pooled_direction
from echovlm_ray.training.phantom_pool import PhantomPool
from echovlm_ray.training.recipe import PhantomSection, Stage
from echovlm_ray.training.recipe_file import load_recipe
from echovlm_ray.training.reporting import CURVES_NAME
from echovlm_ray.training.run import (
    PHANTOMS_NAME,
    RECIPE_NAME,
    RUN_NAME,
    Run,
    begin_run,
    read_run,
    stage_folder,
    train_stages,
)
from echovlm_ray.training.run_lock import hold_run
from echovlm_ray.training.small_start import write_small_start
from echovlm_ray.training.sources import DataFiles
from echovlm_ray.training.stage import MODEL_NAME, RESULT_NAME
from echovlm_ray.training.start import Start
from experts.bundles.bundle import Bundle

VERSION = "2.0.0"
DESCRIPTION = (
    "A small EchoVLM that was trained on synthetic ultrasound phantoms, to try the system with. It has never seen a "
    "patient: what it says about real images means nothing. Not a medical device."
)
# The organ that has a second version, and what only that one has seen.
ORGAN, NEW_VERSION = "breast", "1.1.0"
_INTENDED = "Trying out the system on synthetic phantoms. Not a medical device."
# Pictures of each organ that a prototype is the mean of.
_PROTOTYPE_PICTURES = 150


def train_demo(
    folder: Path,
    *,
    changes: Mapping[str, list[str]] = MappingProxyType({}),
    threads: int | None = None,
    quiet: bool = False,
) -> Path:
    """Trains the demo, or goes on with what of it is in the folder.

    Args:
        folder: the work folder: runs, checkpoints, phantoms; about 2 GB.
        changes: name of a recipe → what to change of it, like `data.phantoms.pictures=60`; for tests.
        threads: torch's.
        quiet: whether to say nothing on the terminal.

    Returns:
        The folder `demo_model` in it.

    Raises:
        TrainingInterrupted: Ctrl-C; the same call goes on.
        TrainingError: it cannot go on, or another process trains it.
    """
    made = folder / "demo_model"
    if made.is_dir():
        return made
    if threads is not None:
        torch.set_num_threads(threads)
    folder.mkdir(parents=True, exist_ok=True)
    with hold_run(folder):
        _train_demo(folder, made, changes, threads, quiet)
    return made


def _train_demo(folder: Path, made: Path, changes: Mapping[str, list[str]], threads: int | None, quiet: bool) -> None:
    first, checkpoint = folder / "backbone", folder / "checkpoint"
    if not (first / RUN_NAME).is_file():
        recipe = load_recipe("demo", changes.get("demo"))
        start = folder / "start"
        begin = Start(kind="fresh", folder=start) if start.is_dir() else write_small_start(start, recipe)
        begin_run(first, Run(kind="model", start=begin, files=DataFiles()), recipe)
    run, recipe = read_run(first)
    model = train_stages(first, run, recipe, threads=threads, quiet=quiet)
    if not checkpoint.is_dir():
        split(
            model,
            checkpoint,
            groups=lambda num_experts: clone_groups(ORGANS, num_experts),
            routing="organs",
            labels=Labels(name=DEMO_NAME, authors="EchoVLM-Ray", license="Apache-2.0", intended_use=_INTENDED),
        )
    second = folder / ORGAN
    if not (second / RUN_NAME).is_file():
        begin = Start(kind="organ", folder=checkpoint, organ=ORGAN)
        run = Run(kind="expert", start=begin, files=DataFiles(), version=NEW_VERSION)
        begin_run(second, run, load_recipe("demo-expert", changes.get("demo-expert")))
    bundle, _ = train_expert(second, *read_run(second), threads=threads, quiet=quiet)
    with new_folder(made) as partial:
        _export(partial, folder / "start", model, checkpoint, first, second, bundle)


def _export(partial: Path, start: Path, model: Path, checkpoint: Path, first: Path, second: Path, bundle: Path) -> None:
    (partial / "backbone").mkdir()
    copy_companions(model, partial / "backbone")
    # The demo is written in float32, whatever its weights are kept in.
    config = json.loads((model / CONFIG_NAME).read_text(encoding="utf-8"))
    text = json.dumps({**config, "torch_dtype": "float32"}, indent=2)
    (partial / "backbone" / CONFIG_NAME).write_text(text + "\n", encoding="utf-8")
    # transformers writes one of its own, without the second token that ends a text.
    shutil.copyfile(start / "generation_config.json", partial / "backbone" / "generation_config.json")
    weights = load_file(model / BACKBONE_WEIGHTS_NAME)
    save_file(
        {name: value.bfloat16() for name, value in weights.items() if not is_routed(name)},
        partial / "backbone" / BACKBONE_WEIGHTS_NAME,
        metadata={"format": "pt"},
    )
    shared, special = "experts-1.0.0.safetensors", f"{ORGAN}-{NEW_VERSION}.safetensors"
    save_file({name: value.bfloat16() for name, value in weights.items() if is_routed(name)}, partial / shared)
    trained = load_file(second / MODEL_NAME / BACKBONE_WEIGHTS_NAME)
    save_file({name: value.bfloat16() for name, value in trained.items()}, partial / special)
    prototypes = _prototypes(checkpoint, PhantomPool.open(first / PHANTOMS_NAME, _phantoms(first)))
    opened = Bundle.open(bundle)
    found = opened.prototype()
    assert found is not None
    prototypes[prototype_name(ORGAN, NEW_VERSION)] = found
    save_file(prototypes, partial / PROTOTYPES_NAME)
    bundles = [
        DemoBundle(organ=organ, weights=shared, card=_first_card(organ, first), served=organ != ORGAN)
        for organ in ORGANS
    ]
    said = opened.manifest.model_dump(include=set(BundleCard.model_fields))
    bundles.insert(1, DemoBundle(organ=ORGAN, weights=special, card=BundleCard(**said), served=True))
    about = DemoAbout(name=DEMO_NAME, version=VERSION, description=DESCRIPTION, bundles=tuple(bundles))
    (partial / ABOUT_NAME).write_text(about.model_dump_json(indent=2, exclude_none=True) + "\n", encoding="utf-8")
    _, recipe = read_run(first)
    stages = recipe.stages
    for number, stage in enumerate(stages):
        shutil.copyfile(stage_folder(first, recipe, number) / CURVES_NAME, partial / f"curves-{stage.name}.png")
    _, expert_recipe = read_run(second)
    shutil.copyfile(stage_folder(second, expert_recipe, 0) / CURVES_NAME, partial / f"curves-{ORGAN}-{NEW_VERSION}.png")
    results = {stage.name: stage_folder(first, recipe, number) / RESULT_NAME for number, stage in enumerate(stages)}
    card = _model_card(sum(value.numel() for value in weights.values()), stages, results, _phantoms(first))
    (partial / CARD_NAME).write_text(card, encoding="utf-8")
    shutil.copyfile(first / RECIPE_NAME, partial / "recipe.yaml")
    shutil.copyfile(second / RECIPE_NAME, partial / f"recipe-{ORGAN}-{NEW_VERSION}.yaml")
    shutil.copyfile(second / CARD_NAME, partial / f"MODEL_CARD-{ORGAN}-{NEW_VERSION}.md")


def _model_card(parameters: int, stages: Sequence[Stage], results: Mapping[str, Path], phantoms: PhantomSection) -> str:
    """The demo's model card, Markdown, after Mitchell et al. (arXiv 1810.03993)."""
    found = {name: json.loads(path.read_text(encoding="utf-8")) for name, path in results.items()}
    rows = [
        f"| {stage.name} | {stage.learn} | {found[stage.name]['steps']:.0f} × {stage.batch_size} | "
        f"{stage.learning_rate:g} | {found[stage.name].get('eval_token_accuracy', '-')} |"
        for stage in stages
    ]
    return f"""# {DEMO_NAME} {VERSION}

{DESCRIPTION}

- **What it is**: an EchoVLM of {parameters / 1e6:.1f} million parameters, experts of one organ included; weights are
  kept in bfloat16.
- **Intended use**: {_INTENDED}
- **Authors**: EchoVLM-Ray. Licence: Apache-2.0.
- **Made by**: `make demo-model`, an hour on two cores.

## Data

{phantoms.pictures} still phantoms and {phantoms.loops} loops of seed {phantoms.seed}, of all seven regions and their
classes but {", ".join(phantoms.exclude) or "none"}: synthetic pictures that are computed, with drawn diseases. Reports,
diagnoses with options, questions, findings, impressions and captions, in English and Chinese.

## Training

| stage | learns | steps × examples | learning rate | token accuracy on unseen phantoms |
| --- | --- | --- | --- | --- |
{chr(10).join(rows)}

The whole recipes are `recipe.yaml` and `recipe-{ORGAN}-{NEW_VERSION}.yaml`, the curves `curves-*.png`.
Version 1.0.0 of every organ has the experts that were trained with the backbone. Version {NEW_VERSION} of the {ORGAN}
was trained from them against the frozen backbone, on all classes: `MODEL_CARD-{ORGAN}-{NEW_VERSION}.md`.

## What it gets right

On phantoms of another seed, from the served system: `benchmarks/results/demo_quality.md` in the repository.

## What it cannot do

Anything about a patient. It knows one view of each region, the words of the phantoms, and no others.
"""


def _phantoms(first: Path) -> PhantomSection:
    section = read_run(first)[1].data.phantoms
    assert section is not None
    return section


def _first_card(organ: str, first: Path) -> BundleCard:
    section = _phantoms(first)
    unseen = [name for name in section.exclude if name.startswith(f"{organ}/")]
    return BundleCard(
        name=f"{DEMO_NAME}-{organ}",
        version="1.0.0",
        description="The experts that were trained with the backbone on the phantoms of all regions."
        + (f" They have never seen {', '.join(unseen)}." if unseen else ""),
        authors="EchoVLM-Ray",
        license="Apache-2.0",
        intended_use=_INTENDED,
        changelog={"1.0.0": "Trained with the backbone."},
        training_data=f"{section.pictures} phantoms and {section.loops} loops of all regions ({NOTICE}).",
        references=("https://arxiv.org/abs/2509.14977",),
    )


@torch.no_grad()
def _prototypes(checkpoint: Path, pool: PhantomPool) -> dict[str, torch.Tensor]:
    """The direction of the pooled embeddings of each organ's pictures; every picture counts alike."""
    processor = EchoVLMProcessor.from_pretrained(backbone_directory(checkpoint))
    tower = load_vision_tower(checkpoint, dtype=torch.float32)
    directions: dict[str, list[torch.Tensor]] = {organ: [] for organ in ORGANS}
    for number, index in enumerate(pool.section.picture_indices):
        organ = attributes_at(pool.section.seed, index, pool.classes).organ
        assert organ is not None
        if len(directions[organ]) == _PROTOTYPE_PICTURES:
            continue
        item = processor.image_patches(Image.fromarray(pool.pictures_NHW[number]))
        pooled = tower(torch.from_numpy(item.patches), grid_thw=torch.tensor([item.grid])).pooler_output
        directions[organ].append(pooled_direction(pooled))
        if all(len(found) == _PROTOTYPE_PICTURES for found in directions.values()):
            break
    return {prototype_name(organ, "1.0.0"): torch.stack(found).mean(dim=0) for organ, found in directions.items()}
