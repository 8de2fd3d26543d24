import json
from pathlib import Path

import pytest

from echovlm_ray.checkpoint.layout import (
    CheckpointIndex,
    InvalidCheckpointError,
    OrganEntry,
    is_split_folder,
    read_index,
    write_index,
)

INDEX = CheckpointIndex(
    name="test",
    version="1.0.0",
    description="",
    backbone_digest="a" * 64,
    routing="organs",
    organs=(
        OrganEntry(organ="liver", version="1.0.0", bundle_digest="b" * 64),
        OrganEntry(organ="breast", version="1.0.0", bundle_digest="c" * 64),
    ),
)


def test_index_survives_the_disk_and_keeps_the_set_order(tmp_path: Path) -> None:
    assert not is_split_folder(tmp_path)
    write_index(tmp_path, INDEX)
    assert is_split_folder(tmp_path)
    assert read_index(tmp_path) == INDEX
    expert_set = read_index(tmp_path).expert_set()
    assert expert_set.organs == ("liver", "breast")
    assert expert_set.bundle_digest("breast") == "c" * 64
    assert (expert_set.backbone_digest, expert_set.routing) == ("a" * 64, "organs")


def test_entry_names_the_organs_that_there_are() -> None:
    assert INDEX.entry("liver").bundle_digest == "b" * 64
    with pytest.raises(InvalidCheckpointError, match=r"no organ 'heart'; it has liver, breast"):
        INDEX.entry("heart")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"format": "echovlm-split/2"}, "format"),
        ({"backbone_digest": "xyz"}, "backbone_digest"),
        ({"routing": "both"}, "routing"),
        ({"organs": []}, "at least one organ"),
        ({"surprise": 1}, "surprise"),
        ({"organs": [{"organ": "../x", "version": "1.0.0", "bundle_digest": "b" * 64}]}, "organs.0.organ"),
        ({"organs": [{"organ": "liver", "version": "1.0.0", "bundle_digest": "b" * 64}] * 2}, "liver occurs twice"),
    ],
)
def test_invalid_index_names_the_field(tmp_path: Path, change: dict[str, object], reason: str) -> None:
    (tmp_path / "echovlm.json").write_text(json.dumps(INDEX.model_dump(mode="json") | change))
    with pytest.raises(InvalidCheckpointError, match=reason):
        read_index(tmp_path)


def test_reading_something_else_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(InvalidCheckpointError, match="is not a folder"):
        read_index(tmp_path / "none")
    with pytest.raises(InvalidCheckpointError, match="that `echoray checkpoint split` or"):
        read_index(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InvalidCheckpointError, match="so split it first"):
        read_index(tmp_path)
    (tmp_path / "echovlm.json").write_text("not json")
    with pytest.raises(InvalidCheckpointError, match="JSON"):
        read_index(tmp_path)
