"""The report of a check: every kind of fault is found, counted and placed, and nothing is quoted."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from pydicom.data import get_testdata_file

from echovlm_ray.data import check as check_module
from echovlm_ray.data.check import CheckOptions, CheckReport, check
from echovlm_ray.data.media import ImageRoot
from echovlm_ray.data.splitting import Grouping
from echovlm_ray.vision.images import ImageLimits
from tests.data.records import cine, png, record, turns, write_lines

LIMITS = ImageLimits(max_image_bytes=10**7, max_image_pixels=10**7, max_frames=8)
PRIVATE = "MUELLER-ANNA-1961"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "a.png").write_bytes(png(1))
    (tmp_path / "b.png").write_bytes(png(2))
    (tmp_path / "cut.png").write_bytes(png(3)[:60])
    (tmp_path / "cine.dcm").write_bytes(cine())
    return tmp_path


def run(folder: Path, *files: Path, **more: Any) -> CheckReport:
    return check(list(files), CheckOptions(root=lambda file: ImageRoot(folder), limits=LIMITS, **more))


def test_a_clean_dataset(folder: Path) -> None:
    records = [
        record("one", organ="breast", patient="p"),
        record("two", image=["a.png", "b.png"], conversations=turns("<image><image>Which?", "超声提示：囊肿。")),
        record("three", image=["cine.dcm"], organ="heart", task="report", patient="q"),
        record("four", image=[], video=["cine.dcm"], conversations=turns("<video>What?", "A loop.")),
    ]
    report = run(folder, write_lines(folder / "all.jsonl", records))
    assert report.found == {}
    counts = report.counts
    assert (counts.records, counts.patients, counts.without_patient) == (4, 2, 2)
    assert counts.organs == {"unknown": 2, "breast": 1, "heart": 1}
    assert counts.tasks == {"free": 3, "report": 1}
    assert counts.languages == {"en": 3, "zh": 1}
    assert (counts.images, counts.videos) == (4, 1)
    assert counts.images_per_record == {"1": 3, "2": 1}
    assert counts.image_kinds == {"PNG": 3, "DICOM cine loop": 2}
    assert counts.answer_characters == {"shortest": 7, "median": 14, "95 %": 14, "longest": 14}


def test_every_fault_is_placed(folder: Path) -> None:
    records = [
        record("one"),
        record("one"),
        record("two", image=["none.png"]),
        record("three", image=["cut.png"]),
        record("four", image=["../a.png"]),
        record("five", image=["a.png", "b.png"]),
        record("six", conversations=turns("<image>What?", "")),
        record("seven", image=[], video=["a.png"], conversations=turns("<video>What?", "A loop.")),
    ]
    path = write_lines(folder / "all.jsonl", records)
    path.write_text(path.read_text() + '{"id": \n')
    report = run(folder, path)
    assert {(finding.kind, finding.line) for finding in report.findings} == {
        ("duplicate id", 2),
        ("missing image", 3),
        ("unreadable image", 4),
        ("outside the root", 5),
        ("marks", 6),
        ("empty answer", 7),
        ("not a video", 8),
        ("broken JSON", 9),
    }
    assert "line 1" in next(finding.text for finding in report.findings if finding.kind == "duplicate id")


def test_patients_and_images_on_both_sides(folder: Path) -> None:
    train = [record("one", patient="p"), record("two", patient="q", image=["b.png"])]
    test = [record("three", patient="p", image=["b.png"]), record("four", patient="r", image=["cine.dcm"])]
    files = write_lines(folder / "train.jsonl", train), write_lines(folder / "test.jsonl", test)
    report = run(folder, *files)
    assert report.found == {"patient on both sides": 1, "image on both sides": 1}
    assert all("train.jsonl" in finding.text and "test.jsonl" in finding.text for finding in report.findings)


def test_patients_found_in_ids(folder: Path) -> None:
    grouping = Grouping("patient", re.compile(r"^(p\d+)_"))
    files = [write_lines(folder / f"{side}.jsonl", [record(f"p1_{side}")]) for side in ("train", "test")]
    assert run(folder, *files, grouping=grouping).found["patient on both sides"] == 1


def test_names_are_shown_only_on_request(folder: Path) -> None:
    path = write_lines(folder / "all.jsonl", [record(PRIVATE, image=[f"{PRIVATE}.png"])])
    assert PRIVATE not in run(folder, path).model_dump_json()
    assert PRIVATE in run(folder, path, show_names=True).model_dump_json()


def test_all_are_counted_and_a_part_is_listed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_module, "LISTED_PER_KIND", 3)
    path = write_lines(folder / "all.jsonl", [record("same") for _ in range(10)])
    report = run(folder, path)
    assert report.found == {"duplicate id": 9}
    assert len(report.findings) == 3


def test_a_file_that_cannot_be_read_is_a_finding(folder: Path) -> None:
    (folder / "empty.json").write_text("")
    (folder / "cut.json").write_text(json.dumps([record("one"), record("two")])[:-30])
    report = run(folder, folder / "empty.json", folder / "cut.json")
    assert report.found == {"unreadable file": 1, "broken JSON": 1}
    assert report.counts.records == 1


def test_a_huge_image_is_refused_before_it_is_decoded(folder: Path) -> None:
    path = write_lines(folder / "all.jsonl", [record("one")])
    limits = ImageLimits(max_image_bytes=10**7, max_image_pixels=100, max_frames=8)
    report = check([path], CheckOptions(root=lambda file: ImageRoot(folder), limits=limits))
    (finding,) = report.findings
    assert "the limit is 100 pixels" in finding.text


def test_an_ultrasound_still_in_dicom_is_read(folder: Path) -> None:
    (folder / "still.dcm").write_bytes(Path(str(get_testdata_file("examples_palette.dcm"))).read_bytes())
    path = write_lines(folder / "all.jsonl", [record("one", image=["still.dcm"])])
    assert run(folder, path).counts.image_kinds == {"DICOM": 1}
