"""Shared by the kernels for a GPU: their libraries and checks."""

import importlib
import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F

from experts.kernels import megablocks_ops
from experts.kernels.base import ExpertWeights


def import_megablocks() -> tuple[Any, Any]:
    """The modules `megablocks.ops` and `stk`, of which only Python and Triton code is used.

    Raises:
        ImportError: megablocks, stanford-stk or triton is not installed.
    """
    megablocks_ops.install()
    return importlib.import_module("megablocks.ops"), importlib.import_module("stk")


def interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter, on the CPU: slow, and meant for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def check_weights(kernel_name: str, weights: ExpertWeights, dtypes: tuple[torch.dtype, ...]) -> None:
    """Checks that a kernel supports the weights.

    Raises:
        ValueError: the weights are not on a GPU, or of another dtype. The text names the fix.
    """
    if weights.device.type != "cuda" and not interpreted():
        raise ValueError(
            f"the expert kernel {kernel_name} computes on a GPU and the weights are on {weights.device}; set the "
            "device to cuda, or choose the kernel cpu_packed"
        )
    if weights.dtype not in dtypes:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(
            f"the expert kernel {kernel_name} takes {known}, not {weights.dtype}; convert the weights, or choose the "
            "kernel torch_grouped"
        )


def refuse_gradients(kernel_name: str, *tensors: torch.Tensor) -> None:
    """Checks that no gradients are needed.

    Raises:
        ValueError: gradients are enabled and a tensor requires one.
    """
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise ValueError(f"the expert kernel {kernel_name} has no gradients; train with torch_grouped")


def on_device(tensor: torch.Tensor) -> AbstractContextManager[Any]:
    """Makes a tensor's device the current one, on which Triton launches, within the context."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def pad_to(matrix: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """The matrices with zeros added at the end of the last two dimensions; contiguous; a copy only where needed."""
    extra_rows, extra_columns = rows - matrix.shape[-2], columns - matrix.shape[-1]
    if extra_rows or extra_columns:
        return F.pad(matrix, (0, extra_columns, 0, extra_rows))
    return matrix.contiguous()
