"""Creates the demo checkpoint from the weights in the project: a small EchoVLM that was trained on phantoms.

The weights are stored in bfloat16, which halves their size, and written in float32, which every processor supports.
Nothing else is computed, so the bytes are the same on every machine.
"""

import shutil
from collections.abc import Callable
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict
from safetensors.torch import load as load_tensors

from echovlm_ray.checkpoint.atomic import new_folder, require_vacant
from echovlm_ray.checkpoint.bundle_card import BundleCard, describe
from echovlm_ray.checkpoint.layout import (
    DEMO_NAME,
    CheckpointIndex,
    InvalidCheckpointError,
    OrganEntry,
    OrganName,
    backbone_directory,
    is_split_folder,
    read_index,
    registry_root,
    write_index,
)
from echovlm_ray.checkpoint.organs import ORGAN_SYNONYMS
from echovlm_ray.checkpoint.reader import read_config
from echovlm_ray.checkpoint.released import copy_companions
from echovlm_ray.checkpoint.schema import ModelShape, backbone_digest, expert_name, gate_name
from echovlm_ray.checkpoint.split_folder import open_split
from echovlm_ray.checkpoint.writer import write_released
from experts.bundles.layout import PROTOTYPE_TENSOR, expert_tensors_of_layer, gate_tensor
from experts.bundles.manifest import PROJECTIONS, BundleDescription, Manifest
from experts.bundles.safetensors_writer import DTYPE_NAMES
from experts.bundles.writer import write_bundle
from experts.registry.registry import Registry

ABOUT_NAME, BACKBONE_WEIGHTS_NAME, PROTOTYPES_NAME = "about.json", "model.safetensors", "prototypes.safetensors"
_PACKAGE = "echovlm_ray.checkpoint.demo_model"
_WORK_NAME = ".bundles"


class DemoBundle(BaseModel):
    """One bundle of the demo.

    Attributes:
        organ: whose experts.
        weights: the file with experts and gates, under their released names; several bundles may share it.
        card: version, metrics and texts.
        served: whether this version of the organ is live in a new system.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    organ: OrganName
    weights: str
    card: BundleCard
    served: bool


class DemoAbout(BaseModel):
    """`about.json`: the demo's metadata, and its bundles in set order."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Literal["echovlm-demo"] = DEMO_NAME
    version: str
    description: str
    bundles: tuple[DemoBundle, ...]


def demo_files() -> Traversable:
    """The folder of the demo's weights: `about.json`, `backbone/`, experts, prototypes, model card and recipes."""
    return resources.files(_PACKAGE)


def demo_about() -> DemoAbout:
    """The demo's metadata."""
    return DemoAbout.model_validate_json((demo_files() / ABOUT_NAME).read_bytes())


def make_demo(destination: Path, *, progress: Callable[[int], None] = lambda _: None) -> tuple[CheckpointIndex, bool]:
    """Creates the demo checkpoint, unless it exists.

    Args:
        destination: the folder to make.
        progress: called with the bytes of every tensor written.

    Returns:
        Its index, and whether it was created now.

    Raises:
        InvalidCheckpointError: the folder contains something else, or a damaged demo.
    """
    about = demo_about()
    if is_split_folder(destination):
        return _existing(destination, about), False
    require_vacant(destination)
    with resources.as_file(demo_files()) as source, new_folder(destination) as partial:
        return write_demo(source, partial, about, progress=progress), True


def write_demo(
    source: Path, partial: Path, about: DemoAbout, *, progress: Callable[[int], None] = lambda _: None
) -> CheckpointIndex:
    """Writes a split checkpoint from a folder like `demo_files` to an empty folder."""
    digest = _write_backbone(source / "backbone", backbone_directory(partial), progress)
    manifests = _write_bundles(source, partial, about, digest, progress)
    served = [
        OrganEntry(organ=manifest.organ, version=manifest.version, bundle_digest=manifest.digest)
        for manifest, bundle in zip(manifests, about.bundles, strict=True)
        if bundle.served
    ]
    index = CheckpointIndex(
        name=about.name,
        version=about.version,
        description=about.description,
        backbone_digest=digest,
        routing="organs",
        organs=tuple(served),
    )
    write_index(partial, index)
    return index


def _existing(destination: Path, about: DemoAbout) -> CheckpointIndex:
    index = read_index(destination)
    if index.name != about.name:
        raise InvalidCheckpointError(
            f"{destination} holds another checkpoint ({index.name} {index.version}); give a new folder for the demo"
        )
    if index.version != about.version:
        raise InvalidCheckpointError(
            f"{destination} holds version {index.version} of the demo and this is {about.version}: remove it and run "
            "this again"
        )
    if problems := open_split(destination).problems:
        raise InvalidCheckpointError(
            f"{destination} holds a damaged demo ({problems[0]}); remove it and run this again"
        )
    return index


def _write_backbone(source: Path, directory: Path, progress: Callable[[int], None]) -> str:
    directory.mkdir()
    copy_companions(source, directory)
    tensors = load_tensors((source / BACKBONE_WEIGHTS_NAME).read_bytes())
    digests = write_released(
        directory,
        {name: (torch.float32, tuple(tensors[name].shape)) for name in sorted(tensors)},
        lambda name: tensors[name].float(),
        progress=progress,
    )
    dtype = DTYPE_NAMES[torch.float32]
    described = {name: (dtype, tuple(tensors[name].shape), digests[name]) for name in digests}
    return backbone_digest(read_config(directory), described)


def _write_bundles(
    source: Path, partial: Path, about: DemoAbout, digest: str, progress: Callable[[int], None]
) -> list[Manifest]:
    registry_root(partial).mkdir()
    registry = Registry(registry_root(partial))
    shape = ModelShape.from_config(read_config(backbone_directory(partial)))
    prototypes = load_tensors((source / PROTOTYPES_NAME).read_bytes())
    # Several bundles have the same weights.
    weights = {
        name: load_tensors((source / name).read_bytes()) for name in {bundle.weights for bundle in about.bundles}
    }
    work = partial / _WORK_NAME
    work.mkdir()
    manifests = []
    for number, bundle in enumerate(about.bundles):
        facts = {
            "organ": bundle.organ,
            "backbone_digest": digest,
            "num_layers": shape.num_hidden_layers,
            "num_experts": shape.num_experts,
            "hidden_size": shape.hidden_size,
            "intermediate_size": shape.moe_intermediate_size,
            "dtype": "float32",
            "has_prototype": True,
            "source_experts": tuple(range(shape.num_experts)),
        }
        card = bundle.card.over(BundleCard(organ_synonyms=ORGAN_SYNONYMS.get(bundle.organ, ())))
        description = describe(card, facts)
        prototype = prototypes[prototype_name(bundle.organ, description.version)]
        named = _named(weights[bundle.weights], prototype, description)

        def read(name: str, named: dict[str, torch.Tensor] = named) -> torch.Tensor:
            progress(named[name].nbytes)
            return named[name]

        directory = work / str(number)
        write_bundle(directory, description, read)
        # Linked, not copied: the work folder is removed.
        manifests.append(registry.push(directory, link=True))
    shutil.rmtree(work)
    return manifests


def prototype_name(organ: str, version: str) -> str:
    """The name of a bundle's prototype in the file of all prototypes."""
    return f"{organ}-{version}"


def _named(
    tensors: dict[str, torch.Tensor], prototype: torch.Tensor, description: BundleDescription
) -> dict[str, torch.Tensor]:
    """The tensors of a bundle by their names in it, in float32."""
    named = {PROTOTYPE_TENSOR: prototype}
    for layer in range(description.num_layers):
        named[gate_tensor(layer)] = tensors[gate_name(layer)].float()
        names = expert_tensors_of_layer(description, layer)
        for projection in PROJECTIONS:
            for expert, name in enumerate(names[projection]):
                named[name] = tensors[expert_name(layer, expert, f"{projection}_proj")].float()
    return named
