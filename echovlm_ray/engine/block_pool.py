"""The KV cache's blocks: free ones, reference counts, and what free blocks still cache.

Several sequences may reference a full block whose contents have a key; none of them writes to it. When its reference
count is zero the contents stay cached, for a later prompt that begins in the same way, until the block is evicted.
"""

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

BLOCK_SIZE = 16


@dataclass(frozen=True, slots=True)
class BlockContents:
    """What a full block holds.

    Attributes:
        key: equal keys mean equal keys and values in the cache; see `engine.prefix`.
        bundles: the digests of the experts that they were computed with.
        routed_pairs: (token, layer, expert) pairs per organ that computing the block's tokens took.
    """

    key: bytes
    bundles: frozenset[str]
    routed_pairs: Mapping[str, int]


class BlockPool:
    """Hands out cache blocks and takes them back; blocks are known by their number."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._ref_counts = [0] * num_blocks
        self._contents: list[BlockContents | None] = [None] * num_blocks
        self._known: dict[bytes, int] = {}
        # Of reference count zero, with contents; the least recently released is evicted first.
        self._cached: OrderedDict[int, None] = OrderedDict()

    @property
    def num_free(self) -> int:
        """Blocks of reference count zero, the cached ones included."""
        return len(self._free) + len(self._cached)

    @property
    def num_cached(self) -> int:
        """Blocks of reference count zero whose contents a prompt may still begin with."""
        return len(self._cached)

    @staticmethod
    def blocks_for(num_tokens: int) -> int:
        """How many blocks hold that many tokens."""
        return -(-num_tokens // BLOCK_SIZE)

    def allocate(self, num_blocks: int) -> list[int] | None:
        """That many blocks to write to, or None when there are not enough; cached ones are evicted when needed."""
        if num_blocks > self.num_free:
            return None
        blocks = [self._free.pop() if self._free else self._evict() for _ in range(num_blocks)]
        for block in blocks:
            assert not self._ref_counts[block], "a referenced block was allocated"
            self._ref_counts[block] = 1
        return blocks

    def release(self, blocks: Sequence[int]) -> None:
        """Decrements the reference counts of a sequence's blocks, given in its order."""
        # The end of a prefix is worth less than its beginning, without which it is never found.
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
        """The blocks of the longest beginning of `keys` that is known; their reference counts stay."""
        found = []
        for key in keys:
            if (block := self._known.get(key)) is None:
                break
            found.append(block)
        return found

    def num_free_without(self, blocks: Iterable[int]) -> int:
        """How many blocks could still be allocated after these were acquired."""
        return self.num_free - sum(block in self._cached for block in blocks)

    def acquire(self, blocks: Iterable[int]) -> None:
        """Increments the reference counts of blocks that `find` found; they are read only."""
        for block in blocks:
            assert self._contents[block] is not None, "a block without contents was shared"
            self._cached.pop(block, None)
            self._ref_counts[block] += 1

    def contents(self, block: int) -> BlockContents:
        """What a block that `find` found holds."""
        contents = self._contents[block]
        assert contents is not None, "the block has no contents that are known"
        return contents

    def publish(self, block: int, contents: BlockContents) -> None:
        """Makes a sequence's full block findable; where another one has the same contents already, that one stays."""
        assert self._ref_counts[block], "a free block was published"
        if self._contents[block] is None and contents.key not in self._known:
            self._contents[block] = contents
            self._known[contents.key] = block

    def invalidate(self, blocks: Iterable[int]) -> None:
        """Makes blocks unfindable; referenced ones stay with their sequences."""
        for block in blocks:
            if (contents := self._contents[block]) is None:
                continue
            self._contents[block] = None
            del self._known[contents.key]
            if block in self._cached:
                del self._cached[block]
                self._free.append(block)

    def evict_bundle(self, digest: str) -> None:
        """Makes all blocks unfindable that were computed with a bundle's experts."""
        known = [(block, self.contents(block)) for block in self._known.values()]
        self.invalidate([block for block, contents in known if digest in contents.bundles])

    def evict_all(self) -> None:
        """Makes all blocks unfindable."""
        self.invalidate(list(self._known.values()))

    def _evict(self) -> int:
        block, _ = self._cached.popitem(last=False)
        contents = self.contents(block)
        self._contents[block] = None
        del self._known[contents.key]
        return block
