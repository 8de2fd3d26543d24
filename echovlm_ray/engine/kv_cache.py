"""The paged KV cache: keys and values in blocks (Kwon et al. 2023, arXiv 2309.06180)."""

import numpy as np
import torch

from echovlm_ray.engine.block_pool import BLOCK_SIZE, BlockPool

__all__ = ["BLOCK_SIZE", "BlockPool", "KVCache"]

_OFFSETS = np.arange(BLOCK_SIZE)


class KVCache:
    """Keys and values of every layer. A token's slot is block · BLOCK_SIZE + offset."""

    def __init__(
        self,
        *,
        num_layers: int,
        num_blocks: int,
        num_key_value_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        compiled: bool = False,
    ) -> None:
        """Allocates the whole cache.

        Args:
            num_layers: the model's number of layers.
            num_blocks: the number of blocks of `BLOCK_SIZE` tokens.
            num_key_value_heads: the model's number of key-value heads.
            head_dim: the model's size of a head.
            dtype: the dtype of keys and values.
            device: the device of keys and values.
            compiled: whether `echovlm_ray.engine.compiled` uses it; see its `use_compiled`.
        """
        shape = (num_layers, num_blocks * BLOCK_SIZE, num_key_value_heads, head_dim)
        # Written, so that the pages are allocated now: otherwise they are allocated one by one under load, and missing
        # memory shows only days later.
        self.key_LSHD = torch.empty(shape, dtype=dtype, device=device).zero_()
        self.value_LSHD = torch.empty(shape, dtype=dtype, device=device).zero_()
        self.dtype = dtype
        self.device = device
        self.compiled = compiled

    @staticmethod
    def slots(block_table: list[int], start: int, end: int) -> torch.Tensor:
        """The slots of a sequence's tokens [start, end): int64, on the CPU."""
        first = start // BLOCK_SIZE
        blocks = np.array(block_table[first : BlockPool.blocks_for(end)], dtype=np.int64)
        slots = (blocks[:, None] * BLOCK_SIZE + _OFFSETS).reshape(-1)
        return torch.from_numpy(slots[start - first * BLOCK_SIZE : end - first * BLOCK_SIZE])

    def write(self, layer: int, slots_T: torch.Tensor, key_THD: torch.Tensor, value_THD: torch.Tensor) -> None:
        """Stores new tokens. Slots can be overwritten, so a step can be repeated."""
        self.key_LSHD[layer].index_copy_(0, slots_T, key_THD)
        self.value_LSHD[layer].index_copy_(0, slots_T, value_THD)

    def read(self, layer: int, slots_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of tokens, each tokens × heads × head_dim."""
        return self.key_LSHD[layer].index_select(0, slots_T), self.value_LSHD[layer].index_select(0, slots_T)
