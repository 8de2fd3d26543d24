"""Builds the request message: validates options and reads files."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TypedDict

from echovlm_ray.client.arguments import MAX_FLOAT32, integer, invalid, number, text, texts
from echovlm_ray.client.errors import InvalidRequestError
from echovlm_ray.tasks import LANGUAGES, TASKS, Language, TaskName
from protos import echovlm_pb2, router_pb2

# A path, the bytes of a file, or a binary file object (also `io.BytesIO`), which is read from its position.
Image = str | os.PathLike[str] | bytes | bytearray | memoryview | BinaryIO
WHAT_IMAGES_ARE = "a path, or the bytes or an open file of a DICOM file, a still or a video"
# A protobuf message cannot be longer than 2 GiB.
MAX_REQUEST_BYTES = 2**31 - 64 * 1024
# The ranges of the message's fields; the server has tighter limits.
MAX_UINT32, MAX_UINT64 = 2**32 - 1, 2**64 - 1


class GenerateOptions(TypedDict, total=False):
    """The options of `generate` and `stream` in both clients. All are optional."""

    # "report" (the default), "findings", "impression", "diagnosis", "caption", "vqa" (a question about the images),
    # or "free" (the prompt only).
    task: TaskName
    # The language of the answer: "en" (the default) or "zh".
    language: Language
    # The question of "vqa", the text of "free", or further information for other tasks.
    prompt: str
    # The organs in the images, if known; if empty, they are determined from the images.
    organs: Sequence[str]
    # 0 (the default) is greedy decoding.
    temperature: float
    # 0 keeps all tokens, otherwise the k most likely.
    top_k: int
    # 1 keeps all tokens, otherwise the smallest set of tokens with at least this probability.
    top_p: float
    # 1 has no effect; above 1, tokens that have occurred become less likely.
    repetition_penalty: float
    # The same seed, request and expert set give the same tokens; None is a random seed.
    seed: int | None
    # None is the server's default.
    max_new_tokens: int | None
    # The answer ends before the first of these.
    stop: Sequence[str]
    # During a canary all requests with the same key get the same version of the experts. Use a key per patient's visit
    # that does not identify the patient. If empty, every request is assigned separately.
    session_key: str
    # The id of the expert set to answer with, from an answer's provenance; empty for the live one.
    expert_set_id: str
    # Whether the summary has the answer's tokens and the prompt's digest, for comparing a replay.
    for_replay: bool
    # The prompt's digest of an earlier answer: the request is refused if its prompt differs now.
    prompt_digest: str


def build_request(
    images: Image | Sequence[Image] = (),
    *,
    task: TaskName = "report",
    language: Language = "en",
    prompt: str = "",
    organs: Sequence[str] = (),
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    seed: int | None = None,
    max_new_tokens: int | None = None,
    stop: Sequence[str] = (),
    session_key: str = "",
    expert_set_id: str = "",
    for_replay: bool = False,
    prompt_digest: str = "",
) -> echovlm_pb2.GenerateRequest:
    """Builds the message of one request; `options` are those of `GenerateOptions`.

    Raises:
        InvalidRequestError: an argument is of the wrong type, out of range or cannot be sent, or a file is unreadable,
            empty, or makes the request too long. The text names the argument. The server checks the rest.
    """
    if text("task", task) not in TASKS:
        raise invalid("task", f"is {task!r}; it must be one of {', '.join(TASKS)}")
    if text("language", language) not in LANGUAGES:
        raise invalid("language", f"is {language!r}; it must be one of {', '.join(LANGUAGES)}")
    if not text("prompt", prompt).strip() and TASKS[task].needs_prompt:
        raise invalid("prompt", f"is empty, and the task {task!r} asks nothing without it: give a prompt")
    if max_new_tokens is not None and integer("max_new_tokens", max_new_tokens, 0, MAX_UINT32) == 0:
        raise invalid("max_new_tokens", "is 0; ask for at least one token, or leave it out for the server's default")
    if not isinstance(for_replay, bool):
        raise invalid("for_replay", f"is a {type(for_replay).__name__}; give True or False")
    sampling = router_pb2.Sampling(
        temperature=number("sampling.temperature", temperature, 0, MAX_FLOAT32),
        top_k=integer("top_k", top_k, 0, MAX_UINT32),
        top_p=number("sampling.top_p", top_p, 0, 1),
        repetition_penalty=number("sampling.repetition_penalty", repetition_penalty, 0, MAX_FLOAT32),
        seed=None if seed is None else integer("sampling.seed", seed, 0, MAX_UINT64),
    )
    contents = read_images(images)
    return echovlm_pb2.GenerateRequest(
        task=TASKS[task].value,
        language=LANGUAGES[language],
        prompt=prompt,
        images=[echovlm_pb2.ImageFile(content=content) for content in contents],
        organs=texts("organs", organs),
        sampling=sampling,
        max_new_tokens=max_new_tokens or 0,
        stop=texts("stop", stop),
        session_key=text("session_key", session_key),
        expert_set_id=text("expert_set_id", expert_set_id),
        for_replay=for_replay,
        prompt_digest=text("prompt_digest", prompt_digest),
    )


def read_images(images: Image | Sequence[Image]) -> list[bytes]:
    """Reads the content of each image. A single image needs no list.

    Raises:
        InvalidRequestError: an image is of the wrong type, missing, unreadable or empty, or all together are too long.
    """
    given: Any = images
    if isinstance(given, str | os.PathLike | bytes | bytearray | memoryview) or hasattr(given, "read"):
        given = [given]
    if not isinstance(given, Iterable) or hasattr(given, "__array__"):
        raise invalid("images", f"is a {type(given).__name__}; give {WHAT_IMAGES_ARE}, or a list of those")
    contents: list[bytes] = []
    for index, image in enumerate(given):
        contents.append(_content(image, f"images[{index}].content", MAX_REQUEST_BYTES - sum(map(len, contents))))
    return contents


def _content(image: Image, field: str, room: int) -> bytes:
    if isinstance(image, str | os.PathLike):
        content = _read_path(os.fsdecode(image), field, room)
        name = os.fsdecode(image)
    elif isinstance(image, bytes | bytearray | memoryview):
        _check_room(memoryview(image).nbytes, field, room)
        content, name = bytes(image), "the image"
    elif hasattr(image, "read"):
        content, name = _read_open(image, field, room), "the file, from where it stands (seek(0) goes to its start),"
    else:
        raise invalid(field, f"is a {type(image).__name__}; give {WHAT_IMAGES_ARE}")
    if not content:
        raise invalid(field, f"{name} is empty: give a DICOM file, a still or a video")
    return content


def _read_path(path: str, field: str, room: int) -> bytes:
    try:
        if os.path.isdir(path):
            raise invalid(field, f"{path} is a folder: name the files in it")
        with Path(path).open("rb") as file:
            # Before reading, because the file may be larger than the memory.
            _check_room(os.fstat(file.fileno()).st_size, field, room)
            return _read_open(file, field, room)
    except FileNotFoundError:
        raise invalid(field, f"there is no file {path}: check the path") from None
    except OSError as error:
        raise invalid(field, f"{path} cannot be read: {error.strerror}") from error
    except InvalidRequestError:
        raise
    except ValueError:
        raise invalid(field, f"{path!r} is no path: it has a character that no path can have") from None


def _read_open(file: Any, field: str, room: int) -> bytes:
    try:
        content = file.read(room + 1)
    except ValueError as error:
        raise invalid(field, f"the file cannot be read ({error}): open it with mode 'rb'") from None
    if not isinstance(content, bytes | bytearray | memoryview):
        raise invalid(field, f"reading the file gives a {type(content).__name__}, not bytes: open it with mode 'rb'")
    _check_room(memoryview(content).nbytes, field, room)
    return bytes(content)


def _check_room(size: int, field: str, room: int) -> None:
    if size > room:
        raise invalid(
            field, f"brings the request above {MAX_REQUEST_BYTES} bytes, and one request holds at most that: send less"
        )
