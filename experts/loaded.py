"""One bundle in memory: its description, and the checks between an exchange and its kernel."""

from dataclasses import dataclass

import torch

from experts.bundles.manifest import Manifest
from experts.errors import InvalidTensorError
from experts.kernels.base import NO_EXPERT, PreparedExperts


@dataclass(frozen=True, slots=True)
class Resident:
    """A bundle that is ready to compute."""

    digest: str
    name: str
    version: str
    # Of the weights as the kernel keeps them. Where they are views of mapped files, processes share the memory.
    resident_bytes: int
    kernel: str
    # Of the weights as they are computed with, and as the bundle has them; see `experts.bundles.convert`.
    dtype: str
    bundle_dtype: str


@dataclass(slots=True)
class LoadedBundle:
    """A bundle's experts as a kernel prepared them. It implements `experts.transport.expert_calls.SupportsForward`.

    Attributes:
        dtype: of the weights, and of the hidden states that it takes.
        device: where it computes.
        layers: one for each decoder layer.
        exchanges: under way; guarded by the group's lock.
    """

    resident: Resident
    manifest: Manifest
    dtype: torch.dtype
    device: torch.device
    layers: list[PreparedExperts]
    exchanges: int = 0

    @property
    def organ(self) -> str:
        """Whose experts these are."""
        return self.manifest.organ

    def parameters_per_expert(self, digest: str) -> int:
        """How many numbers one expert of one layer has."""
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
            InvalidTensorError: a layer, shape, dtype or expert that does not fit the bundle.
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
