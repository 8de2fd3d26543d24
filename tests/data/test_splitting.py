"""Splits are by patient, reproducible, and do not depend on the order of the records."""

import random
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from echovlm_ray.data.parse import parse_record
from echovlm_ray.data.record import InvalidDataError, Record
from echovlm_ray.data.splitting import Grouping, parse_fractions, split_groups, split_records
from tests.data.records import record


def parsed(identity: str, **more: Any) -> Record:
    found, problems = parse_record(record(identity, **more))
    assert found is not None
    assert not problems
    return found


@given(
    sizes=st.dictionaries(st.text(min_size=1, max_size=5), st.integers(1, 9), min_size=3, max_size=60),
    seed=st.integers(0, 99),
)
@settings(deadline=None)
def test_each_group_is_on_one_side_and_no_side_is_empty(sizes: dict[str, int], seed: int) -> None:
    fractions = {"train": 0.8, "validation": 0.1, "test": 0.1}
    sides = split_groups(sizes, fractions, seed)
    assert sides.keys() == sizes.keys()
    assert set(sides.values()) == set(fractions)
    shuffled = list(sizes.items())
    random.Random(1).shuffle(shuffled)
    assert split_groups(dict(shuffled), fractions, seed) == sides


def test_the_parts_are_as_large_as_asked() -> None:
    sizes = {f"patient {number}": 1 + number % 4 for number in range(1000)}
    sides = split_groups(sizes, {"train": 0.7, "test": 0.3}, 5)
    test = sum(size for group, size in sizes.items() if sides[group] == "test")
    assert test / sum(sizes.values()) == pytest.approx(0.3, abs=0.002)


def test_another_seed_gives_another_division() -> None:
    sizes = dict.fromkeys(map(str, range(100)), 1)
    divisions = [split_groups(sizes, {"a": 0.5, "b": 0.5}, seed) for seed in (0, 0, 1)]
    assert divisions[0] == divisions[1] != divisions[2]


def test_the_division_is_the_same_on_every_machine() -> None:
    sides = split_groups(dict.fromkeys("abcdefgh", 1), {"train": 0.75, "test": 0.25}, 0)
    assert sorted(group for group, side in sides.items() if side == "test") == ["c", "e"]


def test_patients_stay_together() -> None:
    records = [parsed(f"r{number}", patient=f"p{number % 7}") for number in range(70)]
    divided = split_records(records, Grouping(), {"train": 0.6, "test": 0.4}, 3)
    assert sorted(divided["train"] + divided["test"]) == list(range(70))
    train, test = ({records[index].patient for index in indices} for indices in divided.values())
    assert not train & test


def test_a_record_without_a_patient_is_refused_unless_ids_are_enough() -> None:
    records = [parsed("volunteer01_a", patient=None), parsed("volunteer01_b"), parsed("volunteer02_a")]
    fractions = {"train": 0.5, "test": 0.5}
    with pytest.raises(InvalidDataError, match="the patient of 3 records is not known"):
        split_records(records, Grouping(), fractions, 0)
    by_pattern = split_records(records, Grouping("patient", re.compile(r"^(volunteer\d+)_")), fractions, 0)
    assert sorted(by_pattern.values()) == [[0, 1], [2]]
    assert sorted(map(len, split_records(records, Grouping("id"), fractions, 0).values())) == [1, 2]


def test_too_few_groups_are_refused() -> None:
    with pytest.raises(InvalidDataError, match="too few for 2 sides"):
        split_groups({"only": 5}, {"train": 0.5, "test": 0.5}, 0)


@pytest.mark.parametrize(
    "text", ["", "train", "train=1", "train=0.5,test=0.4", "train=0.5,train=0.5", "train=2,test=-1", "../x=0.5,b=0.5"]
)
def test_fractions_that_make_no_sense_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"train=0|add up to 1|named twice"):
        parse_fractions(text)


def test_fractions() -> None:
    assert parse_fractions("train=0.8, test=.2") == {"train": 0.8, "test": 0.2}
