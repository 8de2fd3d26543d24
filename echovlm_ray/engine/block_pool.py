"""The KV cache's blocks: free list, reference counts, and cached contents of free blocks.

Several sequences may share a full block whose contents have a key, and none of them writes to it. When its reference
count is zero the contents stay cached for prompts with the same prefix until the block is evicted.
"""

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

BLOCK_SIZE = 16


@dataclass(frozen=True, slots=True)
class BlockContents:
    """The contents of a full block.

    Attributes:
        key: equal keys mean equal keys and values in the cache; see `engine.prefix`.
        bundles: the digests of the experts that computed them.
        routed_pairs: the number of (token, layer, expert) triples per organ for the block's tokens.
    """

    key: bytes
    bundles: frozenset[str]
    routed_pairs: Mapping[str, int]


class BlockPool:
    """Allocates and frees cache blocks, which are identified by their number."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._ref_counts = [0] * num_blocks
        self._contents: list[BlockContents | None] = [None] * num_blocks
        self._known: dict[bytes, int] = {}
        # Blocks with contents and reference count zero; the least recently released is evicted first.
        self._cached: OrderedDict[int, None] = OrderedDict()

    @property
    def num_free(self) -> int:
        """The number of blocks with reference count zero, including cached ones."""
        return len(self._free) + len(self._cached)

    @property
    def num_cached(self) -> int:
        """The number of blocks with reference count zero and cached contents."""
        return len(self._cached)

    @staticmethod
    def blocks_for(num_tokens: int) -> int:
        """The number of blocks for this many tokens."""
        return -(-num_tokens // BLOCK_SIZE)

    def allocate(self, num_blocks: int) -> list[int] | None:
        """Allocates blocks, evicting cached ones if needed. None if there are not enough."""
        if num_blocks > self.num_free:
            return None
        blocks = [self._free.pop() if self._free else self._evict() for _ in range(num_blocks)]
        for block in blocks:
            assert not self._ref_counts[block], "a referenced block was allocated"
            self._ref_counts[block] = 1
        return blocks

    def release(self, blocks: Sequence[int]) -> None:
        """Decrements the reference counts of a sequence's blocks, given in its order."""
        # The end of a prefix is evicted first, because it cannot be found without its beginning.
        for block in reversed(blocks):
            assert self._ref_counts[block], "a block was released twice"
            self._ref_counts[block] -= 1
            if self._ref_counts[block]:
                continue
            if self._contents[block] is None:
                self._free.append(block)
            else:
                self._cached[block] = None

    def find(self, keys: Iterable[bytes]) -> list[int]:
        """The blocks of the longest cached prefix of `keys`. Does not change reference counts."""
        found = []
        for key in keys:
            if (block := self._known.get(key)) is None:
                break
            found.append(block)
        return found

    def num_free_without(self, blocks: Iterable[int]) -> int:
        """The number of blocks that could be allocated after these were acquired."""
        return self.num_free - sum(block in self._cached for block in blocks)

    def acquire(self, blocks: Iterable[int]) -> None:
        """Increments the reference counts of blocks from `find`, which are read-only."""
        for block in blocks:
            assert self._contents[block] is not None, "a block without contents was shared"
            self._cached.pop(block, None)
            self._ref_counts[block] += 1

    def contents(self, block: int) -> BlockContents:
        """The contents of a block from `find`."""
        contents = self._contents[block]
        assert contents is not None, "the block has no contents that are known"
        return contents

    def publish(self, block: int, contents: BlockContents) -> None:
        """Makes a sequence's full block findable, unless another block has the same contents."""
        assert self._ref_counts[block], "a free block was published"
        if self._contents[block] is None and contents.key not in self._known:
            self._contents[block] = contents
            self._known[contents.key] = block

    def invalidate(self, blocks: Iterable[int]) -> None:
        """Invalidates cached contents. Referenced blocks stay with their sequences."""
        for block in blocks:
            if (contents := self._contents[block]) is None:
                continue
            self._contents[block] = None
            del self._known[contents.key]
            if block in self._cached:
                del self._cached[block]
                self._free.append(block)

    def evict_bundle(self, digest: str) -> None:
        """Invalidates all cached contents that were computed with a bundle's experts."""
        known = [(block, self.contents(block)) for block in self._known.values()]
        self.invalidate([block for block, contents in known if digest in contents.bundles])

    def evict_all(self) -> None:
        """Invalidates all cached contents."""
        self.invalidate(list(self._known.values()))

    def _evict(self) -> int:
        block, _ = self._cached.popitem(last=False)
        contents = self.contents(block)
        self._contents[block] = None
        del self._known[contents.key]
        return block
