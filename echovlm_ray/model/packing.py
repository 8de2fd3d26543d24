"""Packs the linear layers of a model on the CPU, where that is faster: see `experts.kernels.packed_linear`."""

import logging

import torch
from torch import nn

from experts.kernels.cpu.library import PackedMatrix
from experts.kernels.packed_linear import WARM_UP_ROWS, PackedLinear, packing_available

logger = logging.getLogger(__name__)

# Below this many outputs (a gate with one, two coefficients) an unpacked product is as fast.
MIN_OUT_FEATURES = 16


class PackedLinearLayer(nn.Module):
    """Replaces an `nn.Linear`, for inference only."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.packed = PackedLinear(linear.weight, linear.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x · weightᵀ + bias`: … × inputs to … × outputs."""
        return self.packed(x)


def pack_linears(model: nn.Module) -> int:
    """Replaces a model's linear layers by packed ones. The model is then for inference only and cannot be saved.

    A model on another device, or with a dtype that cannot be packed here, is not changed. Each layer's plain weights
    are freed before the next layer is packed; shared weights (a tied embedding) stay.

    Args:
        model: all of its linear layers with at least `MIN_OUT_FEATURES` outputs are packed.

    Returns:
        the number of packed layers.
    """
    packed = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and _is_faster_packed(child):
                setattr(parent, name, PackedLinearLayer(child))
                packed += 1
    logger.info("%d linear layers are packed for the CPU", packed)
    return packed


def warm_up(model: nn.Module, max_head_rows: int) -> int:
    """Compiles the code for every number of rows that a step may have, before the first request.

    Otherwise the first step of each size compiles while serving, a millisecond or more for each shape, and the process
    grows until every size has occurred. Takes as long as some 7,000 tokens in one layer.

    Args:
        model: a model after `pack_linears`.
        max_head_rows: the most rows of the output layer, which has one for each sampled token. Requests for logits have
            more, which are compiled then.

    Returns:
        the number of computed products.
    """
    shapes: dict[tuple[int, int, torch.dtype, bool], tuple[PackedLinear, int]] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, PackedLinearLayer):
            packed = layer.packed
            key = (packed.in_features, packed.out_features, packed.dtype, packed.has_bias)
            shapes.setdefault(key, (packed, max_head_rows if name == "lm_head" else WARM_UP_ROWS))
    return sum(packed.warm_up(max_rows) for packed, max_rows in shapes.values())


def packed_matrices(*linears: nn.Module) -> tuple[PackedMatrix, ...] | None:
    """Packed layers in the C library's format; None if it does not support all of them."""
    described = [linear.packed.matrix for linear in linears if isinstance(linear, PackedLinearLayer)]
    found = tuple(each for each in described if each is not None)
    return found if len(found) == len(linears) else None


def _is_faster_packed(linear: nn.Linear) -> bool:
    weight = linear.weight
    return weight.device.type == "cpu" and linear.out_features >= MIN_OUT_FEATURES and packing_available(weight.dtype)
