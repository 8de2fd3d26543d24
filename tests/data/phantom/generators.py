"""Random numbers for tests."""

import numpy as np


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)
