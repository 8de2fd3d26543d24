"""Records of several files by one number."""

from pathlib import Path

import pytest

from echovlm_ray.data.dataset import RecordDataset
from echovlm_ray.data.record import InvalidDataError
from tests.data.records import record, write_lines


def test_a_broken_record_is_named_by_its_line(tmp_path: Path) -> None:
    records = [record("one"), record("two", image=[])]
    paths = [write_lines(tmp_path / name, records) for name in ("first.jsonl", "all.jsonl")]
    with RecordDataset(paths) as dataset:
        assert len(dataset) == 4
        assert dataset[2].id == dataset[-4].id == "one"
        with pytest.raises(InvalidDataError, match=r"all.jsonl, line 2: marks 1 images"):
            dataset[3]
        with pytest.raises(IndexError):
            dataset[4]
