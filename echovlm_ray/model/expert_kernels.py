"""Our expert kernels as experts functions of transformers: `experts_implementation="cpu_packed"` and so on.

An expert group prepares its weights once. A module's weights may change between two calls, so prepared weights are
cached only while the tensors and their contents are the same.
"""

import logging
import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from experts.kernels.base import ExpertWeights, PreparedExperts
from experts.kernels.registry import get_kernel, kernel_names

logger = logging.getLogger(__name__)

# (module with stacked gate_up_proj and down_proj, tokens × hidden, index tokens × top_k, weight tokens × top_k).
ExpertsFunction = Callable[[nn.Module, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class _Kept:
    identity: tuple[object, ...]
    prepared: PreparedExperts


_KEPT: "weakref.WeakKeyDictionary[nn.Module, _Kept]" = weakref.WeakKeyDictionary()


def register_expert_kernels() -> None:
    """Registers every kernel in transformers under its name, unless the name exists.

    Repacked weights exist in addition to the module's, so a plain model takes up to twice the memory; an expert group
    does not.
    """
    for name in kernel_names():
        if name in ALL_EXPERTS_FUNCTIONS:
            logger.warning(
                "transformers has experts of the name %r already, so the kernel of that name is hidden", name
            )
        else:
            ALL_EXPERTS_FUNCTIONS.register(name, experts_function(name))


def experts_function(name: str) -> ExpertsFunction:
    """The experts function of one kernel, which is looked up on first use.

    It raises:
        ValueError: the kernel is unavailable, or gradients are required and it has none.
    """

    def forward(
        module: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        training = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in module.parameters())
        if torch.is_autocast_enabled(hidden_states.device.type):
            return _under_autocast(name, module, hidden_states, top_k_index, top_k_weights)
        prepared = _load(module, name) if training else _prepared(module, name)
        output_TD = prepared.forward(hidden_states, top_k_index, top_k_weights)
        if training and output_TD.shape[0] and not output_TD.requires_grad:
            raise ValueError(_no_gradients(name))
        return output_TD

    return forward


def _under_autocast(
    name: str, module: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Converts to autocast's dtype, as for linear layers. Grouped products are not on autocast's list."""
    device = hidden_states.device.type
    dtype = torch.get_autocast_dtype(device)
    weights = weights_of(module)
    with torch.autocast(device, enabled=False):
        cast = ExpertWeights(*(matrix.to(dtype) for matrix in (weights.gate_EFD, weights.up_EFD, weights.down_EDF)))
        prepared = get_kernel(name).load(cast)
        output_TD = prepared.forward(hidden_states.to(dtype), top_k_index, top_k_weights.to(dtype))
    if weights.gate_EFD.requires_grad and torch.is_grad_enabled() and len(output_TD) and not output_TD.requires_grad:
        raise ValueError(_no_gradients(name))
    return output_TD.to(hidden_states.dtype)


def weights_of(module: nn.Module) -> ExpertWeights:
    """Views of a module's stacked weights."""
    gate_up, down_EDF = module.gate_up_proj, module.down_proj
    assert isinstance(gate_up, torch.Tensor)
    assert isinstance(down_EDF, torch.Tensor)
    gate_EFD, up_EFD = gate_up.chunk(2, dim=1)
    return ExpertWeights(gate_EFD, up_EFD, down_EDF)


def _load(module: nn.Module, name: str) -> PreparedExperts:
    return get_kernel(name).load(weights_of(module))


def _prepared(module: nn.Module, name: str) -> PreparedExperts:
    identity = (name, *(_identity(parameter) for parameter in module.parameters()))
    kept = _KEPT.get(module)
    if kept is None or kept.identity != identity:
        kept = _KEPT[module] = _Kept(identity, _load(module, name))
    return kept.prepared


def _identity(parameter: torch.Tensor) -> tuple[object, ...]:
    # The version counts in-place writes, such as an optimiser's. Inference tensors have none.
    version = None if parameter.is_inference() else parameter._version
    return (parameter.data_ptr(), version, parameter.dtype, parameter.device)


def _no_gradients(name: str) -> str:
    return (
        f'the expert kernel {name!r} has no gradients: train with experts_implementation "eager" or '
        '"torch_grouped", or call the model under torch.no_grad()'
    )
