"""Converts weights of another floating dtype than the backbone's, or refuses them.

A kernel computes in one dtype, that of the hidden states it is sent. A bundle may have been packed in another one.
"""

import torch

from experts.bundles.finite import is_finite
from experts.bundles.manifest import Manifest, OtherDtype
from experts.errors import InvalidBundleError
from experts.kernels.base import ExpertWeights


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype as manifests and configurations spell it, for example "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def check_dtype(manifest: Manifest, dtype: torch.dtype, other_dtype: OtherDtype) -> None:
    """Checks that a bundle's experts and gate rows may be computed in a dtype.

    Args:
        manifest: the bundle's.
        dtype: of the hidden states.
        other_dtype: "refuse" allows no other dtype than this one.

    Raises:
        InvalidBundleError: it must not be converted; the text names both dtypes.
    """
    if other_dtype == "convert":
        return
    for part, found in (("experts", manifest.torch_dtype), ("gate rows", manifest.gate_torch_dtype)):
        if found != dtype:
            raise InvalidBundleError(
                f"the {part} of bundle {manifest.name} {manifest.version} are {dtype_name(found)}, the backbone "
                f'computes in {dtype_name(dtype)}, and experts.other_dtype is "refuse": pack the bundle with '
                f'--dtype {dtype_name(dtype)}, or set experts.other_dtype to "convert"'
            )


def convert(
    tensor: torch.Tensor, dtype: torch.dtype, part: str, device: torch.device | str | None = None
) -> torch.Tensor:
    """A tensor of finite weights in another dtype; itself where nothing changes.

    Args:
        tensor: any shape.
        dtype: a floating dtype.
        part: what the weights are, for the error.
        device: where the result goes; none leaves it where it is.

    Raises:
        InvalidBundleError: a weight is larger than the dtype can hold, so that it became infinite.
    """
    converted = tensor.to(device=device, dtype=dtype)
    if torch.finfo(dtype).max < torch.finfo(tensor.dtype).max and not is_finite(converted):
        raise InvalidBundleError(
            f"{part}: a weight in {dtype_name(tensor.dtype)} is too large for {dtype_name(dtype)}, in which the "
            "backbone computes"
        )
    return converted


def convert_experts(
    weights: ExpertWeights, dtype: torch.dtype, device: torch.device | str, layer: int
) -> ExpertWeights:
    """One layer's experts in the dtype and on the device where they are computed; see `convert`."""
    return ExpertWeights(
        *(
            convert(matrices, dtype, f"layer {layer}, {part} projections", device)
            for part, matrices in (("gate", weights.gate_EFD), ("up", weights.up_EFD), ("down", weights.down_EDF))
        )
    )
