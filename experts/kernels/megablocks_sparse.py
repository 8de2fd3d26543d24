"""MegaBlocks' dropless experts as block-sparse matrix products. The default on a GPU.

The rows of all pairs are sorted by expert and padded to whole blocks of 128 for each expert; the experts' weights are
stacked. The inner activations are then one sparse matrix with exactly the needed blocks (Gale et al. 2022, arXiv
2211.15841). The products are stk's Triton kernels, called directly: MegaBlocks' own layers refuse Triton from 3.2 on,
because of the overflow that `_sdd_index_type` avoids.
"""

import threading
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from experts.kernels.base import ExpertWeights
from experts.kernels.gpu_support import (
    check_weights,
    import_megablocks,
    interpreted,
    on_device,
    pad_to,
    refuse_gradients,
)
from experts.kernels.grouping import OrderedPairs, order_pairs, sum_over_k

BLOCK = 128
_NAME = "megablocks_sparse"
# Elements of a tensor that the kernels address with 32 bits.
_MAX_ELEMENTS = 2**31
# stk multiplies a block's number by 128 in the type of the number, which overflows in 16 bits beyond this many rows.
_MAX_INT16_EXTENT = 2**15


@dataclass(frozen=True, slots=True)
class _Bins:
    """The bins of the pairs after sorting by expert. The last bin is for pairs without an expert."""

    pair_P: torch.Tensor
    bin_P: torch.Tensor
    end_B: torch.Tensor
    padded_end_B: torch.Tensor
    # Rows of the experts, and of all bins, on the host.
    expert_rows: int
    all_rows: int


class MegaBlocksSparseExperts:
    """One layer's experts, stacked and padded to whole blocks. No gradients."""

    def __init__(self, weights: ExpertWeights, megablocks: Any, stk: Any) -> None:
        """Copies what must be padded or transposed: always `down`, the others where a size is no multiple of 128."""
        self._megablocks, self._stk = megablocks, stk
        self._num_experts, self._hidden_size = weights.num_experts, weights.hidden_size
        self._inner_size = weights.intermediate_size
        inner = _round_up(self._inner_size)
        hidden = _round_up(self._hidden_size)
        self._inner_blocks = inner // BLOCK
        if self._num_experts * inner * hidden >= _MAX_ELEMENTS:
            raise ValueError(
                f"{self._num_experts} experts of {hidden} × {inner} are too many for the kernel {_NAME}, which "
                f"addresses {_MAX_ELEMENTS} elements; choose torch_grouped"
            )
        self._max_rows = _MAX_ELEMENTS // max(hidden, inner) // BLOCK * BLOCK
        self._gate_HD = pad_to(weights.gate_EFD.detach(), inner, hidden).view(-1, hidden)
        self._up_HD = pad_to(weights.up_EFD.detach(), inner, hidden).view(-1, hidden)
        self._down_HD = pad_to(weights.down_EDF.detach().transpose(1, 2), inner, hidden).view(-1, hidden)

    @property
    def nbytes(self) -> int:
        """Bytes of the weights, with their padding."""
        return self._gate_HD.nbytes + self._up_HD.nbytes + self._down_HD.nbytes

    @property
    def weights(self) -> ExpertWeights:
        """The weights as views without the padding, for a second kernel that can read them in place."""
        stacked = [
            matrix.view(self._num_experts, -1, matrix.shape[1])[:, : self._inner_size, : self._hidden_size]
            for matrix in (self._gate_HD, self._up_HD, self._down_HD)
        ]
        return ExpertWeights(stacked[0], stacked[1], stacked[2].transpose(1, 2))

    def forward(self, x_TD: torch.Tensor, expert_index_TK: torch.Tensor, weight_TK: torch.Tensor) -> torch.Tensor:
        """The weighted sum over each token's experts; see `experts.kernels.base.PreparedExperts`.

        Synchronises with the device, because the number of blocks determines the launch.
        """
        refuse_gradients(_NAME, x_TD, weight_TK)
        tokens, top_k = expert_index_TK.shape
        if tokens == 0 or top_k == 0:
            return torch.zeros_like(x_TD)
        # Tokens are independent, so any number can be computed in parts.
        step = max(1, (self._max_rows - (self._num_experts + 1) * BLOCK) // top_k)
        with on_device(x_TD):
            parts = [
                self._exchange(x_TD[part], order_pairs(expert_index_TK[part], weight_TK[part], self._num_experts))
                for part in (slice(start, start + step) for start in range(0, tokens, step))
            ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _exchange(self, x_TD: torch.Tensor, pairs: OrderedPairs) -> torch.Tensor:
        bins = self._sort(pairs.expert_TK.flatten())
        if bins.expert_rows == 0:
            return torch.zeros_like(x_TD)
        padded_TD = pad_to(x_TD, x_TD.shape[0], self._gate_HD.shape[1])
        top_k = pairs.expert_TK.shape[1]
        x_RD = self._megablocks.padded_gather(padded_TD, bins.pair_P, bins.bin_P, bins.end_B, bins.padded_end_B, top_k)
        output_RD = self._experts(x_RD, bins)
        part_PD = self._megablocks.padded_scatter(
            output_RD, bins.pair_P, bins.bin_P, pairs.weight_TK.flatten(), bins.end_B, bins.padded_end_B, 1
        )
        sum_TD = sum_over_k(part_PD.view(x_TD.shape[0], top_k, -1))
        return sum_TD[:, : self._hidden_size].contiguous()

    def _sort(self, expert_P: torch.Tensor) -> _Bins:
        ops, num_bins = self._megablocks, self._num_experts + 1
        bin_P, pair_P = ops.sort(expert_P, num_bins.bit_length())
        count_B = ops.histogram(expert_P, num_bins)
        end_B = ops.inclusive_cumsum(count_B, 0)
        padded_end_B = ops.inclusive_cumsum(ops.round_up(count_B, BLOCK), 0)
        expert_rows, all_rows = padded_end_B[-2:].tolist()
        return _Bins(pair_P, bin_P, end_B, padded_end_B, expert_rows, all_rows)

    def _experts(self, x_RD: torch.Tensor, bins: _Bins) -> torch.Tensor:
        """The experts' outputs of all rows. Those without an expert come last, have no blocks and become zeros."""
        column_N, row_N, offset_R = self._topology(bins)
        # The product only uses the positions of the blocks.
        places = torch.empty((len(column_N), BLOCK, BLOCK), dtype=x_RD.dtype, device="meta")
        sdd_type = self._sdd_index_type(bins.expert_rows)
        wanted = self._matrix(bins.expert_rows, places, row_N.to(sdd_type), column_N.to(sdd_type), offset_R)
        x_RD_experts = x_RD[: bins.expert_rows]
        gate = self._stk.ops.sdd(x_RD_experts, self._gate_HD.t(), wanted)
        up = self._stk.ops.sdd(x_RD_experts, self._up_HD.t(), wanted)
        inner_data = F.silu(gate.data, inplace=True).mul_(up.data)
        # In 16 bits again: 32 would halve how far the kernel loads ahead, and here there is nothing to overflow.
        inner = self._matrix(bins.all_rows, inner_data, row_N, column_N, offset_R)
        output_RD: torch.Tensor = self._stk.ops.dsd(inner, self._down_HD)
        return output_RD

    def _topology(self, bins: _Bins) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Block columns and block rows of the blocks, int16, and where each block row begins, int32."""
        block_rows = bins.expert_rows // BLOCK
        column_N = self._megablocks.topology(bins.padded_end_B[:-1], BLOCK, block_rows, self._inner_blocks)
        device = column_N.device
        row_N = (torch.arange(len(column_N), device=device) // self._inner_blocks).to(torch.int16)
        row_R = torch.arange(bins.all_rows // BLOCK + 1, dtype=torch.int32, device=device)
        return column_N, row_N, row_R.clamp_max(block_rows) * self._inner_blocks

    def _sdd_index_type(self, rows: int) -> torch.dtype:
        return torch.int32 if max(rows, self._gate_HD.shape[0]) > _MAX_INT16_EXTENT else torch.int16

    def _matrix(
        self, rows: int, data: torch.Tensor, row_N: torch.Tensor, column_N: torch.Tensor, offset_R: torch.Tensor
    ) -> Any:
        # The last three describe the transposed matrix. Only gradients read them; left out, stk would compute them.
        return self._stk.Matrix(
            torch.Size((rows, self._gate_HD.shape[0])), data, row_N, column_N, offset_R, column_N, offset_R, offset_R
        )


class MegaBlocksSparseKernel:
    """MegaBlocks' block-sparse kernels in bfloat16 and float16. Equal calls give equal bits.

    In float32 the kernels would round to TF32, so it is refused on a GPU; the interpreter computes it exactly.
    """

    def __init__(self) -> None:
        """Imports the libraries.

        Raises:
            ImportError: megablocks, stanford-stk or triton is not installed.
        """
        self._megablocks, self._stk = import_megablocks()
        self._lock = threading.Lock()
        self._warm: set[tuple[object, ...]] = set()

    @property
    def name(self) -> str:
        """The name in configuration and status."""
        return _NAME

    def load(self, weights: ExpertWeights) -> MegaBlocksSparseExperts:
        """Stacks and pads the weights; compiles the kernels for their shape, so that no request waits for that.

        Raises:
            ValueError: the weights are not on a GPU, of another dtype, or too many.
        """
        dtypes = (torch.bfloat16, torch.float16, *((torch.float32,) if interpreted() else ()))
        check_weights(_NAME, weights, dtypes)
        experts = MegaBlocksSparseExperts(weights, self._megablocks, self._stk)
        shape = (weights.gate_EFD.shape, weights.dtype, weights.device)
        with self._lock:
            if weights.device.type == "cuda" and shape not in self._warm:
                with torch.inference_mode():
                    x_TD = torch.zeros((1, weights.hidden_size), dtype=weights.dtype, device=weights.device)
                    experts.forward(x_TD, torch.zeros((1, 1), dtype=torch.int32, device=weights.device), x_TD[:, :1])
                self._warm.add(shape)
        return experts


def _round_up(size: int) -> int:
    return -(-size // BLOCK) * BLOCK
