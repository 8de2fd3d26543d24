"""Reads records in the form that EchoVLM's authors publish: id, image list, conversations of system, human and gpt."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from echovlm_ray.errors import InvalidRequestError
from echovlm_ray.model.processing import Picture
from echovlm_ray.prompts import MediumPart, Message, TextPart
from echovlm_ray.training.examples import Example, ExampleError
from echovlm_ray.vision.images import DecodedImage, ImageLimits, decode_image_file

IMAGE_MARK = "<image>"
_ROLES: Mapping[str, Any] = {"system": "system", "human": "user", "gpt": "assistant"}
_LIMITS = ImageLimits(max_image_bytes=64 * 1024 * 1024, max_image_pixels=40_000_000, max_frames=8)


class RecordFile:
    """The records of one JSON or JSON Lines file; images are read when an example is asked for."""

    def __init__(self, path: Path, images: Path | None = None) -> None:
        """Reads the text of all records.

        Args:
            path: a JSON list of records, or one record a line (`.jsonl`).
            images: the folder to which the records' image paths are relative; None: the one that the file lies in.

        Raises:
            ExampleError: the file cannot be read, or is not of this form.
        """
        self._path = path
        self._images = path.parent if images is None else images
        self._records = _read(path)
        if not self._records:
            raise ExampleError(f"{path}: holds no record")

    def __len__(self) -> int:
        """How many records there are."""
        return len(self._records)

    def place(self, index: int) -> str:
        """See `ExampleSource.place`."""
        return f"{self._path.name}, record {index}"

    def example(self, index: int, epoch: int) -> Example:
        """See `ExampleSource.example`; nothing is drawn at random."""
        record, place = self._records[index], self.place(index)
        paths, turns = _fields(record, place)
        decoded = [self._decode(path, f"{place}, image {number}") for number, path in enumerate(paths)]
        messages = [_message(turn, images) for turn, images in _with_media(turns, decoded, place)]
        if messages[-1]["role"] != "assistant" or not _text_of(messages[-1]):
            raise ExampleError(f"{place}: the conversation must end in an answer of gpt that is not empty")
        return Example(messages, [_picture(image) for image in decoded])

    def _decode(self, path: str, place: str) -> DecodedImage:
        try:
            content = (self._images / path).read_bytes()
        except OSError as error:
            raise ExampleError(f"{place}: cannot be read: {error.strerror or 'no such file'}") from None
        try:
            return decode_image_file(content, limits=_LIMITS, field="image")
        except InvalidRequestError as error:
            raise ExampleError(f"{place}: {error}") from None


def _read(path: Path) -> list[Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ExampleError(f"{path}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise ExampleError(f"{path}: is not UTF-8 text") from None
    lines = path.suffix == ".jsonl"
    try:
        if lines:
            return [_line(line, number, path) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
        records = json.loads(text)
    except json.JSONDecodeError as error:
        raise ExampleError(f"{path}:{error.lineno}: is not JSON: {error.msg}") from None
    if not isinstance(records, list):
        raise ExampleError(f"{path}: must hold a list of records")
    return records


def _line(line: str, number: int, path: Path) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ExampleError(f"{path}:{number}: is not JSON: {error.msg}") from None


def _fields(record: Any, place: str) -> tuple[list[str], list[tuple[str, str]]]:
    if not isinstance(record, dict) or not isinstance(record.get("conversations"), list):
        raise ExampleError(f"{place}: has no list of conversations")
    paths = record.get("image", [])
    paths = [paths] if isinstance(paths, str) else paths
    if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
        raise ExampleError(f"{place}: image must be a list of paths")
    turns = []
    for turn in record["conversations"]:
        if not isinstance(turn, dict) or turn.get("from") not in _ROLES or not isinstance(turn.get("value"), str):
            raise ExampleError(f"{place}: every turn needs `from` (system, human or gpt) and a text as `value`")
        turns.append((turn["from"], turn["value"]))
    if not turns:
        raise ExampleError(f"{place}: has no turn")
    return paths, turns


def _with_media(
    turns: Sequence[tuple[str, str]], decoded: Sequence[DecodedImage], place: str
) -> list[tuple[tuple[str, str], list[DecodedImage]]]:
    """Gives every turn the images that it marks; a record without any mark shows them in its first human turn."""
    marks = [value.count(IMAGE_MARK) if speaker == "human" else 0 for speaker, value in turns]
    if decoded and not any(marks):
        first = next((number for number, (speaker, _) in enumerate(turns) if speaker == "human"), None)
        if first is None:
            raise ExampleError(f"{place}: has images but no turn of human that could show them")
        speaker, value = turns[first]
        turns = [*turns[:first], (speaker, IMAGE_MARK * len(decoded) + value), *turns[first + 1 :]]
        marks[first] = len(decoded)
    if sum(marks) != len(decoded):
        raise ExampleError(f"{place}: marks {sum(marks)} images with {IMAGE_MARK} and lists {len(decoded)}")
    rest = iter(decoded)
    return [(turn, [next(rest) for _ in range(count)]) for turn, count in zip(turns, marks, strict=True)]


def _message(turn: tuple[str, str], images: Sequence[DecodedImage]) -> Message:
    speaker, value = turn
    pieces = re.split(f"({re.escape(IMAGE_MARK)})", value) if images else [value]
    rest = iter(images)
    content: list[TextPart | MediumPart] = []
    for piece in pieces:
        if images and piece == IMAGE_MARK:
            content.append({"type": "video" if next(rest).is_video else "image"})
        elif piece.strip() or not images:
            content.append({"type": "text", "text": piece.strip()})
    return {"role": _ROLES[speaker], "content": content}


def _text_of(message: Message) -> str:
    return "".join(part["text"] for part in message["content"] if part["type"] == "text")


def _picture(image: DecodedImage) -> Picture | Sequence[Picture]:
    return image.frames if image.is_video else image.frames[0]
