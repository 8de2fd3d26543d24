"""Several linear layers of the same input as one: fewer and larger products."""

from collections.abc import Sequence

import torch
from torch import nn


def concatenated(linears: Sequence[nn.Linear]) -> nn.Linear:
    """A layer whose outputs are the concatenated outputs of the given ones. For inference only.

    The weights of the given layers are freed, so that no weight is stored twice.
    """
    weight_OI = torch.cat([linear.weight.detach() for linear in linears])
    joined = nn.Linear(weight_OI.shape[1], weight_OI.shape[0], bias=False, device="meta", dtype=weight_OI.dtype)
    joined.weight = nn.Parameter(weight_OI, requires_grad=False)
    if any(linear.bias is not None for linear in linears):
        biases = [
            weight_OI.new_zeros(linear.out_features) if linear.bias is None else linear.bias.detach()
            for linear in linears
        ]
        joined.bias = nn.Parameter(torch.cat(biases), requires_grad=False)
    for linear in linears:
        linear.weight = nn.Parameter(weight_OI.new_empty(0), requires_grad=False)
    return joined
