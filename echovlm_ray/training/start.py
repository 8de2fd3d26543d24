"""The model and the files from which a stage starts."""

# transformers leaves most of its methods untyped.
# mypy: disable-error-code="no-untyped-call"

from pathlib import Path
from typing import Literal

import torch

from echovlm_ray.checkpoint.atomic import new_folder
from echovlm_ray.checkpoint.layout import (
    InvalidCheckpointError,
    backbone_directory,
    is_split_folder,
    read_index,
    registry_root,
)
from echovlm_ray.checkpoint.released import copy_companions
from echovlm_ray.checkpoint.schema import expert_name, gate_name
from echovlm_ray.checkpoint.writer import write_released
from echovlm_ray.config import Section
from echovlm_ray.model.configuration import EchoVLMConfig
from echovlm_ray.model.decoder_layer import EchoVLMDecoderLayer
from echovlm_ray.model.expert_kernels import weights_of
from echovlm_ray.model.modeling import EchoVLMForConditionalGeneration
from echovlm_ray.training.recipe import Recipe
from echovlm_ray.training.upcycling import is_dense, upcycle
from experts.bundles.bundle import Bundle
from experts.registry.registry import Registry


class Start(Section):
    """The start of a run.

    Attributes:
        kind: "fresh" (random weights), "dense" (a Qwen2-VL to be upcycled), "trained" (an EchoVLM) or "organ" (one
            organ's model out of a split checkpoint).
        folder: the checkpoint; of a fresh start the folder whose configuration, tokenizer and processor are used.
        organ: with kind "organ", whose experts.
        version: with kind "organ", of which version; None: the one that the checkpoint was split with.
    """

    kind: Literal["fresh", "dense", "trained", "organ"]
    folder: Path
    organ: str | None = None
    version: str | None = None

    @property
    def companions(self) -> Path:
        """The folder with configuration, tokenizer and processor."""
        return backbone_directory(self.folder) if self.kind == "organ" else self.folder

    def load(self, recipe: Recipe) -> EchoVLMForConditionalGeneration:
        """The model, in float32; the same call gives the same weights.

        Raises:
            InvalidCheckpointError: the folder does not hold what it must.
        """
        if self.kind == "dense":
            return upcycle(self.folder, recipe.upcycling, seed=recipe.seed)
        if self.kind == "fresh":
            config = EchoVLMConfig.from_pretrained(self.folder)
            torch.manual_seed(recipe.seed)
            fresh: EchoVLMForConditionalGeneration = EchoVLMForConditionalGeneration._from_config(
                config, dtype=torch.float32
            )
            return fresh
        model: EchoVLMForConditionalGeneration = EchoVLMForConditionalGeneration.from_pretrained(
            self.folder, organ=self.organ, dtype=torch.float32
        )
        if self.organ is not None and self.version is not None:
            _take_experts(model, organ_bundle(self.folder, self.organ, self.version))
        return model


def save_experts(model: EchoVLMForConditionalGeneration, destination: Path) -> None:
    """Writes only the routed experts and gates, under their released names. The folder appears when it is complete."""
    tensors: dict[str, torch.Tensor] = {}
    for number, layer in enumerate(model.model.language_model.layers):
        assert isinstance(layer, EchoVLMDecoderLayer)
        weights = weights_of(layer.moe.experts)
        tensors[gate_name(number)] = layer.moe.gate.weight
        for expert in range(weights.num_experts):
            tensors[expert_name(number, expert, "gate_proj")] = weights.gate_EFD[expert]
            tensors[expert_name(number, expert, "up_proj")] = weights.up_EFD[expert]
            tensors[expert_name(number, expert, "down_proj")] = weights.down_EDF[expert]
    with new_folder(destination) as partial:
        write_released(
            partial,
            {name: (value.dtype, tuple(value.shape)) for name, value in tensors.items()},
            lambda name: tensors[name].detach().cpu().contiguous(),
        )


def find_start(folder: Path, *, fresh: bool) -> Start:
    """Determines the kind of start of a folder.

    Raises:
        InvalidCheckpointError: a training cannot start from it.
    """
    if is_split_folder(folder):
        raise InvalidCheckpointError(
            f"{folder} is split: merge it first (`echoray checkpoint merge {folder} DST --organ ORGAN`), or train one "
            "organ's experts (`echoray train expert`)"
        )
    if fresh:
        if not (folder / "config.json").is_file():
            raise InvalidCheckpointError(f"{folder} has no config.json")
        return Start(kind="fresh", folder=folder)
    return Start(kind="dense" if is_dense(folder) else "trained", folder=folder)


def organ_bundle(checkpoint: Path, organ: str, version: str | None) -> Bundle:
    """An organ's bundle out of a split checkpoint's registry; without a version the one that it was split with.

    Raises:
        InvalidCheckpointError: the checkpoint has no such organ, or divides its experts among the organs.
        UnknownBundleError: there is no such version.
    """
    index = read_index(checkpoint)
    entry = index.entry(organ)
    if index.routing != "organs":
        raise InvalidCheckpointError(
            f"{checkpoint} divides its experts among the organs and one gate spans them all, so one organ's cannot be "
            "trained alone: split the checkpoint with --organs, which gives each organ a copy"
        )
    registry = Registry(registry_root(checkpoint))
    bundle = registry.open(entry.bundle_digest if version is None else registry.find(organ, version).digest)
    if bundle.manifest.backbone_digest != index.backbone_digest:
        raise InvalidCheckpointError(f"version {version} of {organ} belongs to another backbone")
    return bundle


@torch.no_grad()
def _take_experts(model: EchoVLMForConditionalGeneration, bundle: Bundle) -> None:
    for number, layer in enumerate(model.model.language_model.layers):
        assert isinstance(layer, EchoVLMDecoderLayer)
        weights, gate_ED = bundle.load_layer(number), bundle.gate_ED(number)
        mine = weights_of(layer.moe.experts)
        if mine.gate_EFD.shape != weights.gate_EFD.shape:
            raise InvalidCheckpointError(
                f"{bundle.manifest.organ}@{bundle.manifest.version} has experts of another number or size than the "
                "checkpoint: start from the version that it was split with"
            )
        layer.moe.experts.gate_up_proj.copy_(torch.cat([weights.gate_EFD, weights.up_EFD], dim=1))
        layer.moe.experts.down_proj.copy_(weights.down_EDF)
        layer.moe.gate.weight.copy_(gate_ED)


def save_model(
    model: EchoVLMForConditionalGeneration, companions: Path, destination: Path, *, dtype: torch.dtype
) -> None:
    """Writes a model in the released layout, with tokenizer and processor; it appears when it is complete.

    Raises:
        InvalidCheckpointError: the destination exists.
        OSError: the disk is full.
    """
    with new_folder(destination) as partial:
        copy_companions(companions, partial)
        # Tied weights stay one tensor, or the file would hold them twice.
        cast: dict[int, torch.Tensor] = {}
        saved = {
            name: cast.setdefault(value.data_ptr(), value.detach().to(dtype))
            for name, value in model.state_dict().items()
        }
        model.config.dtype = dtype
        model.save_pretrained(partial, state_dict=saved)
