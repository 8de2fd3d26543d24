"""The organs and the expert set that a configuration and a split checkpoint serve."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from echovlm_ray.checkpoint.layout import CheckpointIndex, backbone_directory, read_index
from echovlm_ray.config import ModelSection
from router.gating.expert_set import ExpertSet

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class ServedCheckpoint:
    """A checkpoint as it is served.

    Attributes:
        directory: the split folder.
        index: its contents.
        expert_set: the set with which serving starts.
        other_versions: digest → version of the set's bundles that did not come with the checkpoint.
        identity: of the deployment that serves it; "" where that is not known.
    """

    directory: Path
    index: CheckpointIndex
    expert_set: ExpertSet
    other_versions: Mapping[str, str] = field(default_factory=dict)
    identity: str = ""

    @property
    def organs(self) -> tuple[str, ...]:
        """The organs in the set's order."""
        return self.expert_set.organs

    @property
    def missing_text_files(self) -> tuple[str, ...]:
        """What the gateway needs to turn text and images into tokens, and the backbone does not have."""
        backbone = backbone_directory(self.directory)
        missing = [
            name for name in ("tokenizer_config.json", "preprocessor_config.json") if not (backbone / name).exists()
        ]
        return tuple(missing)

    @property
    def versions(self) -> dict[str, str]:
        """Organ → version of its bundle in the set."""
        own = {entry.bundle_digest: entry.version for entry in self.index.organs}
        known = {**own, **self.other_versions}
        return {member.organ: known.get(member.bundle_digest, "") for member in self.expert_set.members}


def served_checkpoint(model: ModelSection) -> ServedCheckpoint:
    """Reads the checkpoint's index and applies the configured routing.

    Raises:
        ValueError: there is no split checkpoint there, or the configuration does not fit it.
    """
    index = read_index(model.checkpoint)
    expert_set = index.expert_set()
    if model.routing == "flat" and index.routing == "organs":
        raise ValueError(
            f'model.routing is "flat", but in {model.checkpoint} every organ has a copy of the same experts, so one '
            'gate over all of them would count each expert once per organ: set model.routing to "auto" or "organs"'
        )
    if model.routing != "auto":
        expert_set = expert_set.model_copy(update={"routing": model.routing})
        expert_set = ExpertSet.model_validate(expert_set.model_dump())
    if expert_set.routing == "organs" and model.default_organ not in expert_set.organs:
        raise ValueError(
            f"model.default_organ is {model.default_organ!r}, which {model.checkpoint} does not have: "
            f"choose one of {', '.join(expert_set.organs)}"
        )
    return ServedCheckpoint(model.checkpoint, index, expert_set)


@dataclass(frozen=True, slots=True)
class ExpertExchange:
    """What a router sends to experts, known without loading the backbone.

    Attributes:
        dtype: of the hidden states, and so of the experts' weights.
        top_k: experts per token.
    """

    dtype: "torch.dtype"
    top_k: int


def expert_exchange(model: ModelSection) -> ExpertExchange:
    """Reads it from the backbone's config.json and the headers of its weights.

    Raises:
        InvalidCheckpointError: they are missing or damaged.
    """
    import torch

    from echovlm_ray.checkpoint.backbone_dtype import compute_dtype
    from echovlm_ray.checkpoint.reader import read_config
    from echovlm_ray.checkpoint.schema import ModelShape

    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    shape = ModelShape.from_config(read_config(backbone_directory(model.checkpoint)))
    # As `echovlm_ray.model.configuration` has it where config.json does not say.
    return ExpertExchange(dtypes[compute_dtype(model.checkpoint, model.dtype)], shape.num_experts_per_tok or 2)
