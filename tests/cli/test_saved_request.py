"""The file of a request: round trip, and refusal of other files."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from echovlm_ray.cli.saved_request import (
    SavedRequest,
    SavedRequestError,
    check_place,
    first_difference,
    read_request,
    saved_request,
    write_request,
)
from echovlm_ray.client import OrganShare, Provenance, Summary
from echovlm_ray.client.request import GenerateOptions, Image

OPTIONS: GenerateOptions = {
    "task": "report",
    "language": "en",
    "prompt": "Left side, \u2028 really?",
    "organs": ["breast"],
    "temperature": 0.5,
    "top_k": 3,
    "top_p": 0.9,
    "repetition_penalty": 1.1,
    "seed": 2**64 - 1,
    "max_new_tokens": None,
    "stop": ["END"],
}
ORGAN = OrganShare("breast", "1.1.0", "d" * 64, 1.0)
PROVENANCE = Provenance("e" * 64, "b" * 64, "caller", (ORGAN,))
SUMMARY = Summary("request-1", "stop", 9, 3, PROVENANCE, (), token_ids=(5, 6, 7), prompt_digest="a" * 64)


@pytest.fixture
def record(tmp_path: Path) -> Path:
    """A record whose first image lies beside it, and whose second one is in it."""
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "scan.png").write_bytes(b"a picture")
    path = tmp_path / "request.json"
    images: list[Image] = [str(tmp_path / "images" / "scan.png"), b"another"]
    write_request(path, saved_request(OPTIONS, images, [b"a picture", b"another"], SUMMARY, tmp_path))
    return path


def changed(path: Path, **fields: Any) -> Path:
    """The record with other fields; a name with __ is one of an inner object."""
    content = json.loads(path.read_text())
    for name, value in fields.items():
        inner = content
        *outer, last = name.split("__")
        for part in outer:
            inner = inner[int(part)] if isinstance(inner, list) else inner[part]
        inner[last] = value
    path.write_text(json.dumps(content))
    return path


def test_what_is_written_reads_back(record: Path) -> None:
    request, contents = read_request(record)
    assert contents == [b"a picture", b"another"]
    assert [image.path for image in request.images] == ["images/scan.png", None]
    options = request.options()
    for name in ("task", "language", "prompt", "temperature", "top_k", "top_p", "repetition_penalty", "seed"):
        assert options[name] == OPTIONS[name]
    assert (options["organs"], options["stop"]) == (("breast",), ("END",))
    # The server's default may be another one tomorrow.
    assert options["max_new_tokens"] == 3
    assert (options["expert_set_id"], options["prompt_digest"], options["for_replay"]) == ("e" * 64, "a" * 64, True)
    assert request.answer.token_ids == (5, 6, 7)


def test_the_file_is_its_owners_alone_and_is_never_replaced(record: Path) -> None:
    assert record.stat().st_mode & 0o777 == 0o600
    before = record.read_bytes()
    request, _ = read_request(record)
    with pytest.raises(SavedRequestError, match="not replaced"):
        check_place(record)
    with pytest.raises(FileExistsError):
        write_request(record, request)
    assert record.read_bytes() == before
    assert sorted(path.name for path in record.parent.iterdir()) == ["images", "request.json"]
    with pytest.raises(SavedRequestError, match="no folder"):
        check_place(record.parent / "missing" / "request.json")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is empty"),
        (b" \n", "is empty"),
        (b"[]", "no saved request"),
        (b"null", "no saved request"),
        (b"\xff\xfe\x00", "no saved request"),
        (b"[" * 100_000, "no saved request"),
        (b'{"format": "echoray-request"}', "no saved request, task"),
    ],
)
def test_what_is_no_record_is_refused(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "request.json"
    path.write_bytes(content)
    with pytest.raises(SavedRequestError, match=reason):
        read_request(path)


def test_every_truncation_is_refused(record: Path) -> None:
    content = record.read_bytes().rstrip()
    for end in range(0, len(content), 37):
        record.write_bytes(content[:end])
        with pytest.raises(SavedRequestError):
            read_request(record)


@pytest.mark.parametrize(
    "fields",
    [
        {"version": 2},
        {"format": "other"},
        {"task": "surgery"},
        {"prompt": 5},
        {"prompt": None},
        {"unknown": 1},
        {"organs": "breast"},
        {"max_new_tokens": 0},
        {"max_new_tokens": "24"},
        {"sampling__seed": -1},
        {"sampling__seed": 2**64},
        {"sampling__seed": None},
        {"sampling__temperature": -0.5},
        {"answer__expert_set_id": "e" * 63},
        {"answer__expert_set_id": "../" * 21 + "e"},
        {"answer__token_ids": []},
        {"answer__token_ids": [-1]},
        {"answer__token_ids": ["5"]},
        {"answer__prompt_digest": "A" * 64},
        {"images__0__sha256": "0"},
        {"images__0__path": None},
        {"images__1__content": "no base64!"},
        {"images__1__path": "images/scan.png"},
    ],
    ids=str,
)
def test_a_field_of_the_wrong_kind_is_named_and_not_quoted(record: Path, fields: dict[str, Any]) -> None:
    with pytest.raises(SavedRequestError) as caught:
        read_request(changed(record, **fields))
    assert next(iter(fields)).split("__")[0] in str(caught.value)
    assert "Left side" not in str(caught.value)


@pytest.mark.parametrize(
    "path", ["/etc/hostname", "../request.json", "images/../../x", "images/link", "images", "\0", "x" * 4000]
)
def test_no_image_is_read_from_elsewhere(record: Path, path: str) -> None:
    outside = record.parent.parent / "outside.png"
    outside.write_bytes(b"a picture")
    (record.parent / "images" / "link").symlink_to(outside)
    with pytest.raises(SavedRequestError):
        read_request(changed(record, images__0__path=path))


def test_an_image_that_is_another_one_or_gone_is_refused(record: Path) -> None:
    image = record.parent / "images" / "scan.png"
    image.write_bytes(b"A picture")
    with pytest.raises(SavedRequestError, match=r"images\[0\] is not the image that was sent"):
        read_request(record)
    image.unlink()
    with pytest.raises(SavedRequestError, match="cannot be read"):
        read_request(record)


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path in (pipe, tmp_path, tmp_path / "missing"):
        with pytest.raises(SavedRequestError):
            read_request(path)


def test_a_file_of_any_size_costs_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "huge.json"
    with path.open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(SavedRequestError, match="at most"):
        read_request(path)


def test_chance_without_a_seed_is_no_record(record: Path) -> None:
    content = json.loads(record.read_text())
    del content["sampling"]["seed"]
    with pytest.raises(ValueError, match="cannot come again"):
        SavedRequest.model_validate_json(json.dumps(content))


@pytest.mark.parametrize(
    ("expected", "found", "place"),
    [((1, 2), (1, 2), None), ((1, 2), (1, 3), 1), ((1, 2), (1,), 1), ((1,), (1, 2), 1), ((1,), (), 0)],
)
def test_the_first_difference(expected: tuple[int, ...], found: tuple[int, ...], place: int | None) -> None:
    assert first_difference(expected, found) == place
