"""The paged KV cache: keys and values in blocks that sequences borrow (Kwon et al. 2023, arXiv 2309.06180)."""

import torch

BLOCK_SIZE = 16


class BlockPool:
    """Hands out cache blocks and takes them back."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._free)

    @staticmethod
    def blocks_for(num_tokens: int) -> int:
        """How many blocks hold that many tokens."""
        return -(-num_tokens // BLOCK_SIZE)

    def allocate(self, num_blocks: int) -> list[int] | None:
        """That many blocks, or None when there are not enough."""
        if num_blocks > len(self._free):
            return None
        return [self._free.pop() for _ in range(num_blocks)]

    def release(self, blocks: list[int]) -> None:
        """Takes blocks back; they must have come from `allocate`."""
        assert len(self._free) + len(blocks) <= self.num_blocks, "a block was released twice"
        self._free.extend(blocks)


class KVCache:
    """Keys and values of every layer. A slot is one token's place: block · BLOCK_SIZE + offset."""

    def __init__(
        self,
        *,
        num_layers: int,
        num_blocks: int,
        num_key_value_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (num_layers, num_blocks * BLOCK_SIZE, num_key_value_heads, head_dim)
        # Zeros, not empty memory: pages are committed only when first written.
        self.key_LSHD = torch.zeros(shape, dtype=dtype, device=device)
        self.value_LSHD = torch.zeros(shape, dtype=dtype, device=device)
        self._offset = torch.arange(BLOCK_SIZE)
        self._device = device

    def slots(self, block_table: list[int], start: int, end: int) -> torch.Tensor:
        """The slots of a sequence's tokens [start, end), int64."""
        blocks = torch.tensor(block_table[: BlockPool.blocks_for(end)], dtype=torch.int64)
        slots = (blocks[:, None] * BLOCK_SIZE + self._offset).flatten()
        return slots[start:end].to(self._device)

    def write(self, layer: int, slots_T: torch.Tensor, key_THD: torch.Tensor, value_THD: torch.Tensor) -> None:
        """Stores new tokens; writing a slot again replaces it, which makes a repeated step harmless."""
        self.key_LSHD[layer].index_copy_(0, slots_T, key_THD)
        self.value_LSHD[layer].index_copy_(0, slots_T, value_THD)

    def read(self, layer: int, slots_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of tokens, each tokens × heads × head_dim."""
        return self.key_LSHD[layer].index_select(0, slots_T), self.value_LSHD[layer].index_select(0, slots_T)
