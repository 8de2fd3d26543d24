from pathlib import Path
from typing import Any

import pytest

from echovlm_ray.checkpoint.groups import clone_groups, partition_groups, read_groups
from echovlm_ray.checkpoint.layout import InvalidCheckpointError


def test_clone_gives_every_organ_everything_in_order() -> None:
    assert list(clone_groups(["liver", "breast"], 2).items()) == [("liver", (0, 1)), ("breast", (0, 1))]


@pytest.mark.parametrize(
    ("organs", "reason"),
    [
        ([], "no organs"),
        (["breast", "liver", "breast"], "organ breast is named twice"),
        (["Breast"], "'Breast' must be lower-case"),
        (["../breast"], "must be lower-case"),
    ],
)
def test_clone_refusals(organs: list[str], reason: str) -> None:
    with pytest.raises(InvalidCheckpointError, match=reason):
        clone_groups(organs, 4)


def test_partition_keeps_the_files_order_and_sorts_experts() -> None:
    groups = partition_groups({"liver": [3, 0], "breast": [1, 2]}, 4)
    assert list(groups.items()) == [("liver", (0, 3)), ("breast", (1, 2))]


@pytest.mark.parametrize(
    ("groups", "reason"),
    [
        ({}, "names no organ"),
        ({"a": [0, 1], "b": [1, 2, 3]}, "expert 1 is in the groups a and b"),
        ({"a": [0, 0, 1], "b": [2, 3]}, "group a names expert 0 twice"),
        ({"a": [0], "b": [2]}, "no group has expert 1, 3"),
        ({"a": [0, 1, 2, 3], "b": []}, "group b is empty"),
        ({"a": [0, 1, 2, 4]}, "group a names expert 4, but the checkpoint has experts 0 to 3"),
        ({"a": [-1, 0, 1, 2, 3]}, "names expert -1"),
        ({"a": "0123"}, "must be a list"),
        ({"a": 3}, "must be a list"),
        ({"a": [0, 1, True, 3]}, "must be a list of expert indices"),
        ({"a": [0.0, 1, 2, 3]}, "must be a list of expert indices"),
        ({"A": [0, 1, 2, 3]}, "must be lower-case"),
        ({3: [0, 1, 2, 3]}, "must be lower-case"),
    ],
)
def test_partition_refusals(groups: dict[str, Any], reason: str) -> None:
    with pytest.raises(InvalidCheckpointError, match=reason):
        partition_groups(groups, 4)


@pytest.mark.parametrize("content", ["liver: [0, 1]\nbreast:\n  - 2\n  - 3\n", '{"liver": [0, 1], "breast": [2, 3]}'])
def test_groups_files_are_yaml_or_json(tmp_path: Path, content: str) -> None:
    path = tmp_path / "groups"
    path.write_text(content)
    assert list(read_groups(path).items()) == [("liver", [0, 1]), ("breast", [2, 3])]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("liver: [0]\nliver: [1]\n", "liver occurs twice"),
        ("- liver\n", "must map organs"),
        ("", "must map organs"),
        ("liver: [0", "not YAML or JSON"),
        ("liver: !!python/object/apply:os.getpid []\n", "not YAML or JSON"),
        ("liver: " + "[" * 5000, "nested too deeply"),
        ("---\nliver: [0]\n---\n", "another document"),
    ],
)
def test_groups_files_that_are_none(tmp_path: Path, content: str, reason: str) -> None:
    path = tmp_path / "groups.yaml"
    path.write_text(content)
    with pytest.raises(InvalidCheckpointError, match=reason):
        read_groups(path)


def test_a_list_is_no_organ(tmp_path: Path) -> None:
    path = tmp_path / "groups.yaml"
    path.write_text("? [a]\n: [0]\n")
    with pytest.raises(InvalidCheckpointError, match="must be lower-case letters"):
        partition_groups(read_groups(path), 1)


def test_groups_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InvalidCheckpointError, match="No such file"):
        read_groups(tmp_path / "none.yaml")
