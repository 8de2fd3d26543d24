"""Converts weights to the backbone's dtype, or refuses them.

A kernel computes in the dtype of the hidden states. A bundle may have been packed in another one.
"""

import torch

from experts.bundles.finite import is_finite
from experts.bundles.manifest import Manifest, OtherDtype
from experts.errors import InvalidBundleError
from experts.kernels.base import ExpertWeights


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype in manifests and configurations, for example "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def check_dtype(manifest: Manifest, dtype: torch.dtype, other_dtype: OtherDtype) -> None:
    """Checks that a bundle may be computed in a dtype.

    Args:
        manifest: the bundle's manifest.
        dtype: the dtype of the hidden states.
        other_dtype: "refuse" allows only this dtype.

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
    """Converts a tensor of finite weights; returns the tensor itself if nothing changes.

    Args:
        tensor: any shape.
        dtype: a floating dtype.
        part: the name of the weights in errors.
        device: the device of the result; None keeps the tensor's.

    Raises:
        InvalidBundleError: a weight overflows the dtype.
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
