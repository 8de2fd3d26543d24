"""Divides a dataset by patient or by id: the same seed and records give the same sides, in whatever order they come."""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from echovlm_ray.data.draws import hash_draw
from echovlm_ray.data.record import InvalidDataError, Record


@dataclass(frozen=True, slots=True)
class Grouping:
    """What must stay together.

    Attributes:
        by: "patient" or "id".
        pattern: finds the patient in a record's id where it has no field for it; the first group is the patient.
    """

    by: str = "patient"
    pattern: re.Pattern[str] | None = None

    def key(self, record: Record) -> str | None:
        """The patient, or the id; None where the patient is not known."""
        if self.by == "id":
            return record.id
        if record.patient is not None:
            return record.patient
        found = self.pattern.search(record.id) if self.pattern is not None else None
        if found is None:
            return None
        return found.group(1) if found.re.groups else found.group()


def parse_fractions(text: str) -> dict[str, float]:
    """Sides and their parts of a text like `train=0.8,test=0.2`.

    Raises:
        ValueError: it says something else, names a side twice, or the parts do not add up to 1.
    """
    fractions: dict[str, float] = {}
    for entry in text.split(","):
        name, _, value = entry.strip().partition("=")
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name) or not re.fullmatch(r"0?\.\d+|0|1(\.0*)?", value):
            raise ValueError("the fractions must read like train=0.8,validation=0.1,test=0.1")
        if name in fractions:
            raise ValueError(f"the side {name} is named twice: give each a name of its own")
        fractions[name] = float(value)
    if len(fractions) < 2 or min(fractions.values()) <= 0 or abs(sum(fractions.values()) - 1) > 1e-6:
        raise ValueError("give at least two sides, each above 0, that add up to 1: train=0.8,test=0.2")
    return fractions


def split_groups(sizes: Mapping[str, int], fractions: Mapping[str, float], seed: int) -> dict[str, str]:
    """Group → side. Groups are taken in an order drawn from the seed, and each goes where most is missing.

    Args:
        sizes: group → its number of records.
        fractions: side → its part of all records; every side gets at least one group.
        seed: another seed gives another division.

    Raises:
        InvalidDataError: there are fewer groups than sides.
    """
    if len(sizes) < len(fractions):
        raise InvalidDataError(
            f"there are {len(sizes)} groups that must stay together, too few for {len(fractions)} sides: "
            "use fewer sides, or more patients"
        )
    total = sum(sizes.values())
    missing = {side: fraction * total for side, fraction in fractions.items()}
    empty = sorted(fractions, key=lambda side: -fractions[side])
    sides = {}
    ordered = sorted(sizes, key=lambda group: (hash_draw(seed, group), group))
    for position, group in enumerate(ordered):
        # The last groups are kept for the sides that have none yet.
        if len(ordered) - position == len(empty):
            side = empty[0]
        else:
            side = max(missing, key=lambda name: (missing[name], fractions[name], name))
        sides[group] = side
        missing[side] -= sizes[group]
        if side in empty:
            empty.remove(side)
    return sides


def split_records(
    records: Sequence[Record], grouping: Grouping, fractions: Mapping[str, float], seed: int
) -> dict[str, list[int]]:
    """Side → numbers of its records, ascending.

    Raises:
        InvalidDataError: a record's patient is not known, or there are fewer groups than sides.
    """
    groups: dict[str, list[int]] = defaultdict(list)
    unknown = 0
    for index, record in enumerate(records):
        key = grouping.key(record)
        if key is None:
            unknown += 1
        else:
            groups[key].append(index)
    if unknown:
        raise InvalidDataError(
            f"the patient of {unknown} records is not known, so images of one patient could come to both sides: add "
            "the field patient, find it in the ids with --patient-pattern, or accept it with --by id"
        )
    sides = split_groups({group: len(indices) for group, indices in groups.items()}, fractions, seed)
    divided: dict[str, list[int]] = {side: [] for side in fractions}
    for group, indices in groups.items():
        divided[sides[group]].extend(indices)
    return {side: sorted(indices) for side, indices in divided.items()}
