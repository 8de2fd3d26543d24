"""What is kept back to measure on: whole patients, where records name them, and it says so."""

from pathlib import Path

import pytest

from echovlm_ray.training.examples import ExampleError
from echovlm_ray.training.recipe import DataSection
from echovlm_ray.training.sources import DataFiles, Sources, open_sources
from tests.data.records import record, write_lines


def opened(path: Path, share: float = 0.25, seed: int = 0) -> Sources:
    return open_sources(DataFiles(train=(path,)), DataSection(validation_share=share), seed=seed)


def lines(sources: Sources) -> tuple[set[int], set[int]]:
    """The lines of the file on each side."""
    assert sources.held_out is not None
    train, held_out = (
        {int(source.place(index).rpartition(" ")[2]) for index in range(len(source))}
        for source in (sources.train, sources.held_out)
    )
    return train, held_out


def test_a_patient_is_on_one_side(tmp_path: Path) -> None:
    # Records of a patient are scattered over the file.
    path = write_lines(tmp_path / "all.jsonl", [record(f"r{n}", patient=f"p{n % 8}") for n in range(40)])
    for seed in range(5):
        sources = opened(path, seed=seed)
        train, held_out = lines(sources)
        assert train | held_out == set(range(1, 41))
        assert {line % 8 for line in train}.isdisjoint(line % 8 for line in held_out)
        assert len(held_out) == 10
        assert sources.division == ("10 of 40 records were kept back, divided by patient: no patient is on both sides.")
    assert lines(opened(path, seed=0)) == lines(opened(path, seed=0))
    assert len({frozenset(lines(opened(path, seed=seed))[1]) for seed in range(5)}) > 1


def test_records_without_a_patient_are_divided_by_id_and_that_is_said(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "all.jsonl", [record(f"r{n}") for n in range(20)])
    sources = opened(path)
    assert len(lines(sources)[1]) == 5
    assert sources.division == (
        "5 of 20 records were kept back, divided by id, so images of one patient can be on both sides."
    )
    # An id that reads like a patient is none.
    mixed = [record(f"p{n % 4}-{n}", patient=f"p{n % 4}") for n in range(12)]
    path = write_lines(tmp_path / "mixed.jsonl", [*mixed, *(record(f"p{n}") for n in range(8))])
    sources = opened(path)
    train, held_out = lines(sources)
    assert {(line - 1) % 4 for line in train if line <= 12}.isdisjoint(
        (line - 1) % 4 for line in held_out if line <= 12
    )
    assert "8 records name no patient and were divided by id" in sources.division


def test_too_few_patients_are_refused_whatever_the_number_of_records(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "all.jsonl", [record(f"r{n}", patient="p") for n in range(40)])
    with pytest.raises(ExampleError, match=r"40 records in 1 groups .* too few to keep back a share of 0.25"):
        opened(path)


def test_files_of_their_own_are_said(tmp_path: Path) -> None:
    paths = [write_lines(tmp_path / f"{name}.jsonl", [record(name)]) for name in ("train", "test")]
    sources = open_sources(DataFiles(train=(paths[0],), validation=(paths[1],)), DataSection(), seed=0)
    assert (len(sources.train), sources.division) == (1, "1 records of files of their own were measured on.")
