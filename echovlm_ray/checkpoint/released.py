"""A checkpoint in the released layout: its headers and sizes, and their consistency."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from echovlm_ray.checkpoint.layout import InvalidCheckpointError, is_split_folder
from echovlm_ray.checkpoint.reader import (
    CONFIG_NAME,
    WEIGHTS_INDEX_NAME,
    TensorFolder,
    differences,
    read_config,
    read_tensor_folder,
)
from echovlm_ray.checkpoint.schema import ModelShape, is_routed

# The other files of a model: configuration, tokenizer, processor, terms of use. No code.
COMPANION_NAMES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "LICENSE",
    "NOTICE",
)
_SHOWN_PROBLEMS = 3


@dataclass(slots=True)
class ReleasedCheckpoint:
    """A folder in the released layout, with or without its routed experts, and its problems."""

    directory: Path
    config: dict[str, Any]
    # None when config.json does not tell the sizes; then `problems` says why.
    shape: ModelShape | None
    folder: TensorFolder
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def stores_experts(self) -> bool:
        """Whether there is any tensor of a routed expert or token gate."""
        return any(is_routed(name) for name in self.folder.tensors)

    @property
    def stores_moe(self) -> bool:
        """Whether there is any tensor that a stock Qwen2-VL does not have."""
        return any(".moe." in name or ".coefficient." in name for name in self.folder.tensors)

    def known_shape(self) -> ModelShape:
        """The sizes.

        Raises:
            InvalidCheckpointError: config.json does not tell them.
        """
        if self.shape is None:
            raise InvalidCheckpointError(f"{self.directory}: {first_problems(self.problems)}")
        return self.shape


def examine(directory: Path, *, routed: bool | None = None) -> ReleasedCheckpoint:
    """Reads the headers of a folder and collects all problems, without raising.

    Args:
        directory: the folder.
        routed: whether the routed experts and gates must be there; None takes what config.json says.
    """
    folder = read_tensor_folder(directory)
    checkpoint = ReleasedCheckpoint(directory, {}, None, folder)
    try:
        checkpoint.config = read_config(directory)
        checkpoint.shape = ModelShape.from_config(checkpoint.config)
    except InvalidCheckpointError as error:
        checkpoint.problems.append(str(error))
    checkpoint.problems += folder.problems
    shape = checkpoint.shape
    if shape is None or not folder.files:
        return checkpoint
    if checkpoint.stores_moe and not shape.has_experts:
        checkpoint.problems.append(
            "config.json: the weights have a Mixture of Experts, but moe_intermediate_size or "
            "shared_expert_intermediate_size is missing"
        )
        return checkpoint
    expected = shape.backbone_tensors()
    if routed is not False:
        expected |= shape.routed_tensors()
    if shape.tie_word_embeddings:
        checkpoint.notes.append("embeddings are tied: lm_head is model.embed_tokens")
        if "lm_head.weight" in folder.tensors:
            checkpoint.notes.append("lm_head.weight is stored although the embeddings are tied")
            expected["lm_head.weight"] = (shape.vocab_size, shape.hidden_size)
    if shape.vision.hidden_size != shape.hidden_size:
        checkpoint.problems.append(
            f"config.json: vision_config.hidden_size {shape.vision.hidden_size} must be hidden_size {shape.hidden_size}"
        )
    checkpoint.problems += differences(folder.tensors, expected)
    return checkpoint


def open_released(directory: Path) -> ReleasedCheckpoint:
    """Opens a whole EchoVLM in the released layout.

    Raises:
        InvalidCheckpointError: it is something else, or has problems.
    """
    if is_split_folder(directory):
        raise InvalidCheckpointError(f"{directory} is split already")
    if not directory.is_dir():
        raise InvalidCheckpointError(f"{directory} is not a folder; give the folder that holds config.json")
    checkpoint = examine(directory)
    if checkpoint.shape and not checkpoint.shape.has_experts and not checkpoint.problems:
        raise InvalidCheckpointError(f"{directory} is a stock Qwen2-VL: it has no experts to split")
    if checkpoint.problems:
        raise InvalidCheckpointError(f"{directory}: {first_problems(checkpoint.problems)}")
    return checkpoint


def first_problems(problems: Sequence[str]) -> str:
    """One line that names the first problems and says how many more there are."""
    shown = "; ".join(problems[:_SHOWN_PROBLEMS])
    more = len(problems) - _SHOWN_PROBLEMS
    return shown + (f"; and {more} more (`echoray checkpoint inspect` lists them)" if more > 0 else "")


def copy_companions(source: Path, destination: Path) -> list[str]:
    """Copies config.json and the other files of the model, but not weights and unknown files.

    Returns:
        The names of the files that were not copied, sorted.
    """
    left: list[str] = []
    for path in sorted(source.iterdir()):
        if path.is_file() and path.name in (CONFIG_NAME, *COMPANION_NAMES):
            shutil.copyfile(path, destination / path.name)
        elif not path.name.startswith(".") and not path.name.endswith((".safetensors", WEIGHTS_INDEX_NAME)):
            left.append(path.name)
    return left
