"""What training needs from a data set: a chat that ends in an answer, its pictures, and which words matter most."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from echovlm_ray.data.phantom.attributes import Attributes
from echovlm_ray.model.picture_patches import Picture
from echovlm_ray.prompts import Message


class ExampleError(ValueError):
    """An example cannot be used. The text has its position in the data set and the reason, without quoting its
    contents.
    """


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """One example.

    Attributes:
        messages: the chat; the assistant's turns are the targets, and the last turn is one of them.
        pictures: the images and videos that the messages show, in their order. A video is a sequence of frames.
        emphasis: words whose tokens count more in the loss wherever they stand in an answer, see
            `echovlm_ray.training.recipe.LossSection.emphasis_weight`.
        attributes: what the pictures show, where it is known; see `echovlm_ray.training.finding_heads`.
        tissue: uint8, rows × columns of a picture's parts, numbers of `echovlm_ray.data.phantom.tissue.LABELS`, where
            they are known.
    """

    messages: Sequence[Message]
    pictures: Sequence[Picture | Sequence[Picture]] = ()
    emphasis: Sequence[str] = ()
    attributes: Attributes | None = None
    tissue: npt.NDArray[np.uint8] | None = None


class ExampleSource(Protocol):
    """A data set. Worker processes get a copy of it, so it must be possible to pickle it."""

    def __len__(self) -> int:
        """How many examples an epoch has."""
        ...

    def example(self, index: int, epoch: int) -> Example:
        """One example.

        Args:
            index: from 0.
            epoch: from 0; what is drawn at random may depend on it, and on nothing else that changes.

        Raises:
            ExampleError: it cannot be read.
        """
        ...

    def place(self, index: int) -> str:
        """Where an example is, for errors: for example "train.json, line 17"."""
        ...
