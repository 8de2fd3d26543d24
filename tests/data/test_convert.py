"""There and back between the forms gives the same record."""

import base64
from pathlib import Path
from typing import Any

import pytest

from echovlm_ray.data.convert import FORMS, Form, extract_embedded, to_form
from echovlm_ray.data.media import ImageRoot
from echovlm_ray.data.parse import parse_record
from echovlm_ray.data.record import InvalidDataError, Record
from tests.data.records import cine, png, record, turns


def parsed(raw: object) -> Record:
    found, problems = parse_record(raw)
    assert found is not None
    assert not problems
    return found


RECORDS: list[dict[str, Any]] = [
    record("plain"),
    record("bare", image=[], conversations=turns("What is an artefact?", "A shadow.")),
    record(
        "full",
        image=["a.png", "b.png"],
        conversations=turns("First <image>, then <image>: which?", "The second.", "Why?", "It is larger."),
        organ="liver",
        task="vqa",
        language="en",
        patient="p",
        options=["The second.", "The first."],
        answer="The second.",
        references=["It is the second."],
        attributes={"class": "cyst", "count": 1},
        source="our own",
    ),
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("raw", RECORDS, ids=lambda raw: str(raw["id"]))
def test_there_and_back(raw: dict[str, Any], form: Form) -> None:
    original = parsed(raw)
    assert parsed(to_form(original, form)) == original
    assert to_form(parsed(to_form(original, form)), "published") == to_form(original, "published")


def test_the_published_form_is_kept_to_the_letter() -> None:
    assert to_form(parsed(RECORDS[0]), "published") == RECORDS[0]


def test_ms_swift_s_form() -> None:
    assert to_form(parsed(RECORDS[0]), "swift") == {
        "id": "plain",
        "messages": [
            {"role": "system", "content": "You describe ultrasound."},
            {"role": "user", "content": "<image>What is seen?"},
            {"role": "assistant", "content": "A simple cyst."},
        ],
        "images": ["a.png"],
    }


def test_openai_s_form_has_images_as_parts() -> None:
    user = to_form(parsed(RECORDS[2]), "openai")["messages"][0]
    assert user["content"] == [
        {"type": "text", "text": "First "},
        {"type": "image_url", "image_url": {"url": "a.png"}},
        {"type": "text", "text": ", then "},
        {"type": "image_url", "image_url": {"url": "b.png"}},
        {"type": "text", "text": ": which?"},
    ]


def test_videos_have_no_place_in_openai_s_form() -> None:
    video = parsed(record("v", image=[], video=["c.dcm"], conversations=turns("<video>What?", "A loop.")))
    with pytest.raises(InvalidDataError, match="no place for videos"):
        to_form(video, "openai")
    assert parsed(to_form(video, "swift")) == video


def test_embedded_images_become_files_again(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    embedded = parsed(to_form(parsed(RECORDS[0]), "openai", ImageRoot(tmp_path)))
    assert embedded.images[0].startswith("data:image/png;base64,")
    extracted = extract_embedded(embedded, tmp_path / "out")
    assert (tmp_path / "out" / extracted.images[0]).read_bytes() == png()
    with pytest.raises(InvalidDataError, match="--extract-to"):
        extract_embedded(embedded, None)


@pytest.mark.parametrize(
    "url",
    [
        "data:text/html;base64,AAAA",
        "data:image/png;base64,%%%",
        "data:image/png;base64," + base64.b64encode(b"GIF89a").decode(),
    ],
)
def test_what_is_no_image_is_not_extracted(url: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidDataError, match="embedded image"):
        extract_embedded(parsed(record("x", image=[url])), tmp_path)
    assert not list(tmp_path.iterdir())


def test_dicom_is_not_embedded(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(cine())
    with pytest.raises(InvalidDataError, match="only PNG and JPEG"):
        to_form(parsed(RECORDS[0]), "openai", ImageRoot(tmp_path))
