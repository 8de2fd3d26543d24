"""The names, shapes and order of a bundle's tensors."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal, TypeAlias

from experts.bundles.manifest import PROJECTIONS, BundleDescription, Projection

if TYPE_CHECKING:
    import torch

TensorSpec: TypeAlias = "tuple[torch.dtype, tuple[int, ...]]"
ProbePart = Literal["hidden_states", "expert_index", "weight", "output"]

EXPERTS_FILE = "experts.safetensors"
GATE_FILE = "gate.safetensors"
PROTOTYPE_FILE = "prototype.safetensors"
PROTOTYPE_TENSOR = "prototype"
PROBE_FILE = "probe.safetensors"
PROBE_PARTS: tuple[ProbePart, ...] = ("hidden_states", "expert_index", "weight", "output")


def expert_tensor(layer: int, expert: int, projection: Projection) -> str:
    """The name of one expert's matrix."""
    return f"layers.{layer}.experts.{expert}.{projection}_proj.weight"


def gate_tensor(layer: int) -> str:
    """The name of one layer's gate rows."""
    return f"layers.{layer}.gate.weight"


def probe_tensor(layer: int, part: ProbePart) -> str:
    """The name of one tensor of a layer's probe. Unlike names of weights it does not start with the layer."""
    return f"probe.layers.{layer}.{part}"


def expert_tensors_of_layer(description: BundleDescription, layer: int) -> dict[Projection, list[str]]:
    """The names of a layer's matrices, each projection's in the order of the experts."""
    experts = range(description.num_experts)
    return {projection: [expert_tensor(layer, expert, projection) for expert in experts] for projection in PROJECTIONS}


def expert_stacks(description: BundleDescription) -> Iterator[dict[str, TensorSpec]]:
    """The groups of adjacent tensors in a file: one layer's matrices of one projection.

    So every stack `[experts, …]` for a kernel is contiguous in a file and needs no copy.
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
    import torch

    return {PROTOTYPE_TENSOR: (torch.float32, (description.hidden_size,))} if description.has_prototype else {}


def probe_tensors(description: BundleDescription) -> dict[str, TensorSpec]:
    """The probe file's tensors, layer by layer; none if the bundle has no probe."""
    import torch

    if description.probe is None:
        return {}
    tokens, top_k, hidden = description.probe.tokens, description.probe.top_k, description.hidden_size
    specs: dict[ProbePart, TensorSpec] = {
        "hidden_states": (torch.float32, (tokens, hidden)),
        "expert_index": (torch.int32, (tokens, top_k)),
        "weight": (torch.float32, (tokens, top_k)),
        "output": (torch.float32, (tokens, hidden)),
    }
    return {probe_tensor(layer, part): specs[part] for layer in range(description.num_layers) for part in PROBE_PARTS}


def num_expected_tensors(description: BundleDescription) -> int:
    """The number of tensors in `expected_tensors`, without building them."""
    per_layer = len(PROJECTIONS) * description.num_experts + 1 + (len(PROBE_PARTS) if description.probe else 0)
    return description.num_layers * per_layer + description.has_prototype


def expected_tensors(description: BundleDescription) -> dict[str, TensorSpec]:
    """All tensors of a bundle's files."""
    tensors = {name: spec for stack in expert_stacks(description) for name, spec in stack.items()}
    return {
        **tensors,
        **gate_tensors(description),
        **prototype_tensors(description),
        **probe_tensors(description),
    }
