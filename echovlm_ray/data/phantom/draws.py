"""Random numbers of a phantom: a function of seed, index and purpose, and of nothing else."""

import hashlib

import numpy as np


def draws(seed: int, index: int, purpose: str) -> np.random.Generator:
    """The generator for one purpose of one phantom, such as "anatomy" or "speckle".

    What is drawn for one purpose does not shift what is drawn for another, and no phantom depends on how many there
    are, or on which process makes them.

    Args:
        seed: of the corpus, at least 0.
        index: of the phantom, at least 0.
        purpose: any name.
    """
    words = np.frombuffer(hashlib.sha256(purpose.encode()).digest()[:8], dtype=np.uint32)
    return np.random.default_rng(np.random.SeedSequence([seed, index, *(int(word) for word in words)]))
