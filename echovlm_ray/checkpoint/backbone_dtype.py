"""The dtype in which a split checkpoint's backbone computes, read from its files' headers."""

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from echovlm_ray.checkpoint.layout import InvalidCheckpointError, backbone_directory
from echovlm_ray.checkpoint.reader import read_tensor_folder

if TYPE_CHECKING:
    from experts.bundles.manifest import DTypeName

_EMBEDDINGS = "model.embed_tokens.weight"
_NAMES: "dict[str, DTypeName]" = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def compute_dtype(directory: Path, configured: Literal["auto", "float32", "bfloat16"] = "auto") -> "DTypeName":
    """The dtype of the hidden states for experts.

    Args:
        directory: a split folder.
        configured: `model.dtype`; "auto" is the dtype of the stored embeddings.

    Raises:
        InvalidCheckpointError: the embeddings are missing, damaged, or of another dtype.
    """
    if configured != "auto":
        return configured
    folder = backbone_directory(directory)
    found = read_tensor_folder(folder)
    embeddings = found.tensors.get(_EMBEDDINGS)
    if embeddings is None:
        problems = f": {found.problems[0]}" if found.problems else ""
        raise InvalidCheckpointError(f"{folder} has no {_EMBEDDINGS}, which tells the backbone's dtype{problems}")
    if embeddings.dtype not in _NAMES:
        raise InvalidCheckpointError(
            f"{folder}: {_EMBEDDINGS} is {embeddings.dtype}; weights must be {', '.join(_NAMES)}"
        )
    return _NAMES[embeddings.dtype]
