"""Random numbers as a function of (seed, epoch, index).

A run that is resumed in the middle of an epoch, with another number of workers, has the same draws as without the
interruption.
"""

import hashlib

import numpy as np
import numpy.typing as npt

# Separates the stream of epoch orders from those of records.
_ORDER = 0x6F72646572


def draws_of(seed: int, epoch: int, index: int) -> np.random.Generator:
    """The generator of one record in one epoch; all three are at least 0."""
    return np.random.default_rng(np.random.SeedSequence([seed, epoch, index]))


def epoch_order(count: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """The order in which an epoch takes the records 0 to `count` - 1."""
    generator = np.random.default_rng(np.random.SeedSequence([seed, epoch], spawn_key=(_ORDER,)))
    return generator.permutation(count).astype(np.int64)


def hash_draw(seed: int, key: str) -> int:
    """A 64-bit number for a key, the same on every machine and independent of other keys."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{key}".encode()).digest()[:8], "big")
