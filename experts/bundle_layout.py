"""The names, shapes and order of a bundle's tensors."""

from collections.abc import Iterator

import torch

from experts.manifest import PROJECTIONS, BundleDescription, Projection

EXPERTS_FILE = "experts.safetensors"
GATE_FILE = "gate.safetensors"
PROTOTYPE_FILE = "prototype.safetensors"
PROTOTYPE_TENSOR = "prototype"

TensorSpec = tuple[torch.dtype, tuple[int, ...]]


def expert_tensor(layer: int, expert: int, projection: Projection) -> str:
    """The name of one expert's matrix."""
    return f"layers.{layer}.experts.{expert}.{projection}_proj.weight"


def gate_tensor(layer: int) -> str:
    """The name of one layer's gate rows."""
    return f"layers.{layer}.gate.weight"


def expert_tensors_of_layer(description: BundleDescription, layer: int) -> dict[Projection, list[str]]:
    """The names of a layer's matrices, each projection's in the order of the experts."""
    experts = range(description.num_experts)
    return {projection: [expert_tensor(layer, expert, projection) for expert in experts] for projection in PROJECTIONS}


def expert_stacks(description: BundleDescription) -> Iterator[dict[str, TensorSpec]]:
    """What lies together in a file, in order: one layer's matrices of one projection.

    So every stack `[experts, …]` that a kernel wants is one piece of a file and needs no copy.
    """
    for layer in range(description.num_layers):
        for projection, names in expert_tensors_of_layer(description, layer).items():
            yield {name: (description.torch_dtype, description.expert_shape(projection)) for name in names}


def gate_tensors(description: BundleDescription) -> dict[str, TensorSpec]:
    """The gate file's tensors."""
    shape = (description.num_experts, description.hidden_size)
    return {gate_tensor(layer): (description.gate_torch_dtype, shape) for layer in range(description.num_layers)}


def prototype_tensors(description: BundleDescription) -> dict[str, TensorSpec]:
    """The prototype file's tensors; none if the bundle has no prototype."""
    return {PROTOTYPE_TENSOR: (torch.float32, (description.hidden_size,))} if description.has_prototype else {}


def expected_tensors(description: BundleDescription) -> dict[str, TensorSpec]:
    """Everything that a bundle's files hold together."""
    tensors = {name: spec for stack in expert_stacks(description) for name, spec in stack.items()}
    return {**tensors, **gate_tensors(description), **prototype_tensors(description)}
