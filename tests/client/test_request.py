import io
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from echovlm_ray.client import AsyncEchoVLMClient, EchoVLMClient, InvalidRequestError
from echovlm_ray.client.arguments import MAX_TIMEOUT_S, timeout
from echovlm_ray.client.control import ExpertControlClient
from echovlm_ray.client.request import build_request
from echovlm_ray.tasks import LANGUAGES, TASKS
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
    assert sorted(task.value for task in TASKS.values()) == sorted(echovlm_pb2.Task.values())
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


HALF = "liver \ud83d"


@pytest.mark.parametrize(
    ("options", "field", "text"),
    [
        ({"prompt": HALF}, "prompt", "half a character"),
        ({"stop": ["a", HALF]}, "stop[1]", "half a character"),
        ({"organs": [HALF]}, "organs[0]", "half a character"),
        ({"session_key": HALF}, "session_key", "half a character"),
        ({"task": HALF}, "task", "half a character"),
        ({"language": HALF}, "language", "half a character"),
        ({"prompt": None}, "prompt", "NoneType"),
        ({"prompt": b"bytes"}, "prompt", "bytes"),
        ({"task": ["report"]}, "task", "list"),
        ({"language": None}, "language", "NoneType"),
        ({"stop": None}, "stop", "NoneType"),
        ({"stop": b"END"}, "stop", "bytes"),
        ({"stop": 3}, "stop", "int"),
        ({"organs": [1]}, "organs[0]", "int"),
        ({"organs": [None]}, "organs[0]", "NoneType"),
        ({"session_key": 7}, "session_key", "int"),
        ({"temperature": "0.5"}, "sampling.temperature", "str"),
        ({"temperature": None}, "sampling.temperature", "NoneType"),
        ({"temperature": True}, "sampling.temperature", "bool"),
        ({"temperature": math.nan}, "sampling.temperature", "nan"),
        ({"temperature": math.inf}, "sampling.temperature", "inf"),
        ({"temperature": -0.1}, "sampling.temperature", "-0.1"),
        ({"temperature": 1e39}, "sampling.temperature", "1e+39"),
        ({"temperature": 10**400}, "sampling.temperature", "int"),
        ({"temperature": np.zeros(2)}, "sampling.temperature", "ndarray"),
        ({"top_p": 1.01}, "sampling.top_p", "1.01"),
        ({"top_p": math.nan}, "sampling.top_p", "nan"),
        ({"repetition_penalty": -1}, "sampling.repetition_penalty", "-1"),
        ({"top_k": 1.5}, "top_k", "float"),
        ({"top_k": "5"}, "top_k", "str"),
        ({"top_k": None}, "top_k", "NoneType"),
        ({"top_k": False}, "top_k", "bool"),
        ({"seed": "1"}, "sampling.seed", "str"),
        ({"seed": 1.0}, "sampling.seed", "float"),
        ({"seed": True}, "sampling.seed", "bool"),
        ({"max_new_tokens": "12"}, "max_new_tokens", "str"),
        ({"max_new_tokens": math.inf}, "max_new_tokens", "float"),
        ({"max_new_tokens": False}, "max_new_tokens", "bool"),
    ],
)
def test_every_wrong_option_is_named(options: dict[str, Any], field: str, text: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        build_request(b"x", **options)
    assert [violation.field for violation in caught.value.violations] == [field]
    assert text in caught.value.violations[0].description


@pytest.mark.parametrize(
    "image",
    [
        bytearray(b"a picture"),
        memoryview(b"a picture"),
        memoryview(b"a_ _p_i_c_t_u_r_e")[::2],
        io.BytesIO(b"a picture"),
        io.BufferedReader(io.BytesIO(b"a picture")),
    ],
)
def test_bytes_and_open_files_of_every_kind_are_images(image: Any) -> None:
    assert [item.content for item in build_request(image).images] == [b"a picture"]


def test_open_files_and_foreign_paths_are_images(tmp_path: Path) -> None:
    path = tmp_path / "scan.png"
    path.write_bytes(b"a picture")

    class Foreign:
        def __fspath__(self) -> str:
            return str(path)

    with path.open("rb") as file:
        request = build_request([file, Foreign(), memoryview(bytearray(b"abcd")).cast("H")])
    assert [item.content for item in request.images] == [b"a picture", b"a picture", b"abcd"]
    assert [item.content for item in build_request(iter([b"a", b"b"])).images] == [b"a", b"b"]  # type: ignore[arg-type]
    assert not build_request([], task="free", prompt="x").images


@pytest.mark.parametrize(
    ("images", "field", "text"),
    [
        (None, "images", "NoneType"),
        (3, "images", "int"),
        (np.zeros((4, 4, 3), np.uint8), "images", "ndarray"),
        ([None], "images[0].content", "NoneType"),
        ([b"x", np.zeros((4, 4), np.uint8)], "images[1].content", "ndarray"),
        (io.StringIO("text"), "images[0].content", "mode 'rb'"),
        ("a\0b", "images[0].content", "is no path"),
        (bytearray(), "images[0].content", "is empty"),
    ],
)
def test_every_wrong_image_is_named(images: Any, field: str, text: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        build_request(images)
    assert [violation.field for violation in caught.value.violations] == [field]
    assert text in caught.value.violations[0].description


def test_a_file_that_stands_at_its_end_or_is_closed_is_explained() -> None:
    file = io.BytesIO(b"a picture")
    file.read()
    with pytest.raises(InvalidRequestError, match=r"seek\(0\)"):
        build_request(file)
    file.close()
    with pytest.raises(InvalidRequestError, match="cannot be read"):
        build_request(file)


def test_numbers_of_other_libraries_are_numbers() -> None:
    request = build_request(b"x", temperature=np.float32(0.5), top_k=np.int64(3), seed=np.uint64(2**64 - 1))  # type: ignore[arg-type]
    assert (request.sampling.temperature, request.sampling.top_k, request.sampling.seed) == (0.5, 3, 2**64 - 1)


def test_a_tiny_number_does_not_become_not_set() -> None:
    sampling = build_request(b"x", top_p=1e-50, repetition_penalty=1e-300).sampling
    assert sampling.top_p > 0
    assert sampling.repetition_penalty > 0
    assert math.copysign(1, build_request(b"x", temperature=-0.0).sampling.temperature) in (1, -1)


@pytest.mark.parametrize(
    ("value", "right"),
    [(None, None), (math.inf, None), (1e18, MAX_TIMEOUT_S), (10**400, MAX_TIMEOUT_S), (5, 5.0), (np.float32(2), 2.0)],
)
def test_timeouts(value: Any, right: float | None) -> None:
    assert timeout("timeout_s", value) == right


@pytest.mark.parametrize("value", [0, 0.0, -1, math.nan, -math.inf, "5", True, [1.0]])
def test_a_timeout_that_is_none_is_named(value: Any) -> None:
    with pytest.raises(InvalidRequestError, match="timeout_s"):
        timeout("timeout_s", value)
    for client in (EchoVLMClient, ExpertControlClient):
        with pytest.raises(ValueError, match="timeout_s"):
            client(timeout_s=value)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"address": 5}, "address"),
        ({"address": "host\ud83d:1"}, "address"),
        ({"address": ""}, "address"),
        ({"token": b"secret"}, "token"),
        ({"tls": True}, "tls"),
    ],
)
def test_a_wrong_argument_of_a_client_is_named(arguments: dict[str, Any], name: str) -> None:
    for client in (EchoVLMClient, ExpertControlClient):
        with pytest.raises(ValueError, match=name):
            client(**arguments)


@pytest.mark.parametrize("request_id", ["", "a b", 5, "\ud83d", "x" * 129])
def test_a_wrong_request_id_is_named(request_id: Any) -> None:
    with EchoVLMClient() as client, pytest.raises(ValueError, match="request_id"):
        client.model_info(request_id=request_id)


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"organ": HALF}, "organ"),
        ({"organ": None}, "organ"),
        ({"percent": "5"}, "percent"),
        ({"percent": math.nan}, "percent"),
        ({"actor": 1}, "actor"),
        ({"dry_run": "yes"}, "dry_run"),
    ],
)
def test_a_wrong_argument_for_control_is_named(values: dict[str, Any], name: str) -> None:
    with ExpertControlClient("127.0.0.1:9") as control, pytest.raises(InvalidRequestError) as caught:
        control.canary(**{"organ": "heart", "percent": 5.0, "actor": "ann", **values})
    assert [violation.field for violation in caught.value.violations] == [name]


async def test_the_client_for_asyncio_checks_the_same() -> None:
    with pytest.raises(ValueError, match="timeout_s"):
        AsyncEchoVLMClient(timeout_s=0)
    async with AsyncEchoVLMClient("127.0.0.1:9") as client:
        with pytest.raises(InvalidRequestError, match="prompt"):
            await client.generate(b"x", prompt=HALF)
        with pytest.raises(InvalidRequestError, match="timeout_s"):
            client.stream(b"x", timeout_s=math.nan)
