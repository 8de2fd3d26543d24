"""The default on a CPU: each expert is two packed products, and only the pairs that are there are computed.

The result of a token has the same bits whatever the other tokens of the call and the number of threads. Rounding is
that of the kernel `reference`: see `PreparedExperts.forward`.
"""

import logging
from itertools import chain

import torch
import torch.nn.functional as F

from experts.kernels.base import ExpertWeights, PreparedExperts
from experts.kernels.packed_linear import MAX_PADDING, MAX_ROWS, PackedLinear, padded_rows, unavailable_reason
from experts.kernels.reference import ReferenceExperts
from experts.kernels.silu_multiply import silu_and_multiply

_LOG = logging.getLogger(__name__)

# Up to this many pairs, sorting in Python beats a sort, a histogram and their tensors.
_FEW_PAIRS = 64


class PackedExperts:
    """One layer's experts as packed matrices: gate and up in one, down in another, for each expert."""

    kernel_name = "cpu_packed"

    def __init__(self, weights: ExpertWeights) -> None:
        """Packs expert by expert, so that no more than one expert's plain copy exists beside the packed ones."""
        self._inner_size = weights.intermediate_size
        self._gate_up: list[PackedLinear] = []
        self._down: list[PackedLinear] = []
        # One for all: a new one for each expert would leave holes between the packed matrices.
        gate_up_2FD = weights.gate_EFD.new_empty((2 * self._inner_size, weights.hidden_size))
        for expert in range(weights.num_experts):
            gate_up_2FD[: self._inner_size] = weights.gate_EFD[expert].detach()
            gate_up_2FD[self._inner_size :] = weights.up_EFD[expert].detach()
            self._gate_up.append(PackedLinear(gate_up_2FD))
            self._down.append(PackedLinear(weights.down_EDF[expert]))

    @property
    def nbytes(self) -> int:
        """Bytes of the packed matrices; the plain ones are not kept."""
        return sum(linear.nbytes for linear in (*self._gate_up, *self._down))

    def forward(self, x_TD: torch.Tensor, expert_index_TK: torch.Tensor, weight_TK: torch.Tensor) -> torch.Tensor:
        """The weighted sum over each token's experts; see `experts.kernels.base.PreparedExperts`."""
        if torch.is_grad_enabled() and (x_TD.requires_grad or weight_TK.requires_grad):
            raise ValueError("the expert kernel cpu_packed has no gradients; train with torch_grouped")
        if x_TD.dtype != self._gate_up[0].dtype or x_TD.shape[1] != self._gate_up[0].in_features:
            raise ValueError(
                f"the rows are {x_TD.dtype} of {x_TD.shape[1]}; these experts take {self._gate_up[0].dtype} of "
                f"{self._gate_up[0].in_features}"
            )
        sum_TD = torch.zeros(x_TD.shape, dtype=torch.float32)
        if x_TD.shape[0] == 1:
            self._add_lone_token(sum_TD, x_TD, expert_index_TK, weight_TK)
        else:
            self._add_tokens(sum_TD, x_TD, expert_index_TK, weight_TK)
        return sum_TD.to(x_TD.dtype)

    def _add_tokens(
        self, sum_TD: torch.Tensor, x_TD: torch.Tensor, expert_index_TK: torch.Tensor, weight_TK: torch.Tensor
    ) -> None:
        few = expert_index_TK.numel() <= _FEW_PAIRS
        pair_P, counts = (_sort_in_python if few else _sort_tensors)(expert_index_TK, len(self._down))
        if pair_P.shape[0] == 0:
            return
        token_P = pair_P // expert_index_TK.shape[1]
        # The rows of the next expert, or of the end once more, serve as padding: what they hold does not matter.
        padded_P = F.pad(token_P, (0, MAX_PADDING))
        x_PD = x_TD.index_select(0, padded_P)
        outputs = []
        start = 0
        for expert, count in enumerate(counts):
            for first in range(start, start + count, MAX_ROWS):
                rows = min(MAX_ROWS, start + count - first)
                outputs.append(self._expert(expert, x_PD[first : first + padded_rows(rows)])[:rows])
            start += count
        output_PD = torch.cat(outputs).mul_(weight_TK.reshape(-1, 1).index_select(0, pair_P))
        # Row after row, so each token adds up its experts in their order.
        sum_TD.index_add_(0, token_P, output_PD.float())

    def _add_lone_token(
        self, sum_1D: torch.Tensor, x_1D: torch.Tensor, expert_index_1K: torch.Tensor, weight_1K: torch.Tensor
    ) -> None:
        """As `_add_tokens`, bit for bit. One request's decoding waits for every operation that is not needed."""
        x_2D = x_1D.repeat(padded_rows(1), 1)
        # Sorting is stable: an expert that is named twice adds up in the order of the places.
        for expert, k in sorted((expert, k) for k, expert in enumerate(expert_index_1K[0].tolist()) if expert >= 0):
            sum_1D.add_(self._expert(expert, x_2D)[:1].mul_(weight_1K[:, k : k + 1]))

    def _expert(self, expert: int, x_ND: torch.Tensor) -> torch.Tensor:
        gate_NF, up_NF = self._gate_up[expert].product(x_ND).chunk(2, dim=1)
        return self._down[expert].product(silu_and_multiply(gate_NF, up_NF))


def _sort_in_python(expert_index_TK: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, list[int]]:
    """The flat positions of the pairs that have an expert, in the order of the experts, and how many each has."""
    pairs: list[list[int]] = [[] for _ in range(num_experts)]
    for pair, expert in enumerate(expert_index_TK.flatten().tolist()):
        if expert >= 0:
            pairs[expert].append(pair)
    return torch.tensor(list(chain.from_iterable(pairs)), dtype=torch.int64), [len(positions) for positions in pairs]


def _sort_tensors(expert_index_TK: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, list[int]]:
    """As `_sort_in_python`, for many pairs."""
    index_P = expert_index_TK.reshape(-1)
    order_P = torch.argsort(index_P, stable=True)
    # Those without an expert come first in the order.
    nobody, *counts = torch.bincount(index_P + 1, minlength=num_experts + 1).tolist()
    return order_P[nobody:], counts


class PlainExperts(ReferenceExperts):
    """What `cpu_packed` falls back to where weights cannot be packed: the kernel `reference`, named for what it is."""

    kernel_name = "cpu_packed (not packed)"


class CpuPackedKernel:
    """Packs weights on a CPU; where that is not possible it computes with the plain ones, logs why and shows it."""

    @property
    def name(self) -> str:
        """The name by which configuration and status know it."""
        return "cpu_packed"

    def load(self, weights: ExpertWeights) -> PreparedExperts:
        """Packs one layer's weights; they need not be kept.

        Raises:
            ValueError: the weights are not on the CPU.
        """
        if weights.device.type != "cpu":
            raise ValueError(
                f"the expert kernel cpu_packed computes on the CPU; the weights are on {weights.device}. "
                "Choose auto or megablocks_sparse, or the device cpu"
            )
        reason = unavailable_reason(weights.dtype)
        if reason is not None:
            _LOG.warning("the expert kernel cpu_packed computes with plain weights in %s: %s", weights.dtype, reason)
            return PlainExperts(weights)
        return PackedExperts(weights)
