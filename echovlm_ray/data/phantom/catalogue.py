"""Which attribute sets there are, and what is drawn of them."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np

from echovlm_ray.data.phantom.attributes import Attributes
from echovlm_ray.data.phantom.regions import REGIONS
from echovlm_ray.data.phantom.schema import NORMAL, ORGANS, SIDE, Organ, PhantomClass

# Said of a record whose attributes `read_attributes` refuses: its own error may quote the record.
UNKNOWN_ATTRIBUTES = (
    "its attributes are none that a phantom has: take them from `echoray data phantom --list`, or leave them out"
)
SIDES: tuple[str | None, ...] = (None, "left", "right")


class UnknownClassError(ValueError):
    """An organ, a class or a value that the phantoms do not have."""


def all_classes() -> tuple[tuple[Organ, str], ...]:
    """Every class as organ and name, in order."""
    return tuple((organ, phantom_class.name) for organ in ORGANS for phantom_class in REGIONS[organ].classes)


def find_class(organ: str, class_name: str) -> PhantomClass:
    """The class of that name.

    Raises:
        UnknownClassError: there is none; the text lists what there is.
    """
    region = next((region for name, region in REGIONS.items() if name == organ), None)
    if region is None:
        raise UnknownClassError(f"there is no organ {organ!r}; there are {', '.join(ORGANS)}")
    if class_name not in region.class_named:
        raise UnknownClassError(f"{organ} has no class {class_name!r}; it has {', '.join(region.class_named)}")
    return region.class_named[class_name]


def select_classes(
    organs: Sequence[str] = (), classes: Sequence[str] = (), exclude: Sequence[str] = ()
) -> tuple[tuple[Organ, str], ...]:
    """The classes to draw from.

    Args:
        organs: only these; all without.
        classes: only these, as "breast/simple_cyst", or "simple_cyst" for every organ that has it; all without.
        exclude: not these, in the same form.

    Raises:
        UnknownClassError: a name that there is not, or nothing is left.
    """
    for organ in organs:
        find_class(organ, NORMAL)
    wanted = [pair for pair in all_classes() if not organs or pair[0] in organs]
    chosen = [pair for pair in wanted if not classes or any(_means(name, pair) for name in classes)]
    for name in (*classes, *exclude):
        if not any(_means(name, pair) for pair in all_classes()):
            raise UnknownClassError(
                f"there is no class {name!r}; write one like breast/simple_cyst, and see them all with --list"
            )
    left = tuple(pair for pair in chosen if not any(_means(name, pair) for name in exclude))
    if not left:
        raise UnknownClassError("the organs, classes and exclusions together leave no class: drop one of them")
    return left


def _means(name: str, pair: tuple[str, str]) -> bool:
    return name in (pair[1], f"{pair[0]}/{pair[1]}")


def attributes_of(organ: Organ, class_name: str, values: Mapping[str, str]) -> Attributes:
    """Complete attributes of a picture, in the schema's order.

    Args:
        organ: the region.
        class_name: one of its classes.
        values: a value for each attribute of the class; `side` may be left out.

    Raises:
        UnknownClassError: a value is missing, or is not one that the class allows.
    """
    allowed = dict(find_class(organ, class_name).choices)
    if REGIONS[organ].has_side and SIDE in values:
        allowed[SIDE] = ("left", "right")
    if set(values) != set(allowed):
        raise UnknownClassError(f"{organ}/{class_name} needs a value each of {', '.join(allowed)}")
    for name, value in values.items():
        if value not in allowed[name]:
            raise UnknownClassError(
                f"{name} of {organ}/{class_name} is one of {', '.join(allowed[name])}, not {value!r}"
            )
    order = REGIONS[organ].attribute
    return Attributes(organ, class_name, tuple((name, values[name]) for name in order if name in values))


def read_attributes(raw: Mapping[str, Any]) -> Attributes:
    """The attributes of a record, as `Attributes.as_json` writes them, checked against what phantoms can show.

    Raises:
        UnknownClassError: no phantom has these; the text may quote the record.
    """
    organ: Organ | None = next((name for name in ORGANS if name == raw.get("organ")), None)
    class_name, values = raw.get("class"), raw.get("values")
    if organ is None:
        raise UnknownClassError(f"the organ must be one of {', '.join(ORGANS)}")
    if not isinstance(class_name, str) or not isinstance(values, Mapping):
        raise UnknownClassError("they must have a class and values")
    if not all(isinstance(value, str) for value in values.values()):
        raise UnknownClassError("values must be texts")
    return attributes_of(organ, class_name, dict(values))


def attribute_sets(organ: Organ, class_name: str) -> Iterator[Attributes]:
    """Every attribute set of a class, with and without a body marker."""
    options = find_class(organ, class_name).choices
    sides = SIDES if REGIONS[organ].has_side else (None,)
    for side, *picked in product(sides, *options.values()):
        values = {name: value for name, value in zip((SIDE, *options), (side, *picked), strict=True) if value}
        yield attributes_of(organ, class_name, values)


def draw_attributes(rng: np.random.Generator, organ: Organ, class_name: str) -> Attributes:
    """A random attribute set of a class: all values equally likely, a marker in two of three."""
    options = find_class(organ, class_name).choices
    values = {name: names[rng.integers(len(names))] for name, names in options.items()}
    side = SIDES[rng.integers(len(SIDES))]
    if REGIONS[organ].has_side and side is not None:
        values[SIDE] = side
    return attributes_of(organ, class_name, values)
