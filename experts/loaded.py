"""One loaded bundle: its description, and the checks of a call before the kernel runs."""

from dataclasses import dataclass

import torch

from experts.bundles.manifest import Manifest
from experts.errors import InvalidTensorError
from experts.kernels.base import NO_EXPERT, PreparedExperts


@dataclass(frozen=True, slots=True)
class Resident:
    """The description of a loaded bundle."""

    digest: str
    name: str
    version: str
    # Of the weights in the kernel's layout. Views of mapped files are memory that processes share.
    resident_bytes: int
    kernel: str
    # The dtype of the computation, and the bundle's dtype; see `experts.bundles.convert`.
    dtype: str
    bundle_dtype: str


@dataclass(slots=True)
class LoadedBundle:
    """A bundle's experts in a kernel's layout; an `experts.transport.expert_calls.SupportsForward` for this bundle.

    Attributes:
        dtype: the dtype of the weights and of the hidden states.
        device: the device of the computation.
        layers: one for each decoder layer.
        running_calls: the number of running calls; guarded by the group's lock.
    """

    resident: Resident
    manifest: Manifest
    dtype: torch.dtype
    device: torch.device
    layers: list[PreparedExperts]
    running_calls: int = 0

    @property
    def organ(self) -> str:
        """Whose experts these are."""
        return self.manifest.organ

    def parameters_per_expert(self, digest: str) -> int:
        """The number of parameters of one expert in one layer."""
        return 3 * self.manifest.hidden_size * self.manifest.intermediate_size

    def forward(
        self,
        digest: str,
        layer: int,
        x_TD: torch.Tensor,
        expert_index_TK: torch.Tensor,
        weight_TK: torch.Tensor,
    ) -> torch.Tensor:
        """See `experts.group.ExpertGroup.forward`.

        Raises:
            InvalidTensorError: a layer, shape, dtype or expert index does not fit the bundle.
        """
        _check_exchange(self, layer, x_TD, expert_index_TK, weight_TK)
        with torch.inference_mode():
            output_TD = self.layers[layer].forward(
                x_TD.to(self.device), expert_index_TK.to(self.device), weight_TK.to(self.device)
            )
            return output_TD.to(x_TD.device)


def _check_exchange(
    loaded: LoadedBundle, layer: int, x_TD: torch.Tensor, expert_index_TK: torch.Tensor, weight_TK: torch.Tensor
) -> None:
    manifest = loaded.manifest
    if not 0 <= layer < manifest.num_layers:
        raise InvalidTensorError(f"layer is {layer}; the bundle has layers 0 to {manifest.num_layers - 1}")
    if x_TD.ndim != 2 or x_TD.shape[1] != manifest.hidden_size:
        raise InvalidTensorError(
            f"hidden_states has the shape {list(x_TD.shape)}; it must be [tokens, {manifest.hidden_size}]"
        )
    if x_TD.dtype != loaded.dtype:
        raise InvalidTensorError(f"hidden_states is {x_TD.dtype}; the resident weights are {loaded.dtype}")
    if expert_index_TK.ndim != 2 or expert_index_TK.shape[0] != x_TD.shape[0]:
        raise InvalidTensorError(
            f"expert_index has the shape {list(expert_index_TK.shape)}; it must be [{x_TD.shape[0]}, top_k]"
        )
    if expert_index_TK.dtype != torch.int32:
        raise InvalidTensorError(f"expert_index is {expert_index_TK.dtype}; it must be torch.int32")
    if weight_TK.shape != expert_index_TK.shape or weight_TK.dtype != x_TD.dtype:
        raise InvalidTensorError(
            f"weight is {weight_TK.dtype} {list(weight_TK.shape)}; it must be {x_TD.dtype} "
            f"{list(expert_index_TK.shape)}"
        )
    if expert_index_TK.numel():
        low, high = (int(bound) for bound in torch.aminmax(expert_index_TK))
        if low < NO_EXPERT or high >= manifest.num_experts:
            raise InvalidTensorError(
                f"expert_index reaches from {low} to {high}; the bundle has experts 0 to {manifest.num_experts - 1}, "
                f"and {NO_EXPERT} means none"
            )
