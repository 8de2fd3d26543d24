"""Loads the parts of a checkpoint that run on their own: the backbone, and the vision tower."""

# transformers leaves most of its methods untyped.
# mypy: disable-error-code="no-untyped-call"

from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.initialization import no_init_weights
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLRotaryEmbedding, Qwen2VLVisionRotaryEmbedding

from echovlm_ray.checkpoint.layout import backbone_directory, is_split_folder
from echovlm_ray.checkpoint.reader import StoredTensor
from echovlm_ray.model.configuration import EchoVLMConfig
from echovlm_ray.model.modeling import EchoVLMForConditionalGeneration
from echovlm_ray.model.pretrained import VISION, check_tensors, read_headers, read_tensor, released_name
from echovlm_ray.model.vision_tower import EchoVLMVisionTower


def load_backbone(
    directory: str | PathLike[str], *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> EchoVLMForConditionalGeneration:
    """Loads the language model for the engine: without vision tower, routed experts and gates.

    Args:
        directory: a split folder, or its `backbone/`.
        dtype: the dtype of the weights; None for the stored one.
        device: the device of the weights. Each tensor is read once, directly to its destination.

    Returns:
        the model in evaluation mode, without gradients; forward needs `routed_experts`.

    Raises:
        CheckpointMismatchError: a tensor is missing, unexpected or of another shape.
        InvalidCheckpointError: the files are damaged.
    """
    folder = _backbone(directory)
    config = EchoVLMConfig.from_pretrained(folder)
    with torch.device("meta"), no_init_weights():
        model = EchoVLMForConditionalGeneration(config, vision=False, routed_experts=False)
    model.tie_weights()
    names = {released_name(name): name for name, _ in model.named_parameters()}
    stored = {name: tensor for name, tensor in read_headers(folder).items() if not name.startswith(VISION)}
    _fill(model, names, stored, config, dtype, device)
    return model


def load_vision_tower(
    directory: str | PathLike[str], *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> EchoVLMVisionTower:
    """Loads the vision tower.

    Args:
        directory: a split folder, its `backbone/`, or a folder in the released layout.
        dtype: the dtype of the weights; None for the stored one.
        device: the device of the weights.

    Returns:
        the module in evaluation mode, without gradients. `tower(patches, grid_thw=grids).pooler_output` are the
        embeddings of all merged patches.

    Raises:
        CheckpointMismatchError: a `visual.*` tensor is missing, unexpected or of another shape.
        InvalidCheckpointError: the files are damaged.
    """
    folder = _backbone(directory)
    config = EchoVLMConfig.from_pretrained(folder)
    with torch.device("meta"), no_init_weights():
        tower = EchoVLMVisionTower(config.vision_config)
    names = {VISION + name: name for name, _ in tower.named_parameters()}
    stored = {name: tensor for name, tensor in read_headers(folder).items() if name.startswith(VISION)}
    _fill(tower, names, stored, config, dtype, device)
    return tower


def _backbone(directory: str | PathLike[str]) -> Path:
    folder = Path(directory)
    return backbone_directory(folder) if is_split_folder(folder) else folder


def _fill(
    module: EchoVLMForConditionalGeneration | EchoVLMVisionTower,
    names: Mapping[str, str],
    stored: Mapping[str, StoredTensor],
    config: EchoVLMConfig,
    dtype: torch.dtype | None,
    device: torch.device | str,
) -> None:
    """Replaces a module's parameters, which are on "meta", by stored tensors; `names` maps released names to its."""
    expected = {released: tuple(module.get_parameter(name).shape) for released, name in names.items()}
    check_tensors({name: tensor.shape for name, tensor in stored.items()}, expected, config)
    for released, name in names.items():
        _set_parameter(module, name, read_tensor(stored[released], dtype, device))
    # These buffers are computed, not stored, and must be computed again after "meta".
    for name, rotary in list(module.named_modules()):
        if isinstance(rotary, Qwen2VLRotaryEmbedding | Qwen2VLVisionRotaryEmbedding):
            rebuild: Callable[[Any], nn.Module] = type(rotary)
            module.set_submodule(name, rebuild(rotary.config).to(device))
    module.tie_weights()
    module.config.dtype = module.dtype
    left = [name for name, tensor in (*module.named_parameters(), *module.named_buffers()) if tensor.is_meta]
    assert not left, f"not loaded: {left}"
    module.eval()


def _set_parameter(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(parent), leaf, nn.Parameter(tensor, requires_grad=False))
