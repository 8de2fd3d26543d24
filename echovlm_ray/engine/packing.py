"""Packs the linear layers of a backbone on the CPU, where that is faster: see `experts.kernels.packed_linear`."""

import logging

import torch
from torch import nn

from experts.kernels.packed_linear import PackedLinear, packing_available

logger = logging.getLogger(__name__)

# Below this many outputs (a gate of one, two coefficients) a stock product is as fast, and nothing is gained.
MIN_OUT_FEATURES = 16


class PackedLinearLayer(nn.Module):
    """Takes the place of an `nn.Linear` in a model that only infers."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.packed = PackedLinear(linear.weight, linear.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x · weightᵀ + bias`: … × inputs to … × outputs."""
        return self.packed(x)


def pack_linears(model: nn.Module) -> int:
    """Replaces a model's linear layers by packed ones; afterwards it can only infer, and not be saved.

    A model on another device, or of a dtype that cannot be packed here, is left as it is. Each layer's plain weights
    are let go before the next is packed; those that another module still holds (a tied embedding) stay as well.

    Args:
        model: all of its linear layers with at least `MIN_OUT_FEATURES` outputs are packed.

    Returns:
        how many layers were packed.
    """
    packed = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and _pays(child):
                setattr(parent, name, PackedLinearLayer(child))
                packed += 1
    logger.info("%d linear layers are packed for the CPU", packed)
    return packed


def _pays(linear: nn.Linear) -> bool:
    weight = linear.weight
    return weight.device.type == "cpu" and linear.out_features >= MIN_OUT_FEATURES and packing_available(weight.dtype)
