"""Makes the request message of what a caller wrote: options checked where the client can, files read."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, TypedDict, get_args

from echovlm_ray.client.errors import FieldViolation, InvalidRequestError
from protos import echovlm_pb2, router_pb2

Image = str | os.PathLike[str] | bytes
Task = Literal["report", "findings", "impression", "diagnosis", "caption", "vqa", "free"]
Language = Literal["en", "zh"]

TASKS: dict[str, echovlm_pb2.Task] = {
    "free": echovlm_pb2.TASK_UNSPECIFIED,
    "report": echovlm_pb2.TASK_REPORT,
    "findings": echovlm_pb2.TASK_FINDINGS,
    "impression": echovlm_pb2.TASK_IMPRESSION,
    "diagnosis": echovlm_pb2.TASK_DIAGNOSIS,
    "caption": echovlm_pb2.TASK_CAPTION,
    "vqa": echovlm_pb2.TASK_VQA,
}
LANGUAGES: dict[str, echovlm_pb2.Language] = {
    "en": echovlm_pb2.LANGUAGE_ENGLISH,
    "zh": echovlm_pb2.LANGUAGE_CHINESE,
}
# A protobuf message cannot be longer than 2 GiB.
MAX_REQUEST_BYTES = 2**31 - 64 * 1024
# What a field of the message can hold; what the server allows is less, and it says so itself.
MAX_UINT32 = 2**32 - 1


class GenerateOptions(TypedDict, total=False):
    """What `generate` and `stream` of both clients take besides the images. Everything may be left out."""

    # "report" (the default), "findings", "impression", "diagnosis", "caption", "vqa" (a question about the images),
    # or "free" (the prompt is all that is asked).
    task: Task
    # The language of the answer: "en" (the default) or "zh".
    language: Language
    # The question of "vqa", the text of "free", or for other tasks what else the model should know.
    prompt: str
    # The organs shown, if known; empty: found out from the images.
    organs: Sequence[str]
    # 0 (the default) takes the most likely token always.
    temperature: float
    # 0 keeps all tokens, otherwise the k most likely.
    top_k: int
    # 1 keeps all tokens, otherwise the smallest set whose probability reaches it.
    top_p: float
    # 1 changes nothing; above it, tokens that already occurred become less likely.
    repetition_penalty: float
    # The same seed, request and expert set give the same tokens; None: a random one.
    seed: int | None
    # None: the server's default.
    max_new_tokens: int | None
    # The answer ends before the first of these.
    stop: Sequence[str]
    # While a new version of an organ's experts answers a part of the requests, all with the same key get the same
    # experts: a key for a patient's visit, that tells nobody who it is. Empty: every request for itself.
    session_key: str


def build_request(
    images: Image | Sequence[Image] = (),
    *,
    task: Task = "report",
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
) -> echovlm_pb2.GenerateRequest:
    """The message of one request; options are those of `GenerateOptions`.

    Raises:
        InvalidRequestError: an unknown task or language, a value that the message cannot hold, a file that cannot
            be read, is empty, or makes the request too long. The server checks everything else.
    """
    if task not in TASKS:
        raise _invalid("task", f"is {task!r}; it must be one of {', '.join(get_args(Task))}")
    if language not in LANGUAGES:
        raise _invalid("language", f"is {language!r}; it must be one of {', '.join(LANGUAGES)}")
    if task in ("free", "vqa") and not prompt.strip():
        raise _invalid("prompt", f"is empty, and the task {task!r} asks nothing without it: give a prompt")
    for name, number in (("top_k", top_k), ("max_new_tokens", max_new_tokens)):
        if number is not None and not 0 <= number <= MAX_UINT32:
            raise _invalid(name, f"is {number}; it must be from 0 to {MAX_UINT32}")
    if max_new_tokens == 0:
        raise _invalid("max_new_tokens", "is 0; ask for at least one token, or leave it out for the server's default")
    if seed is not None and not 0 <= seed < 2**64:
        raise _invalid("sampling.seed", f"is {seed}; it must be from 0 to 2^64 - 1")
    sampling = router_pb2.Sampling(
        temperature=temperature, top_k=top_k, top_p=top_p, repetition_penalty=repetition_penalty, seed=seed
    )
    contents = read_images(images)
    return echovlm_pb2.GenerateRequest(
        task=TASKS[task],
        language=LANGUAGES[language],
        prompt=prompt,
        images=[echovlm_pb2.ImageFile(content=content) for content in contents],
        organs=_strings("organs", organs),
        sampling=sampling,
        max_new_tokens=max_new_tokens or 0,
        stop=_strings("stop", stop),
        session_key=session_key,
    )


def read_images(images: Image | Sequence[Image]) -> list[bytes]:
    """The content of each image: a path is read, bytes are taken as they are. One image needs no list.

    Raises:
        InvalidRequestError: a file is missing, unreadable, or empty; or all together are too long for one request.
    """
    if isinstance(images, str | os.PathLike | bytes):
        images = [images]
    contents: list[bytes] = []
    total = 0
    for index, image in enumerate(images):
        field = f"images[{index}].content"
        if isinstance(image, str | os.PathLike):
            path = Path(image)
            total += _file_size(path, field)
            _check_total(total, field)
            contents.append(_read(path, field))
        elif isinstance(image, bytes | bytearray | memoryview):
            total += len(image)
            _check_total(total, field)
            contents.append(bytes(image))
        else:
            raise _invalid(
                field, f"is a {type(image).__name__}; give a path or the bytes of a DICOM file, a still or a video"
            )
        if not contents[-1]:
            name = f"{image}" if isinstance(image, str | os.PathLike) else "the image"
            raise _invalid(field, f"{name} is empty: give a DICOM file, a still or a video")
    return contents


def _file_size(path: Path, field: str) -> int:
    try:
        if path.is_dir():
            raise _invalid(field, f"{path} is a folder: name the files in it")
        return path.stat().st_size
    except OSError as error:
        raise _unreadable(path, field, error) from error


def _read(path: Path, field: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise _unreadable(path, field, error) from error


def _check_total(total: int, field: str) -> None:
    if total > MAX_REQUEST_BYTES:
        raise _invalid(
            field, f"brings the request to {total} bytes, and one request holds at most {MAX_REQUEST_BYTES}: send less"
        )


def _unreadable(path: Path, field: str, error: OSError) -> InvalidRequestError:
    if isinstance(error, FileNotFoundError):
        return _invalid(field, f"there is no file {path}: check the path")
    return _invalid(field, f"{path} cannot be read: {error.strerror}")


def _strings(field: str, values: Sequence[str]) -> list[str]:
    # A lone string is a sequence of its letters, which nobody means.
    return [values] if isinstance(values, str) else list(values)


def _invalid(field: str, description: str) -> InvalidRequestError:
    violation = FieldViolation(field, description)
    return InvalidRequestError(str(violation), violations=[violation])
