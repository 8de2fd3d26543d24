"""Prepares a folder for `from_pretrained`: a released folder unchanged, or a merged split folder. Checks names and
shapes.

`model_type` is `qwen2_vl` on disk, so plain transformers loads an EchoVLM without its experts and without a warning.
Here every name and shape in the files is compared with the configuration before a weight is read.
"""

# transformers leaves most of its methods untyped.
# mypy: disable-error-code="no-untyped-call"

from collections.abc import Callable, Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from echovlm_ray.checkpoint.layout import (
    CheckpointIndex,
    InvalidCheckpointError,
    backbone_directory,
    is_split_folder,
    read_index,
    registry_root,
)
from echovlm_ray.checkpoint.reader import StoredTensor, read_tensor_folder
from echovlm_ray.checkpoint.schema import expert_name, gate_name, is_routed
from echovlm_ray.model.configuration import EchoVLMConfig, take_text_fields
from experts.bundles.bundle import Bundle
from experts.registry.registry import Registry

# Where the names of the vision tower's tensors begin, on disk.
VISION = "visual."
Build = Callable[[EchoVLMConfig], PreTrainedModel]
_TORCH_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_HEAD = "lm_head.weight"
_EMBEDDINGS = "model.embed_tokens.weight"
# The most names in an error's text.
_NAMES_SHOWN = 8


class CheckpointMismatchError(InvalidCheckpointError):
    """A checkpoint's tensors do not match its configuration.

    Attributes:
        missing: missing names.
        unexpected: unexpected names.
        mismatched: names with another shape, and both shapes.
    """

    def __init__(self, missing: Iterable[str], unexpected: Iterable[str], mismatched: Iterable[str], hint: str) -> None:
        """Joins the names, as many as fit, to one text."""
        self.missing = tuple(sorted(missing))
        self.unexpected = tuple(sorted(unexpected))
        self.mismatched = tuple(sorted(mismatched))
        groups = {"missing": self.missing, "unexpected": self.unexpected, "of another shape": self.mismatched}
        parts = [f"{len(names)} {what}: {_shown(names)}" for what, names in groups.items() if names]
        super().__init__(f"the checkpoint does not fit its config.json; {'; '.join(parts)}{hint and '. ' + hint}")


def prepare_pretrained(
    path: str | PathLike[str] | None, organ: str | None, kwargs: Mapping[str, Any], build: Build
) -> tuple[str | PathLike[str] | None, dict[str, Any]]:
    """Returns the path and arguments for transformers' `from_pretrained`.

    A folder in the released layout is checked and returned unchanged. A split folder is merged: the backbone, and the
    experts and gates of one organ, or of all groups of a partition, in set order.

    Args:
        path: the argument of `from_pretrained`.
        organ: the organ whose experts are loaded from a split folder.
        kwargs: the arguments of `from_pretrained`.
        build: the model's class.

    Raises:
        CheckpointMismatchError: a tensor is missing, unexpected or of another shape.
        InvalidCheckpointError: an organ is missing, unknown, or not applicable to this checkpoint.
    """
    prepared = dict(kwargs)
    folder = None if path is None else Path(path, prepared.get("subfolder") or "")
    if folder is not None and is_split_folder(folder):
        prepared.pop("subfolder", None)
        config, prepared["state_dict"] = _assemble(folder, organ, take_text_fields(prepared), build)
        prepared.setdefault("config", config)
        prepared.setdefault("generation_config", _generation_config(backbone_directory(folder)))
        return None, prepared
    if organ is not None:
        raise InvalidCheckpointError(
            f"organ={organ!r} was given, but {path} is not a split checkpoint (it has no echovlm.json): its experts "
            "carry no organ. Load it without organ, or split it first: `echoray checkpoint split SRC DST`"
        )
    if folder is not None and folder.is_dir() and not {"variant", "key_mapping", "gguf_file"} & prepared.keys():
        given = prepared.get("config")
        if isinstance(given, PreTrainedConfig) and not isinstance(given, EchoVLMConfig):
            raise InvalidCheckpointError(
                f"config is a {type(given).__name__}, which knows no experts: give EchoVLMConfig"
            )
        config = given if isinstance(given, EchoVLMConfig) else EchoVLMConfig.from_pretrained(given or folder)
        _check_whole({name: tensor.shape for name, tensor in read_headers(folder).items()}, config, build)
    return path, prepared


def require_complete(loading_info: Mapping[str, Any]) -> None:
    """Checks that transformers loaded all parameters.

    Raises:
        CheckpointMismatchError: a tensor is missing, unexpected or of another shape.
    """
    mismatched = [str(entry[0] if isinstance(entry, tuple) else entry) for entry in loading_info["mismatched_keys"]]
    missing, unexpected = loading_info["missing_keys"], loading_info["unexpected_keys"]
    if missing or unexpected or mismatched or loading_info["error_msgs"]:
        raise CheckpointMismatchError(missing, unexpected, mismatched, " ".join(loading_info["error_msgs"]))


def read_headers(folder: Path) -> dict[str, StoredTensor]:
    """The tensors of a folder in the released layout, by name.

    Raises:
        InvalidCheckpointError: the files are damaged.
    """
    found = read_tensor_folder(folder)
    if found.problems:
        raise InvalidCheckpointError(f"{folder}: {'; '.join(found.problems)}")
    return found.tensors


def read_tensor(tensor: StoredTensor, dtype: torch.dtype | None, device: torch.device | str) -> torch.Tensor:
    """Reads one tensor; `dtype` None keeps the stored one.

    Raises:
        InvalidCheckpointError: its dtype is not one of weights.
    """
    if tensor.dtype not in _TORCH_DTYPES:
        raise InvalidCheckpointError(f"{tensor.name} is {tensor.dtype}; weights must be {', '.join(_TORCH_DTYPES)}")
    content = torch.frombuffer(tensor.read(), dtype=_TORCH_DTYPES[tensor.dtype])
    return content.reshape(tensor.shape).to(device=device, dtype=dtype)


def released_name(name: str) -> str:
    """The name on disk of a parameter of the model."""
    return name.replace("model.visual.", VISION, 1).replace("model.language_model.", "model.", 1)


def check_tensors(
    stored: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], config: EchoVLMConfig
) -> None:
    """Compares the stored shapes by name with the expected ones.

    Raises:
        CheckpointMismatchError: a tensor is missing, unexpected or of another shape.
    """
    unexpected = stored.keys() - expected.keys()
    if config.tie_word_embeddings and _HEAD in unexpected and stored[_HEAD] == stored.get(_EMBEDDINGS):
        # Some checkpoints store the tied matrix twice.
        unexpected.discard(_HEAD)
    missing = expected.keys() - stored.keys()
    mismatched = [
        f"{name} is {list(stored[name])}, should be {list(shape)}"
        for name, shape in expected.items()
        if name in stored and stored[name] != shape
    ]
    if missing or unexpected or mismatched:
        raise CheckpointMismatchError(missing, unexpected, mismatched, _hint(missing, unexpected))


def _assemble(
    folder: Path, organ: str | None, text_fields: dict[str, Any], build: Build
) -> tuple[EchoVLMConfig, dict[str, torch.Tensor]]:
    index = read_index(folder)
    registry = Registry(registry_root(folder))
    bundles = [registry.open(digest) for digest in _bundle_digests(index, organ)]
    for bundle in bundles:
        if bundle.manifest.backbone_digest != index.backbone_digest:
            raise InvalidCheckpointError(
                f"the experts of {bundle.manifest.organ!r} were made for another backbone than the one in {folder}"
            )
    backbone = backbone_directory(folder)
    num_experts = sum(bundle.manifest.num_experts for bundle in bundles)
    config = EchoVLMConfig.from_pretrained(backbone, **{**text_fields, "num_experts": num_experts})
    stored = read_headers(backbone)
    if routed := [name for name in stored if is_routed(name)]:
        raise CheckpointMismatchError((), routed, (), "A split folder keeps these in its bundles, not in backbone/")
    tensors = {name: read_tensor(tensor, None, "cpu") for name, tensor in stored.items()}
    for layer in range(config.text_config.num_hidden_layers):
        tensors |= _routed_tensors(layer, bundles)
    _check_whole({name: tuple(tensor.shape) for name, tensor in tensors.items()}, config, build)
    return config, tensors


def _bundle_digests(index: CheckpointIndex, organ: str | None) -> list[str]:
    organs = ", ".join(entry.organ for entry in index.organs)
    if index.routing == "organs":
        if organ is None:
            raise InvalidCheckpointError(
                f"every organ of this checkpoint has its own experts: say whose, organ= one of {organs}"
            )
        return [index.entry(organ).bundle_digest]
    if organ is not None:
        raise InvalidCheckpointError(
            f"organ={organ!r} makes no sense here: this checkpoint divides its experts among {organs}, and one gate "
            "spans them all. Load it without organ"
        )
    return [entry.bundle_digest for entry in index.organs]


def _routed_tensors(layer: int, bundles: Iterable[Bundle]) -> dict[str, torch.Tensor]:
    """One layer's gate and experts under their released names, in the order of the groups."""
    gates, tensors, first = [], {}, 0
    for bundle in bundles:
        gates.append(bundle.gate_ED(layer))
        weights = bundle.load_layer(layer)
        for expert in range(weights.num_experts):
            tensors[expert_name(layer, first + expert, "gate_proj")] = weights.gate_EFD[expert]
            tensors[expert_name(layer, first + expert, "up_proj")] = weights.up_EFD[expert]
            tensors[expert_name(layer, first + expert, "down_proj")] = weights.down_EDF[expert]
        first += weights.num_experts
    # A copy, so that the model does not depend on a mapped file.
    tensors[gate_name(layer)] = torch.cat(gates)
    return tensors


def _generation_config(folder: Path) -> GenerationConfig | None:
    if (folder / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(folder)
    return None


def _released_shapes(config: EchoVLMConfig, build: Build) -> dict[str, tuple[int, ...]]:
    """Name → shape of every tensor of the whole model, in the released layout."""
    with torch.device("meta"), no_init_weights():
        model = build(config)
    model.tie_weights()
    shapes = {}
    for name, parameter in model.named_parameters():
        released, shape = released_name(name), tuple(parameter.shape)
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            shapes[released] = shape
            continue
        layer = int(released.split(".")[2])
        for expert in range(shape[0]):
            if name.endswith("down_proj"):
                shapes[expert_name(layer, expert, "down_proj")] = shape[1:]
            else:
                half = (shape[1] // 2, shape[2])
                shapes[expert_name(layer, expert, "gate_proj")] = half
                shapes[expert_name(layer, expert, "up_proj")] = half
    return shapes


def _check_whole(stored: Mapping[str, tuple[int, ...]], config: EchoVLMConfig, build: Build) -> None:
    check_tensors(stored, _released_shapes(config, build), config)


def _hint(missing: Iterable[str], unexpected: Iterable[str]) -> str:
    if any(is_routed(name) for name in unexpected):
        return (
            "Routed experts that the configuration does not ask for: is num_experts right? A backbone has none: "
            "`echoray checkpoint split SRC DST` makes one"
        )
    if any(is_routed(name) for name in missing):
        if any(name.endswith("coefficient.weight") for name in missing):
            return "It has no experts at all: a plain Qwen2-VL, not an EchoVLM"
        return "Routed experts are missing: for the backbone of a split checkpoint, load the folder that holds it"
    return ""


def _shown(names: tuple[str, ...]) -> str:
    rest = len(names) - _NAMES_SHOWN
    return ", ".join(names[:_NAMES_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
