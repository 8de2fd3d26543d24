"""The cache's blocks: which are free, which sequences hold the others, and what the free ones still contain.

A full block whose contents have a key may be held by several sequences at once, none of which writes to it. When the
last one lets go of it the contents stay, for a later prompt that begins in the same way, until the room is needed.
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
        self._num_holders = [0] * num_blocks
        self._contents: list[BlockContents | None] = [None] * num_blocks
        self._known: dict[bytes, int] = {}
        # With contents but without a holder; the one that was let go of first is the first to be given away.
        self._kept: OrderedDict[int, None] = OrderedDict()

    @property
    def num_free(self) -> int:
        """Blocks that no sequence holds, those with contents included."""
        return len(self._free) + len(self._kept)

    @property
    def num_kept(self) -> int:
        """Blocks that no sequence holds and whose contents a prompt may still begin with."""
        return len(self._kept)

    @staticmethod
    def blocks_for(num_tokens: int) -> int:
        """How many blocks hold that many tokens."""
        return -(-num_tokens // BLOCK_SIZE)

    def allocate(self, num_blocks: int) -> list[int] | None:
        """That many blocks to write to, or None when there are not enough; the oldest contents give way."""
        if num_blocks > self.num_free:
            return None
        blocks = [self._free.pop() if self._free else self._evict() for _ in range(num_blocks)]
        for block in blocks:
            assert not self._num_holders[block], "a block that is held was given away"
            self._num_holders[block] = 1
        return blocks

    def release(self, blocks: Sequence[int]) -> None:
        """Lets go of a sequence's blocks, given in its order; each must be held by it."""
        # The end of a prefix is worth less than its beginning, without which it is never found.
        for block in reversed(blocks):
            assert self._num_holders[block], "a block was released twice"
            self._num_holders[block] -= 1
            if self._num_holders[block]:
                continue
            if self._contents[block] is None:
                self._free.append(block)
            else:
                self._kept[block] = None

    def find(self, keys: Iterable[bytes]) -> list[int]:
        """The blocks of the longest beginning of `keys` that is known; they are not held yet."""
        found = []
        for key in keys:
            if (block := self._known.get(key)) is None:
                break
            found.append(block)
        return found

    def num_free_without(self, blocks: Iterable[int]) -> int:
        """How many blocks could still be allocated after these were held."""
        return self.num_free - sum(block in self._kept for block in blocks)

    def hold(self, blocks: Iterable[int]) -> None:
        """Holds blocks that `find` found; they are read only."""
        for block in blocks:
            assert self._contents[block] is not None, "a block without contents was shared"
            self._kept.pop(block, None)
            self._num_holders[block] += 1

    def contents(self, block: int) -> BlockContents:
        """What a block that `find` found holds."""
        contents = self._contents[block]
        assert contents is not None, "the block has no contents that are known"
        return contents

    def publish(self, block: int, contents: BlockContents) -> None:
        """Makes a full block that is held findable; where another one has the same contents already, that one stays."""
        assert self._num_holders[block], "a free block was published"
        if self._contents[block] is None and contents.key not in self._known:
            self._contents[block] = contents
            self._known[contents.key] = block

    def forget(self, blocks: Iterable[int]) -> None:
        """Makes blocks unfindable; those that are held stay with their holders."""
        for block in blocks:
            if (contents := self._contents[block]) is None:
                continue
            self._contents[block] = None
            del self._known[contents.key]
            if block in self._kept:
                del self._kept[block]
                self._free.append(block)

    def forget_bundle(self, digest: str) -> None:
        """Makes all blocks unfindable that were computed with a bundle's experts."""
        known = [(block, self.contents(block)) for block in self._known.values()]
        self.forget([block for block, contents in known if digest in contents.bundles])

    def forget_all(self) -> None:
        """Makes all blocks unfindable."""
        self.forget(list(self._known.values()))

    def _evict(self) -> int:
        block, _ = self._kept.popitem(last=False)
        contents = self.contents(block)
        self._contents[block] = None
        del self._known[contents.key]
        return block
