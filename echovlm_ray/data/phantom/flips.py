"""Mirrored pictures: the picture, its labels and its words together."""

from dataclasses import replace

import numpy as np

from echovlm_ray.data.phantom.attributes import Attributes
from echovlm_ray.data.phantom.phantom import Phantom
from echovlm_ray.data.phantom.regions import REGIONS
from echovlm_ray.data.phantom.schema import SIDE

_OTHER_SIDE = {"left": "right", "right": "left"}


class NotMirroredError(ValueError):
    """A region of which a mirrored picture is not a valid one."""


def flip(phantom: Phantom) -> Phantom:
    """The mirrored phantom; a body marker then shows the other side, so the attributes do.

    Raises:
        NotMirroredError: the region has an orientation by convention (heart, liver); see `Region.mirrors`.
    """
    return Phantom(
        np.ascontiguousarray(phantom.image[:, ::-1]),
        flip_attributes(phantom.attributes),
        np.ascontiguousarray(phantom.label_map[:, ::-1]),
    )


def flip_attributes(attributes: Attributes) -> Attributes:
    """What the mirrored picture shows.

    Raises:
        NotMirroredError: see `flip`.
    """
    if attributes.organ is None or not REGIONS[attributes.organ].mirrors:
        raise NotMirroredError(
            f"a picture of {attributes.organ} cannot be mirrored: its orientation is fixed by convention; "
            "ask `REGIONS[organ].mirrors` first"
        )
    pairs = tuple((name, _OTHER_SIDE[value] if name == SIDE else value) for name, value in attributes.pairs)
    return replace(attributes, pairs=pairs)
