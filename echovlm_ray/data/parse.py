"""Parses JSON objects of three formats into records; problems are named without quoting the record.

The formats are the published one (`conversations`), ms-swift's (`messages` of strings, `images`, `videos`), and
OpenAI's chat (`messages` whose content is a list of parts).
"""

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from echovlm_ray.data.record import IMAGE_MARK, VIDEO_MARK, Record, Role, Turn

ROLES: dict[str, Role] = {"system": "system", "human": "human", "gpt": "gpt", "user": "human", "assistant": "gpt"}
# The fields of a record; all other fields go to `extra`.
FIELDS = frozenset(
    ("id", "image", "images", "video", "videos", "conversations", "messages", "organ", "task", "language")
) | {"patient", "options", "answer", "references", "attributes"}
MAX_DEPTH = 32
# Letters and symbols by category that are rendered blank: the fillers of Hangul and of Braille.
_UNSEEN = frozenset("\u115f\u1160\u2800\u3164\uffa0")


@dataclass(frozen=True, slots=True)
class Problem:
    """A problem of a record: a short name of its kind, and a sentence with the fix."""

    kind: str
    text: str


class _Wrong(Exception):  # noqa: N818 - carries problems, is not one
    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.problem = Problem(kind, text)


def parse_record(raw: object) -> tuple[Record | None, list[Problem]]:
    """Reads one JSON object.

    Returns:
        the record, or None if its conversation is unreadable; and its problems.
    """
    if not isinstance(raw, Mapping):
        return None, [Problem("wrong type", f"is {_kind(raw)}; a record is an object with id, image and conversations")]
    if _depth(raw) > MAX_DEPTH:
        return None, [Problem("nested too deep", f"is nested deeper than {MAX_DEPTH} levels: flatten it")]
    try:
        turns, images, videos = _conversation(raw)
        record = _record(raw, turns, images, videos)
    except _Wrong as wrong:
        return None, [wrong.problem]
    return record, problems_of(record)


def _conversation(raw: Mapping[str, Any]) -> tuple[list[Turn], list[str], list[str]]:
    images = _paths(raw, "image") + _paths(raw, "images")
    videos = _paths(raw, "video") + _paths(raw, "videos")
    if "conversations" in raw:
        entries, role_key, text_key = raw["conversations"], "from", "value"
    elif "messages" in raw:
        entries, role_key, text_key = raw["messages"], "role", "content"
    else:
        raise _Wrong("unknown form", "has neither conversations nor messages: see `echoray data convert --help`")
    name = "conversations" if "conversations" in raw else "messages"
    if not isinstance(entries, list) or not entries:
        raise _Wrong("wrong type", f"{name} must be a list with at least one question and its answer")
    turns = []
    for index, entry in enumerate(entries):
        where = f"{name}[{index}]"
        if not isinstance(entry, Mapping) or role_key not in entry or text_key not in entry:
            raise _Wrong("wrong type", f"{where} must be an object with {role_key} and {text_key}")
        role = entry[role_key]
        if not isinstance(role, str) or role not in ROLES:
            raise _Wrong("turns", f"{where}.{role_key} must be one of {', '.join(ROLES)}")
        turns.append(Turn(ROLES[role], _text(entry[text_key], f"{where}.{text_key}", images)))
    return turns, images, videos


def _text(content: object, where: str, images: list[str]) -> str:
    """A turn's text; the images among OpenAI's parts are added to `images`, and marked in the text."""
    if isinstance(content, str):
        return _sound(content, where)
    if not isinstance(content, list):
        raise _Wrong("wrong type", f"{where} is {_kind(content)}; it must be text, or a list of parts")
    pieces = []
    for index, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part.get("text"), str):
            pieces.append(_sound(part["text"], f"{where}[{index}].text"))
        elif kind == "image_url":
            url = part.get("image_url")
            url = url.get("url") if isinstance(url, Mapping) else url
            if not isinstance(url, str):
                raise _Wrong("wrong type", f"{where}[{index}].image_url.url must be text")
            images.append(_sound(url, f"{where}[{index}].image_url.url"))
            pieces.append(IMAGE_MARK)
        else:
            raise _Wrong("wrong type", f"{where}[{index}] must be a part of the type text or image_url")
    return "".join(pieces)


def _record(raw: Mapping[str, Any], turns: Sequence[Turn], images: Sequence[str], videos: Sequence[str]) -> Record:
    identity = raw.get("id")
    if isinstance(identity, int) and not isinstance(identity, bool):
        identity = str(identity)
    if not isinstance(identity, str) or is_blank(identity):
        raise _Wrong("no id", "id must be text that can be seen, of its own for each record")
    attributes = raw.get("attributes")
    if attributes is not None and not isinstance(attributes, Mapping):
        raise _Wrong("wrong type", f"attributes is {_kind(attributes)}; it must be an object")
    return Record(
        id=_sound(identity, "id"),
        images=tuple(images),
        videos=tuple(videos),
        turns=tuple(turns),
        organ=_optional(raw, "organ"),
        task=_optional(raw, "task"),
        language=_optional(raw, "language"),
        patient=_optional(raw, "patient"),
        options=tuple(_strings(raw, "options")),
        answer=_optional(raw, "answer"),
        references=tuple(_strings(raw, "references")),
        attributes=attributes,
        extra={name: value for name, value in raw.items() if name not in FIELDS},
    )


def problems_of(record: Record) -> list[Problem]:
    """The problems of a readable record's turns, marks and fields."""
    found = []
    turns = record.turns[1:] if record.turns[0].role == "system" else record.turns
    expected: list[Role] = ["human", "gpt"] * (len(turns) // 2)
    if not turns or [turn.role for turn in turns] != expected:
        found.append(Problem("turns", "the turns must be human and gpt in alternation, after at most one of system"))
    for mark, paths, what in ((IMAGE_MARK, record.images, "images"), (VIDEO_MARK, record.videos, "videos")):
        marked = sum(turn.text.count(mark) for turn in turns if turn.role == "human")
        if marked != len(paths):
            text = f"marks {marked} {what} with {mark}, but lists {len(paths)}: mark each once, in order"
            found.append(Problem("marks", text))
        if any(mark in turn.text for turn in record.turns if turn.role != "human"):
            found.append(Problem("marks", f"has {mark} outside a human turn: move it to the question"))
    if any(turn.role == "gpt" and is_blank(turn.text) for turn in turns):
        found.append(Problem("empty answer", "has an answer without text: write it, or remove the record"))
    if any(is_blank(text) for text in (*record.options, *record.references)):
        found.append(Problem("empty answer", "has an option or a reference without text: write it, or remove it"))
    if any(turn.role == "human" and is_blank(_asked(turn.text)) for turn in turns):
        found.append(Problem("empty question", "has a question without text besides its images"))
    if record.options and record.answer is not None and record.answer not in record.options:
        found.append(Problem("options", "its answer is none of its options: use the same spelling in both"))
    if record.language is not None and record.language not in ("en", "zh"):
        found.append(Problem("language", 'language must be "en" or "zh"'))
    shown = (record.attributes or {}).get("organ")
    if record.organ is not None and isinstance(shown, str) and shown != record.organ:
        found.append(Problem("organ", "its organ is not the one of its attributes: correct one of the two"))
    return found


def is_blank(text: str) -> bool:
    """Whether a text has no visible character: only spaces, controls, format characters and isolated accents."""
    return all(unicodedata.category(letter)[0] in "CMZ" or letter in _UNSEEN for letter in text)


def _asked(text: str) -> str:
    return text.replace(IMAGE_MARK, "").replace(VIDEO_MARK, "").strip()


def _paths(raw: Mapping[str, Any], name: str) -> list[str]:
    value = raw.get(name)
    if isinstance(value, str):
        return [_sound(value, name)]
    return _strings(raw, name)


def _strings(raw: Mapping[str, Any], name: str) -> list[str]:
    value = raw.get(name)
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise _Wrong("wrong type", f"{name} must be a list of texts")
    return [_sound(item, name) for item in value]


def _optional(raw: Mapping[str, Any], name: str) -> str | None:
    value = raw.get(name)
    if value is None or (isinstance(value, str) and is_blank(value)):
        return None
    if isinstance(value, int) and not isinstance(value, bool) and name == "patient":
        return str(value)
    if not isinstance(value, str):
        raise _Wrong("wrong type", f"{name} is {_kind(value)}; it must be text")
    return _sound(value, name)


def _sound(text: str, where: str) -> str:
    """The text, if it can be written as UTF-8: JSON can spell halves of characters."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise _Wrong("not Unicode", f"{where} holds half a character (a lone surrogate): write it again") from None
    return text


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _depth(value: object) -> int:
    """The nesting depth of a value, computed without recursion."""
    deepest, waiting = 0, [(value, 1)]
    while waiting:
        item, depth = waiting.pop()
        deepest = max(deepest, depth)
        if isinstance(item, Mapping):
            waiting.extend((inner, depth + 1) for inner in item.values())
        elif isinstance(item, list):
            waiting.extend((inner, depth + 1) for inner in item)
    return deepest


assert set(get_args(Role)) == set(ROLES.values())
