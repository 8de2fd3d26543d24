"""Corpora on disk: pictures, records and facts, the same bytes however they are made."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydicom import dcmread

from echovlm_ray.checkpoint.layout import InvalidCheckpointError
from echovlm_ray.data.phantom.catalogue import all_classes, select_classes
from echovlm_ray.data.phantom.corpus import Corpus, png_bytes, sample, write_corpus
from echovlm_ray.data.phantom.dicom_file import dicom_bytes
from echovlm_ray.data.phantom.parsing import parse, parse_diagnosis
from echovlm_ray.data.phantom.phantom import NOTICE, attributes_at, cine_frames, phantom
from echovlm_ray.data.phantom.schema import ORGANS, Organ
from echovlm_ray.data.phantom.settings import Settings
from echovlm_ray.prompts import FURTHER, SYSTEM
from echovlm_ray.tasks import TASKS, phantom_tasks
from echovlm_ray.vision.images import ImageLimits, decode_image_file

LIMITS = ImageLimits(max_image_bytes=10**8, max_image_pixels=10**8, max_frames=16)


def content_of(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def records_in(directory: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((directory / "records.json").read_text())
    return found


def test_the_bytes_do_not_depend_on_processes(tmp_path: Path) -> None:
    corpus = Corpus(seed=1, indices=range(5, 9), classes=all_classes(), tasks=phantom_tasks())
    write_corpus(tmp_path / "one", corpus)
    write_corpus(tmp_path / "two", corpus, workers=2)
    assert content_of(tmp_path / "one") == content_of(tmp_path / "two")


def test_a_larger_corpus_begins_with_the_smaller_one(tmp_path: Path) -> None:
    for name, count in (("few", 3), ("more", 5)):
        write_corpus(tmp_path / name, Corpus(seed=1, indices=range(count), classes=all_classes()))
    few, more = content_of(tmp_path / "few"), content_of(tmp_path / "more")
    assert all(more[name] == content for name, content in few.items() if name.startswith("images/"))
    assert records_in(tmp_path / "more")[:6] == records_in(tmp_path / "few")


def test_records_have_the_published_form_and_true_answers(tmp_path: Path) -> None:
    corpus = Corpus(seed=2, indices=range(43), classes=all_classes(), tasks=phantom_tasks())
    counts = write_corpus(tmp_path / "corpus", corpus)
    assert counts == {f"{organ}/{name}": 1 for organ, name in all_classes()}
    found = records_in(tmp_path / "corpus")
    # Five tasks with one answer and two questions, in two languages.
    assert len(found) == 43 * 7 * 2
    assert len({record["id"] for record in found}) == len(found)
    for record in found:
        system, human, answer = record["conversations"]
        assert [turn["from"] for turn in record["conversations"]] == ["system", "human", "gpt"]
        language, task = record["language"], record["task"]
        assert system["value"] == SYSTEM[language]
        assert human["value"].startswith("<image>")
        assert human["value"].count("<image>") == len(record["image"]) == 1
        assert (tmp_path / "corpus" / record["image"][0]).is_file()
        assert record["notice"] == NOTICE
        truth = record["attributes"]
        if task in ("report", "findings"):
            read = parse(answer["value"], language)
            assert (read.organ, read.values) == (truth["organ"], truth["values"])
        if task in ("report", "impression", "diagnosis", "caption"):
            assert parse_diagnosis(answer["value"], language, truth["organ"]) == truth["class"]
        if task != "vqa":
            assert human["value"].startswith(f"<image>{TASKS[task].instructions[language]}")
        if task == "report":
            assert len({*record["references"], answer["value"]}) == 3
        if task == "diagnosis":
            assert record["answer"] in record["options"]
            assert len(record["options"]) >= 5
            assert all(option in human["value"].split(FURTHER[language])[1] for option in record["options"])


def test_options_come_in_different_orders(tmp_path: Path) -> None:
    corpus = Corpus(seed=2, indices=range(6), classes=(("breast", "normal"),), tasks=("diagnosis",), languages=("en",))
    write_corpus(tmp_path / "corpus", corpus)
    assert len({tuple(record["options"]) for record in records_in(tmp_path / "corpus")}) > 1


def test_a_class_can_be_held_back() -> None:
    left = select_classes(exclude=["breast/simple_cyst"])
    assert set(all_classes()) - set(left) == {("breast", "simple_cyst")}
    shown = {(found.organ, found.class_name) for found in (attributes_at(0, index, left) for index in range(200))}
    assert shown == set(left)
    assert ("kidney", "simple_cyst") in left
    assert select_classes(organs=["breast"], classes=["simple_cyst"]) == (("breast", "simple_cyst"),)
    assert len(select_classes(classes=["simple_cyst"])) == 3


@pytest.mark.parametrize(
    ("organs", "classes", "exclude", "message"),
    [
        (["spleen"], [], [], "there is no organ 'spleen'; there are breast, gynaecology"),
        ([], ["breast/cyst"], [], "there is no class 'breast/cyst'; write one like breast/simple_cyst"),
        ([], [], ["typo"], "there is no class 'typo'"),
        (["heart"], ["breast/normal"], [], "leave no class"),
    ],
)
def test_what_there_is_not_is_refused(organs: list[str], classes: list[str], exclude: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        select_classes(organs, classes, exclude)


def test_a_folder_in_use_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(InvalidCheckpointError, match="is not empty; give a new folder"):
        write_corpus(tmp_path, Corpus(seed=0, indices=range(1), classes=all_classes()))
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("organ", ORGANS)
def test_a_dicom_file_shows_the_picture_alone(organ: Organ) -> None:
    found = phantom(3, 1, classes=[(organ, "normal")])
    content = dicom_bytes([found.image], organ, 3, 1)
    assert content == dicom_bytes([found.image], organ, 3, 1)
    decoded = decode_image_file(content, limits=LIMITS, field="image")
    assert (decoded.frames[0] == found.image[..., None]).all()
    assert decoded.anatomy_terms
    whole = decode_image_file(
        content, limits=ImageLimits(10**8, 10**8, 16, crop_to_regions=False), field="image"
    ).frames[0]
    assert whole.shape[0] > 224
    assert whole.shape[1] > 224
    dataset = dcmread(io.BytesIO(content))
    assert "phantom" in dataset.SeriesDescription
    assert dataset.ImageComments == NOTICE
    assert not dataset.PatientName
    assert not dataset.PatientID
    assert dataset.SequenceOfUltrasoundRegions[0].PhysicalDeltaX > 0


def test_a_loop_is_a_multi_frame_dicom_file() -> None:
    found = phantom(3, 1, classes=[("heart", "normal")])
    frames = cine_frames(found.attributes, 3, 1, 6)
    decoded = decode_image_file(dicom_bytes(frames, "heart", 3, 1), limits=LIMITS, field="image")
    assert decoded.source_frames == 6
    assert all((one == other[..., None]).all() for one, other in zip(decoded.frames, frames, strict=True))


def test_a_loop_is_a_video_in_its_record(tmp_path: Path) -> None:
    corpus = Corpus(seed=2, indices=range(1), classes=(("heart", "normal"),), file_format="cine", frames=4)
    write_corpus(tmp_path / "corpus", corpus)
    record = records_in(tmp_path / "corpus")[0]
    assert record["video"] == ["images/00000000.dcm"]
    assert record["conversations"][1]["value"].startswith("<video>")


def test_settings_change_pixels_as_they_say() -> None:
    image = phantom(0, 0).image
    assert (Settings().apply(image) == image).all()
    brighter = Settings(gain=1.12).apply(image)
    assert (brighter == np.rint(np.minimum(image * 1.12, 255))).all()
    blurred = Settings(blur=0.6).apply(image)
    assert blurred.std() < image.std()
    assert blurred.mean() == pytest.approx(image.mean(), rel=0.01)
    stored = Settings(jpeg_quality=80).apply(image)
    assert 0 < np.abs(stored.astype(int) - image).mean() < 10
    with pytest.raises(ValueError, match="gian"):
        Settings.model_validate({"gian": 2})


def test_a_png_says_that_it_is_synthetic() -> None:
    assert Image.open(io.BytesIO(png_bytes(phantom(0, 0).image))).info["Description"] == NOTICE


def test_a_sample_has_all_classes() -> None:
    corpus = Corpus(seed=0, indices=range(130), classes=all_classes())
    rows = sample(corpus, 2)
    assert [name for name, _ in rows] == [f"{organ}/{name}" for organ, name in all_classes()]
    assert all(len(indices) == 2 for _, indices in rows)
