"""The kernel for decoding: for a few tokens, with the time of reading the weights once."""

import threading
from dataclasses import dataclass

import torch
import triton

from experts.kernels.base import ExpertWeights
from experts.kernels.gpu_support import check_weights, on_device, refuse_gradients
from experts.kernels.triton_swiglu import combine_kernel, down_kernel, gate_up_kernel

_NAME = "triton_small"
# More tokens than this are computed in parts, and other kernels are faster.
MAX_TOKENS = 32
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_COMBINE_BLOCK = 512


@dataclass(frozen=True, slots=True)
class Tiles:
    """How the work of a kernel is cut up. `outputs` columns are one program's; `inputs` are summed at once."""

    outputs: int
    inputs: int
    warps: int = 4
    stages: int = 4


class TritonSmallExperts:
    """One layer's experts, read in place. No gradients."""

    def __init__(self, weights: ExpertWeights) -> None:
        """Uses the weights; copies `gate` and `up` if their rows are not contiguous or their strides differ."""
        gate_EFD, up_EFD = weights.gate_EFD.detach(), weights.up_EFD.detach()
        if gate_EFD.stride(2) != 1 or gate_EFD.stride() != up_EFD.stride():
            gate_EFD, up_EFD = gate_EFD.contiguous(), up_EFD.contiguous()
        self._gate_EFD, self._up_EFD, self._down_EDF = gate_EFD, up_EFD, weights.down_EDF.detach()
        self._num_experts, self._inner_size, self._hidden_size = gate_EFD.shape
        self.up_tiles = _tiles(self._inner_size * self._num_experts, gate_EFD.dtype)
        self.down_tiles = _tiles(self._hidden_size * self._num_experts, gate_EFD.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of the weights."""
        return self._gate_EFD.nbytes + self._up_EFD.nbytes + self._down_EDF.nbytes

    def forward(self, x_TD: torch.Tensor, expert_index_TK: torch.Tensor, weight_TK: torch.Tensor) -> torch.Tensor:
        """The weighted sum over each token's experts; see `experts.kernels.base.PreparedExperts`.

        Does not synchronise with the device, and can be captured in a CUDA graph once it has run for the shape.
        """
        refuse_gradients(_NAME, x_TD, weight_TK)
        tokens, top_k = expert_index_TK.shape
        if tokens == 0 or top_k == 0:
            return torch.zeros_like(x_TD)
        x_TD, expert_index_TK, weight_TK = x_TD.contiguous(), expert_index_TK.contiguous(), weight_TK.contiguous()
        sum_TD = torch.empty_like(x_TD)
        with on_device(x_TD):
            for start in range(0, tokens, MAX_TOKENS):
                part = slice(start, start + MAX_TOKENS)
                self._exchange(x_TD[part], expert_index_TK[part], weight_TK[part], sum_TD[part])
        return sum_TD

    def _exchange(
        self, x_TD: torch.Tensor, expert_TK: torch.Tensor, weight_TK: torch.Tensor, sum_TD: torch.Tensor
    ) -> None:
        tokens, top_k = expert_TK.shape
        experts, inner, hidden = self._num_experts, self._inner_size, self._hidden_size
        pairs = tokens * top_k
        inner_ETF = x_TD.new_empty((experts, tokens, inner))
        output_ETD = x_TD.new_empty((experts, tokens, hidden))
        sizes = {
            "HIDDEN": hidden,
            "INNER": inner,
            "PAIRS": triton.next_power_of_2(pairs),
            "BLOCK_T": 16 if tokens <= 16 else 32,
        }
        up, down = self.up_tiles, self.down_tiles
        gate_up_kernel[(triton.cdiv(inner, up.outputs), experts)](
            x_TD,
            expert_TK,
            self._gate_EFD,
            self._up_EFD,
            inner_ETF,
            tokens,
            pairs,
            EXPERT_STRIDE=self._gate_EFD.stride(0),
            ROW_STRIDE=self._gate_EFD.stride(1),
            BLOCK_F=up.outputs,
            BLOCK_D=up.inputs,
            num_warps=up.warps,
            num_stages=up.stages,
            **sizes,
        )
        down_kernel[(triton.cdiv(hidden, down.outputs), experts)](
            inner_ETF,
            expert_TK,
            self._down_EDF,
            output_ETD,
            tokens,
            pairs,
            EXPERT_STRIDE=self._down_EDF.stride(0),
            D_STRIDE=self._down_EDF.stride(1),
            F_STRIDE=self._down_EDF.stride(2),
            BLOCK_F=down.inputs,
            BLOCK_D=down.outputs,
            num_warps=down.warps,
            num_stages=down.stages,
            **sizes,
        )
        combine_kernel[(tokens, triton.cdiv(hidden, _COMBINE_BLOCK))](
            output_ETD, expert_TK, weight_TK, sum_TD, tokens, experts, top_k, HIDDEN=hidden, BLOCK_D=_COMBINE_BLOCK
        )


class TritonSmallKernel:
    """Triton kernels for up to 32 tokens, in float32, bfloat16 and float16. Equal calls give equal bits.

    More tokens are computed in parts, for which other kernels are faster.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._warm: set[tuple[object, ...]] = set()

    @property
    def name(self) -> str:
        """The name in configuration and status."""
        return _NAME

    def load(self, weights: ExpertWeights) -> TritonSmallExperts:
        """Uses the weights unchanged; compiles the kernels for their shape, so that no request waits for that.

        Raises:
            ValueError: the weights are not on a GPU, or of another dtype.
        """
        check_weights(_NAME, weights, _DTYPES)
        experts = TritonSmallExperts(weights)
        shape = (weights.gate_EFD.shape, weights.gate_EFD.stride(), weights.down_EDF.stride(), weights.device)
        key = (*shape, weights.dtype)
        with self._lock:
            if weights.device.type == "cuda" and key not in self._warm:
                with torch.inference_mode():
                    for tokens in (1, MAX_TOKENS):
                        x_TD = torch.zeros((tokens, weights.hidden_size), dtype=weights.dtype, device=weights.device)
                        index_TK = torch.zeros((tokens, 2), dtype=torch.int32, device=weights.device)
                        experts.forward(x_TD, index_TK, x_TD[:, :1].expand(-1, 2))
                self._warm.add(key)
        return experts


def _tiles(columns: int, dtype: torch.dtype) -> Tiles:
    """Wide tiles if every multiprocessor gets several, otherwise narrow ones."""
    if dtype == torch.float32:
        return Tiles(outputs=16, inputs=64, stages=3)
    # An H200 has 132 multiprocessors.
    return Tiles(outputs=32 if columns >= 32 * 4 * 132 else 16, inputs=128)
