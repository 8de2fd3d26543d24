"""The report of a check: every kind of fault is found, counted and placed, and nothing is quoted."""

import io
import json
import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydicom.data import get_testdata_file

from echovlm_ray.data import check as check_module
from echovlm_ray.data.check import CheckOptions, CheckReport, check
from echovlm_ray.data.media import ImageRoot
from echovlm_ray.data.record import InvalidDataError
from echovlm_ray.data.splitting import Grouping
from echovlm_ray.model.processing import EchoVLMProcessor
from echovlm_ray.training.examples import ExampleError
from echovlm_ray.training.record_source import RecordSource
from echovlm_ray.vision.images import ImageLimits
from echovlm_ray.vision.scaling import usual_scaling
from tests.data.records import cine, png, record, turns, write_lines
from tests.vision.video_samples import CASES, made

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
    options = CheckOptions(root=lambda file: ImageRoot(folder), limits=LIMITS, scaling=usual_scaling(196), **more)
    return check(list(files), options)


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
    report = check([path], CheckOptions(root=lambda file: ImageRoot(folder), limits=limits, scaling=usual_scaling(196)))
    (finding,) = report.findings
    assert "the limit is 100 pixels" in finding.text


def test_an_ultrasound_still_in_dicom_is_read(folder: Path) -> None:
    (folder / "still.dcm").write_bytes(Path(str(get_testdata_file("examples_palette.dcm"))).read_bytes())
    path = write_lines(folder / "all.jsonl", [record("one", image=["still.dcm"])])
    assert run(folder, path).counts.image_kinds == {"DICOM": 1}


def loop(kind: str) -> bytes:
    """Ten frames as an animation."""
    buffer = io.BytesIO()
    frames = [Image.fromarray(np.full((40, 48, 3), 20 * number, dtype=np.uint8)) for number in range(10)]
    frames[0].save(buffer, kind, save_all=True, append_images=frames[1:])
    return buffer.getvalue()


# Each with the share of the file that is left: cut in the first frame behind which others are whole, and near the end.
CUT = {
    "cine.dcm": (cine(), (0.999, 0.7, 0.3)),
    "compressed.dcm": (Path(str(get_testdata_file("examples_jpeg2k.dcm"))).read_bytes(), (0.99, 0.5)),
    "loop.gif": (loop("GIF"), (0.98, 0.6)),
    "loop.webp": (loop("WEBP"), (0.98, 0.6)),
    "loop.tif": (loop("TIFF"), (0.98, 0.6)),
    "still.png": (png(3, (96, 96)), (0.9, 0.5)),
    "loop.avi": (made("avi", "mpeg4"), (0.99, 0.8)),
    "loop.mkv": (made("matroska", "libx264"), (0.99, 0.8)),
    "loop.ts": (made("mpegts", "libx264"), (0.99, 0.8)),
    "loop.mp4": (made("mp4", "libx264", container_options={"movflags": "frag_keyframe+empty_moov"}), (0.9, 0.6)),
}


@pytest.mark.parametrize("name", CUT)
def test_what_is_cut_off_is_found_and_not_trained_on(tmp_path: Path, name: str) -> None:
    content, shares = CUT[name]
    (tmp_path / name).write_bytes(content)
    whole = write_lines(tmp_path / "whole.jsonl", [record("whole", image=[name])])
    assert run(tmp_path, whole).found == {}
    RecordSource(whole).example(0, 0)
    for share in shares:
        (tmp_path / f"cut-{name}").write_bytes(content[: int(len(content) * share)])
        path = write_lines(tmp_path / "cut.jsonl", [record("cut", image=[f"cut-{name}"])])
        report = run(tmp_path, path)
        assert set(report.found) < {"truncated image", "unreadable image"}, share
        with pytest.raises(ExampleError) as refused:
            RecordSource(path).example(0, 0)
        assert report.findings[0].text in str(refused.value)


def test_a_loop_with_fewer_frames_than_it_says_is_found(tmp_path: Path) -> None:
    for name in ("mfj_nof_bigger.dcm", "cine_one_bad_frame.dcm"):
        (tmp_path / name).write_bytes((CASES / name).read_bytes())
        path = write_lines(tmp_path / "all.jsonl", [record("one", image=[name])])
        assert run(tmp_path, path).found == {"truncated image": 1}


@pytest.mark.parametrize(
    ("size", "found"), [((30000, 1), True), ((1, 240), True), ((201, 1), True), ((200, 1), False), ((4, 600), False)]
)
def test_a_shape_that_cannot_be_scaled_is_found_as_the_processor_refuses_it(
    tmp_path: Path, demo_checkpoint: Path, size: tuple[int, int], found: bool
) -> None:
    (tmp_path / "a.png").write_bytes(png(1, size))
    path = write_lines(tmp_path / "all.jsonl", [record("one")])
    assert run(tmp_path, path).found == ({"too long and narrow": 1} if found else {})
    picture = np.zeros((size[1], size[0], 3), dtype=np.uint8)
    processor = EchoVLMProcessor.from_pretrained(demo_checkpoint)
    with pytest.raises(ValueError, match="crop it") if found else nullcontext():
        processor.image_patches(picture, max_visual_tokens=196)


def test_an_image_that_a_record_has_twice_is_found(folder: Path) -> None:
    (folder / "copy.png").write_bytes(png(1))
    records = [
        record("one", image=["a.png", "b.png", "a.png"], conversations=turns("<image><image><image>Which?", "A.")),
        record("two", image=["a.png", "copy.png"], conversations=turns("<image><image>Which?", "A.")),
    ]
    report = run(folder, write_lines(folder / "all.jsonl", records))
    assert [(finding.kind, finding.line) for finding in report.findings] == [
        ("repeated image", 1),
        ("repeated image", 2),
    ]
    assert report.findings[0].text.startswith("image 3 of 3 is image 1 of 3 again")


def test_kinds_are_those_of_the_content(folder: Path) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (48, 40)).save(buffer, "WEBP")
    (folder / "a.jpg").write_bytes(buffer.getvalue())
    for name, content in (("b.jpg", loop("GIF")), ("c.jpg", made("avi", "mpeg4"))):
        (folder / name).write_bytes(content)
    records = [record(name, image=[f"{name}.jpg"]) for name in "abc"]
    counts = run(folder, write_lines(folder / "all.jsonl", records)).counts
    assert counts.image_kinds == {"WebP": 1, "GIF cine loop": 1, "AVI": 1}


def test_a_file_is_given_once(folder: Path) -> None:
    path = write_lines(folder / "all.jsonl", [record("one")])
    (folder / "link.jsonl").symlink_to(path)
    with pytest.raises(InvalidDataError, match="is given twice"):
        run(folder, path, folder / "link.jsonl")
    with pytest.raises(ExampleError, match="is given twice"):
        RecordSource([path, folder / "link.jsonl"])


def test_a_dataset_without_records_is_no_dataset(folder: Path) -> None:
    for name, content in (("a.json", "[]"), ("b.json", " [\n ] \n"), ("c.jsonl", "\n\n")):
        (folder / name).write_text(content)
        report = run(folder, folder / name)
        assert report.found == {"unreadable file": 1}
        assert "a dataset has at least one record" in report.findings[0].text
