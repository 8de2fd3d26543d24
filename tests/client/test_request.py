import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from echovlm_ray.client import InvalidRequestError
from echovlm_ray.client.request import LANGUAGES, TASKS, build_request
from protos import echovlm_pb2


def test_an_image_may_be_a_path_a_string_or_bytes(tmp_path: Path) -> None:
    path = tmp_path / "scan.png"
    path.write_bytes(b"a picture")
    request = build_request([path, str(path), b"another"])
    assert [image.content for image in request.images] == [b"a picture", b"a picture", b"another"]


@pytest.mark.parametrize("kind", [str, Path, lambda path: Path(path).read_bytes()])
def test_one_image_needs_no_list(tmp_path: Path, kind: type) -> None:
    path = tmp_path / "scan.png"
    path.write_bytes(b"a picture")
    request = build_request(kind(str(path)))
    assert [image.content for image in request.images] == [b"a picture"]


def test_every_option_reaches_its_field() -> None:
    request = build_request(
        b"x",
        task="vqa",
        language="zh",
        prompt="Is there a nodule?",
        organs=["thyroid", "liver"],
        temperature=0.5,
        top_k=7,
        top_p=0.25,
        repetition_penalty=1.5,
        seed=2**64 - 1,
        max_new_tokens=12,
        stop=["。", "\n\n"],
        session_key="visit-1",
    )
    assert request.task == echovlm_pb2.TASK_VQA
    assert request.language == echovlm_pb2.LANGUAGE_CHINESE
    assert request.prompt == "Is there a nodule?"
    assert list(request.organs) == ["thyroid", "liver"]
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.repetition_penalty) == (0.5, 7, 0.25, 1.5)
    assert sampling.seed == 2**64 - 1
    assert request.max_new_tokens == 12
    assert list(request.stop) == ["。", "\n\n"]
    assert request.session_key == "visit-1"


def test_left_out_options_are_left_to_the_server() -> None:
    request = build_request(b"x")
    assert request.task == echovlm_pb2.TASK_REPORT
    assert request.language == echovlm_pb2.LANGUAGE_ENGLISH
    assert request.max_new_tokens == 0
    assert not request.sampling.HasField("seed")
    assert not request.organs
    assert not request.stop
    assert request.session_key == ""


def test_seed_zero_is_a_seed() -> None:
    assert build_request(b"x", seed=0).sampling.HasField("seed")


def test_a_lone_organ_is_not_taken_letter_by_letter() -> None:
    request = build_request(b"x", organs="heart", stop="END")
    assert list(request.organs) == ["heart"]
    assert list(request.stop) == ["END"]


def test_every_task_and_language_of_the_contract_can_be_asked_for() -> None:
    assert sorted(TASKS.values()) == sorted(echovlm_pb2.Task.values())
    named = set(echovlm_pb2.Language.values()) - {echovlm_pb2.LANGUAGE_UNSPECIFIED}
    assert set(LANGUAGES.values()) == named


@pytest.mark.parametrize(
    ("options", "field", "text"),
    [
        ({"task": "poem"}, "task", "report, findings"),
        ({"language": "de"}, "language", "en, zh"),
        ({"task": "vqa"}, "prompt", "give a prompt"),
        ({"task": "free", "prompt": "  "}, "prompt", "give a prompt"),
        ({"top_k": -1}, "top_k", "-1"),
        ({"max_new_tokens": 0}, "max_new_tokens", "at least one"),
        ({"max_new_tokens": 2**32}, "max_new_tokens", str(2**32)),
        ({"seed": -1}, "sampling.seed", "-1"),
        ({"seed": 2**64}, "sampling.seed", str(2**64)),
    ],
)
def test_what_cannot_be_sent_is_refused_with_the_field(options: dict[str, Any], field: str, text: str) -> None:
    with pytest.raises(InvalidRequestError, match=field) as caught:
        build_request(b"x", **options)
    assert [violation.field for violation in caught.value.violations] == [field]
    assert text in caught.value.violations[0].description
    assert isinstance(caught.value, ValueError)
    assert caught.value.code is None


def test_an_unknown_option_is_an_error() -> None:
    with pytest.raises(TypeError, match="temprature"):
        build_request(b"x", temprature=1.0)  # type: ignore[call-arg]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match=r"images\[1\].content: there is no file .*gone\.dcm"):
        build_request([b"x", tmp_path / "gone.dcm"])


def test_an_empty_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "empty.png"
    path.touch()
    with pytest.raises(InvalidRequestError, match=r"images\[0\].content: .*empty\.png is empty"):
        build_request(path)
    with pytest.raises(InvalidRequestError, match="is empty"):
        build_request([b""])


def test_a_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="is a folder"):
        build_request(tmp_path)


def test_an_image_of_another_type_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="is a int"):
        build_request([3])  # type: ignore[list-item]


def test_a_request_that_protobuf_cannot_hold_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "huge.dcm"
    with path.open("wb") as file:
        os.truncate(file.fileno(), 2**31)
    with pytest.raises(InvalidRequestError, match="one request holds at most"):
        build_request(path)


@given(contents=st.lists(st.binary(min_size=1, max_size=64), max_size=5), prompt=st.text(max_size=40))
def test_content_and_prompt_arrive_as_they_are(contents: list[bytes], prompt: str) -> None:
    request = echovlm_pb2.GenerateRequest.FromString(build_request(contents, prompt=prompt).SerializeToString())
    assert [image.content for image in request.images] == contents
    assert request.prompt == prompt
