"""Converts records between three formats without loss: the published one, ms-swift's messages, and OpenAI's chat."""

import base64
import binascii
import hashlib
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

from echovlm_ray.data.media import ImageRoot
from echovlm_ray.data.record import IMAGE_MARK, InvalidDataError, Record

Form = Literal["published", "swift", "openai"]
FORMS: tuple[Form, ...] = get_args(Form)
_CHAT_ROLES = {"system": "system", "human": "user", "gpt": "assistant"}
_DATA_URL = re.compile(r"data:image/(png|jpeg|jpg);base64,")
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")
_SUFFIXES = {b"\x89PNG\r\n\x1a\n": (".png", "png"), b"\xff\xd8\xff": (".jpg", "jpeg")}
MAX_EMBEDDED_BYTES = 64 * 1024 * 1024


def to_form(record: Record, form: Form, embed_from: ImageRoot | None = None) -> dict[str, Any]:
    """A record as JSON in one of the formats.

    Args:
        record: a valid one.
        form: "published", "swift" or "openai".
        embed_from: for "openai": puts the images themselves into the record, as data URLs, instead of their paths.

    Raises:
        InvalidDataError: the format cannot represent the record; or an image to embed is not PNG or JPEG.
        UnusableImageError: an image to embed cannot be read.
    """
    shared = {
        "organ": record.organ,
        "task": record.task,
        "language": record.language,
        "patient": record.patient,
        "options": list(record.options) or None,
        "answer": record.answer,
        "references": list(record.references) or None,
        "attributes": record.attributes,
    }
    rest = {name: value for name, value in shared.items() if value is not None} | dict(record.extra)
    head: dict[str, Any] = {"id": record.id}
    if form == "openai":
        return head | {"messages": _openai_messages(record, embed_from)} | rest
    if form == "published":
        turns = [{"from": turn.role, "value": turn.text} for turn in record.turns]
        media = {"image": list(record.images)} | ({"video": list(record.videos)} if record.videos else {})
        return head | media | {"conversations": turns} | rest
    messages = [{"role": _CHAT_ROLES[turn.role], "content": turn.text} for turn in record.turns]
    media = {"images": list(record.images)} | ({"videos": list(record.videos)} if record.videos else {})
    return head | {"messages": messages} | media | rest


def _openai_messages(record: Record, embed_from: ImageRoot | None) -> list[dict[str, Any]]:
    if record.videos:
        raise InvalidDataError("OpenAI's chat has no place for videos: convert to swift, or put frames in as images")
    images = iter(record.images)
    messages: list[dict[str, Any]] = []
    for turn in record.turns:
        role = _CHAT_ROLES[turn.role]
        if turn.role != "human" or IMAGE_MARK not in turn.text:
            messages.append({"role": role, "content": turn.text})
            continue
        parts: list[dict[str, Any]] = []
        for number, text in enumerate(turn.text.split(IMAGE_MARK)):
            if number:
                path = next(images)
                url = path if embed_from is None else _data_url(embed_from.read(path, MAX_EMBEDDED_BYTES))
                parts.append({"type": "image_url", "image_url": {"url": url}})
            if text:
                parts.append({"type": "text", "text": text})
        messages.append({"role": role, "content": parts})
    return messages


def _data_url(content: bytes) -> str:
    kind = next((kind for start, (_, kind) in _SUFFIXES.items() if content.startswith(start)), None)
    if kind is None:
        raise InvalidDataError("only PNG and JPEG can be embedded: leave out --embed to keep the paths")
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def extract_embedded(record: Record, directory: Path | None) -> Record:
    """Writes a record's embedded images to files, named by their content, and returns the record with their paths.

    Args:
        record: in any format.
        directory: of the files; None refuses embedded images.

    Raises:
        InvalidDataError: an image is embedded and no directory is given; or one is broken, too large, or not PNG or
            JPEG.
    """
    paths = [_extract(path, directory) if path.startswith("data:") else path for path in record.images]
    return replace(record, images=tuple(paths))


def require_paths(record: Record) -> None:
    """Checks that a record names files: URLs are never read, so a record with one could not be used.

    Raises:
        InvalidDataError: an image or a video is given by a URL.
    """
    for number, path in enumerate((*record.images, *record.videos), start=1):
        if _ADDRESS.match(path):
            raise InvalidDataError(
                f"image {number} is named by an address ({path.partition(':')[0]}:), and only files below the image "
                "root are read: download it, and write its path"
            )


def _extract(url: str, directory: Path | None) -> str:
    if directory is None:
        raise InvalidDataError("an image is embedded in the record: name a folder for such images with --extract-to")
    head = _DATA_URL.match(url)
    if head is None or len(url) > MAX_EMBEDDED_BYTES * 4 // 3 + 64:
        raise InvalidDataError("an embedded image is no PNG or JPEG in base64, or is too large")
    try:
        content = base64.b64decode(url[head.end() :], validate=True)
    except binascii.Error:
        raise InvalidDataError("an embedded image is broken: its base64 cannot be decoded") from None
    suffix = next((suffix for start, (suffix, _) in _SUFFIXES.items() if content.startswith(start)), None)
    if suffix is None:
        raise InvalidDataError("an embedded image is no PNG or JPEG, whatever its URL says")
    name = hashlib.sha256(content).hexdigest()[:32] + suffix
    directory.mkdir(parents=True, exist_ok=True)
    (directory / name).write_bytes(content)
    return name
