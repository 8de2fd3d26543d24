"""The order in which a run uses its examples: a function of the seed.

Each position is computed independently, so a resumed run reads nothing twice, and neither the number of worker
processes nor a global generator affects the order.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from torch.utils.data import Dataset

from echovlm_ray.training.encode import EncodedExample, EncodedSource
from echovlm_ray.training.examples import ExampleError
from echovlm_ray.training.skipped import SkippedExamples, reason_of


@lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, size: int) -> npt.NDArray[np.int64]:
    """The shuffled indices of one epoch."""
    return np.random.default_rng([seed, epoch]).permutation(size)


@dataclass(frozen=True, slots=True)
class UnusableExample:
    """A placeholder in a batch for an unusable example, so that the training process can end with a clear error."""

    reason: str


class ExampleStream(Dataset[EncodedExample | UnusableExample]):
    """A data set for torch's `DataLoader`, read from the first place to the last."""

    def __init__(self, source: EncodedSource, *, seed: int, length: int, skip_unusable: bool = False) -> None:
        """
        Args:
            source: the examples.
            seed: decides the order.
            length: how many places the whole run has; epochs follow one another.
            skip_unusable: replace and log unusable examples by the next one of the source.
        """
        self._source = source
        self._seed = seed
        self._length = length
        self._skip_unusable = skip_unusable
        self._skipped = SkippedExamples()

    def __len__(self) -> int:
        """How many places the whole run has."""
        return self._length

    def __getitem__(self, place: int) -> EncodedExample | UnusableExample:
        """The example of a place, or why it cannot be used.

        Raises:
            IndexError: the run has no such place.
        """
        if not 0 <= place < self._length:
            raise IndexError(f"the run has places 0 to {self._length - 1}")
        size = len(self._source)
        epoch, within = divmod(place, size)
        first = int(epoch_order(self._seed, epoch, size)[within])
        reason = ""
        for ahead in range(size if self._skip_unusable else 1):
            index = (first + ahead) % size
            try:
                return self._source.encoded(index, epoch)
            except ExampleError as error:
                reason = reason_of(error, self._source.place(index))
                if self._skip_unusable:
                    self._skipped.add(index, reason)
        return UnusableExample(reason)
