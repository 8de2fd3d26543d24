"""Saved requests: a file with a request and its answer's tokens, for replays.

The file contains the request with its images, so only its owner can read it. Images in the file's folder are stored as
path and digest, all others are embedded.
"""

import base64
import binascii
import hashlib
import os
import stat
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from echovlm_ray.client.request import GenerateOptions, Image
from echovlm_ray.client.types import Summary
from echovlm_ray.tasks import Language, TaskName

# Above a gateway's limit of a request plus the third that base64 adds.
MAX_FILE_BYTES = 1024**3
MAX_TOKENS = 2**20

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Name = Annotated[str, Field(max_length=128)]


class SavedRequestError(ValueError):
    """A file is not a saved request, or its images have changed. The text has the fix."""


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class SavedImage(_Strict):
    """An image of the request: embedded in base64, or a file in the same folder."""

    sha256: Sha256
    path: Annotated[str, Field(min_length=1, max_length=4096)] | None = None
    content: str | None = None

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if (self.path is None) == (self.content is None):
            raise ValueError("must have either a path or a content")
        return self


class SavedSampling(_Strict):
    """The sampling parameters, with the seed if sampling was random."""

    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    top_k: Annotated[int, Field(ge=0, lt=2**32)] = 0
    top_p: Annotated[float, Field(ge=0, le=1)] = 1.0
    repetition_penalty: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    seed: Annotated[int, Field(ge=0, lt=2**64)] | None = None

    @model_validator(mode="after")
    def _repeatable(self) -> Self:
        if self.temperature > 0 and self.seed is None:
            raise ValueError("has a temperature and no seed, so that the answer cannot come again")
        return self


class SavedOrgan(_Strict):
    """An organ whose experts produced the answer."""

    organ: Name
    version: Name
    digest: Name


class SavedAnswer(_Strict):
    """The answer to compare a replay with, and the experts that it needs."""

    request_id: Name = ""
    expert_set_id: Sha256
    backbone_digest: Name
    prompt_digest: Sha256
    organs: Annotated[tuple[SavedOrgan, ...], Field(max_length=64)]
    token_ids: Annotated[
        tuple[Annotated[int, Field(ge=0, lt=2**32)], ...], Field(min_length=1, max_length=MAX_TOKENS, strict=False)
    ]


class SavedRequest(_Strict):
    """An answered request."""

    format: Literal["echoray-request"] = "echoray-request"
    version: Literal[1] = 1
    task: TaskName
    language: Language
    prompt: str
    organs: Annotated[tuple[str, ...], Field(max_length=64)]
    sampling: SavedSampling
    max_new_tokens: Annotated[int, Field(ge=1, lt=2**32)]
    stop: Annotated[tuple[str, ...], Field(max_length=64)]
    images: Annotated[tuple[SavedImage, ...], Field(max_length=1024)]
    answer: SavedAnswer

    def options(self) -> GenerateOptions:
        """The client's arguments for computing the same answer with the same experts."""
        return {
            "task": self.task,
            "language": self.language,
            "prompt": self.prompt,
            "organs": self.organs,
            "temperature": self.sampling.temperature,
            "top_k": self.sampling.top_k,
            "top_p": self.sampling.top_p,
            "repetition_penalty": self.sampling.repetition_penalty,
            "seed": self.sampling.seed,
            "max_new_tokens": self.max_new_tokens,
            "stop": self.stop,
            "expert_set_id": self.answer.expert_set_id,
            "prompt_digest": self.answer.prompt_digest,
            "for_replay": True,
        }


def saved_request(
    options: GenerateOptions, images: Sequence[Image], contents: Sequence[bytes], summary: Summary, folder: Path
) -> SavedRequest:
    """The record of an answered request.

    Args:
        options: the client's options.
        images: the images as given.
        contents: the sent bytes of each image.
        summary: the answer's summary, of a request with `for_replay`.
        folder: the folder of the record.
    """
    provenance = summary.provenance
    organs = tuple(
        SavedOrgan(organ=organ.organ, version=organ.bundle_version, digest=organ.bundle_digest)
        for organ in provenance.organs
    )
    return SavedRequest(
        task=options["task"],
        language=options["language"],
        prompt=options["prompt"],
        organs=tuple(options["organs"]),
        sampling=SavedSampling(
            temperature=options["temperature"],
            top_k=options["top_k"],
            top_p=options["top_p"],
            repetition_penalty=options["repetition_penalty"],
            seed=options["seed"],
        ),
        # The server's default may change. An answer that ended with an end token ends there again.
        max_new_tokens=options["max_new_tokens"] or len(summary.token_ids),
        stop=tuple(options["stop"]),
        images=tuple(_saved_image(image, content, folder) for image, content in zip(images, contents, strict=True)),
        answer=SavedAnswer(
            request_id=summary.request_id,
            expert_set_id=provenance.expert_set_id,
            backbone_digest=provenance.backbone_digest,
            prompt_digest=summary.prompt_digest,
            organs=organs,
            token_ids=summary.token_ids,
        ),
    )


def check_place(path: Path) -> None:
    """Checks, before the request is sent, that a record can be written.

    Raises:
        SavedRequestError: the path exists, or its folder does not.
    """
    if path.exists() or path.is_symlink():
        raise SavedRequestError(f"{path} is there already, and records are not replaced: name another file")
    if not os.access(path.parent, os.W_OK):
        raise SavedRequestError(f"{path.parent} is no folder that can be written to: name another file")


def write_request(path: Path, request: SavedRequest) -> None:
    """Writes the file atomically, readable only by its owner.

    Raises:
        FileExistsError: the path exists; records are not replaced.
        OSError: it cannot be written.
    """
    descriptor, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(request.model_dump_json(indent=1, exclude_none=True) + "\n")
        # Unlike a rename, a link never replaces another file.
        os.link(partial, path)
    finally:
        os.unlink(partial)


def read_request(path: Path) -> tuple[SavedRequest, list[bytes]]:
    """Reads a saved request and its images, and checks their digests.

    Raises:
        SavedRequestError: it is not a file of `write_request`, or an image is missing or changed.
    """
    content = _read(path, MAX_FILE_BYTES, "a saved request")
    if not content.strip():
        raise SavedRequestError(f"{path} is empty: give a file that `echoray generate --save-request` wrote")
    try:
        request = SavedRequest.model_validate_json(content)
    except ValidationError as error:
        # Without the input, which may be a patient's data.
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(map(str, first["loc"]))[:200]
        reason = first["msg"].removeprefix("Value error, ")
        raise SavedRequestError(
            f"{path} is no saved request{f', {where}' if where else ''}: {reason}; give a file that "
            "`echoray generate --save-request` wrote"
        ) from None
    return request, [_content(path.parent, index, image) for index, image in enumerate(request.images)]


def first_difference(expected: Sequence[int], found: Sequence[int]) -> int | None:
    """The position of the first different token, from 0; None if all are equal."""
    for index, (one, other) in enumerate(zip(expected, found, strict=False)):
        if one != other:
            return index
    return None if len(expected) == len(found) else min(len(expected), len(found))


def _saved_image(image: Image, content: bytes, folder: Path) -> SavedImage:
    sha256 = hashlib.sha256(content).hexdigest()
    if isinstance(image, str | os.PathLike):
        path = Path(os.fsdecode(image)).resolve()
        if path.is_relative_to(folder.resolve()):
            return SavedImage(sha256=sha256, path=path.relative_to(folder.resolve()).as_posix())
    return SavedImage(sha256=sha256, content=base64.b64encode(content).decode())


def _content(folder: Path, index: int, image: SavedImage) -> bytes:
    if image.path is not None:
        content = _beside(folder, f"images[{index}]", image.path)
    else:
        try:
            content = base64.b64decode(image.content or "", validate=True)
        except (binascii.Error, ValueError):
            raise SavedRequestError(f"images[{index}].content is no base64: the file was changed or damaged") from None
    if hashlib.sha256(content).hexdigest() != image.sha256:
        raise SavedRequestError(
            f"images[{index}] is not the image that was sent, its SHA-256 is another one: bring the original file back"
        )
    return content


def _beside(folder: Path, name: str, path: str) -> bytes:
    parts = Path(path).parts
    try:
        real = (folder / path).resolve()
        outside = Path(path).is_absolute() or ".." in parts or not real.is_relative_to(folder.resolve())
    except (OSError, ValueError, RuntimeError):
        raise SavedRequestError(f"{name}.path is no path that can be read: the file was changed") from None
    if outside:
        raise SavedRequestError(f"{name}.path leaves the folder of the saved request, which is not followed")
    return _read(real, MAX_FILE_BYTES, f"the image of {name}")


def _read(path: Path, limit: int, what: str) -> bytes:
    try:
        # Other than plain files are refused: a pipe without a writer would block.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode):
                raise SavedRequestError(f"{path} is no file: name {what}")
            if found.st_size > limit:
                raise SavedRequestError(f"{path} has {found.st_size} bytes, and {what} has at most {limit}")
            return file.read(limit + 1)
    except OSError as error:
        raise SavedRequestError(f"{path} cannot be read: {error.strerror or type(error).__name__}") from None
    except ValueError as error:
        if isinstance(error, SavedRequestError):
            raise
        raise SavedRequestError("the path has a character that no path can have") from None
