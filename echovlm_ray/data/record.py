"""One record of a dataset: images, a conversation about them, and metadata.

The format is that of EchoVLM's authors (`id`, `image`, `conversations`), with optional further fields: `video`,
`organ`, `task`, `language`, `patient`, `options`, `answer`, `references`, `attributes`.

No text here quotes a record: a path, an identifier or an answer may name a patient.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from echovlm_ray.prompts import FURTHER
from echovlm_ray.tasks import LANGUAGES, TASKS, Language, TaskName

IMAGE_MARK = "<image>"
VIDEO_MARK = "<video>"
Role = Literal["system", "human", "gpt"]
_MARKS = re.compile(f"({re.escape(IMAGE_MARK)}|{re.escape(VIDEO_MARK)})")
# The share of CJK characters among its letters from which a text counts as Chinese.
CHINESE_SHARE = 0.3


class InvalidDataError(ValueError):
    """A dataset, or a record of it, cannot be used. The text names the place and the fix, and quotes nothing."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn of a conversation; in a human turn each `<image>` and `<video>` stands for the next medium."""

    role: Role
    text: str


@dataclass(frozen=True, slots=True)
class Record:
    """A record, independent of its file's format.

    Attributes:
        id: unique in a dataset.
        images: paths of image files (PNG, JPEG or DICOM) relative to the image root, in the order of their marks.
        videos: paths of cine loops, likewise.
        turns: an optional system turn, then human and gpt in alternation; the last is gpt's.
        organ: the region shown, if known.
        task: a name of `tasks.TASKS`, if known.
        language: "en" or "zh", if known.
        patient: the patient, if known; a split puts all records of a patient on one side.
        options: the answers to choose from, of a multiple-choice question.
        answer: the right one of the options, or the short right answer of a question.
        references: further right wordings of the last turn.
        attributes: the content of the images, in the terms of `echovlm_ray.data.phantom`.
        extra: all other fields, unchanged.
    """

    id: str
    images: tuple[str, ...]
    videos: tuple[str, ...]
    turns: tuple[Turn, ...]
    organ: str | None = None
    task: str | None = None
    language: str | None = None
    patient: str | None = None
    options: tuple[str, ...] = ()
    answer: str | None = None
    references: tuple[str, ...] = ()
    attributes: Mapping[str, Any] | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def target(self) -> str:
        """The text of the last turn."""
        return self.turns[-1].text

    @property
    def question(self) -> str:
        """The text of the last human turn without the marks of images and videos."""
        human = next(turn.text for turn in reversed(self.turns) if turn.role == "human")
        return human.replace(IMAGE_MARK, "").replace(VIDEO_MARK, "").strip()


def divide_at_marks(text: str) -> list[str]:
    """A human turn's text in pieces, each mark a piece of its own; pieces between marks can be empty."""
    return _MARKS.split(text)


def media_paths(record: Record) -> list[str]:
    """The paths of a valid record's images and videos, in the order in which the questions mark them."""
    rest = {IMAGE_MARK: iter(record.images), VIDEO_MARK: iter(record.videos)}
    questions = (turn.text for turn in record.turns if turn.role == "human")
    return [next(rest[piece]) for text in questions for piece in divide_at_marks(text) if piece in rest]


def mark_media(record: Record) -> Record:
    """The record itself; where no question has a mark, one that shows all images and videos in the first question."""
    first = next((number for number, turn in enumerate(record.turns) if turn.role == "human"), None)
    marked = any(len(divide_at_marks(turn.text)) > 1 for turn in record.turns if turn.role == "human")
    if first is None or marked:
        return record
    marks = IMAGE_MARK * len(record.images) + VIDEO_MARK * len(record.videos)
    question = Turn("human", marks + record.turns[first].text)
    return replace(record, turns=(*record.turns[:first], question, *record.turns[first + 1 :]))


def language_of(record: Record) -> Language:
    """The record's own `language`, else the one that its answer is written in, by its characters."""
    if record.language in LANGUAGES:
        return "zh" if record.language == "zh" else "en"
    letters = [letter for letter in record.target if letter.isalpha()]
    chinese = sum("\u3400" <= letter <= "\u9fff" for letter in letters)
    return "zh" if letters and chinese / len(letters) >= CHINESE_SHARE else "en"


@dataclass(frozen=True, slots=True)
class Request:
    """How a record's question is asked of a service, so that the model reads the same words."""

    task: TaskName
    language: Language
    prompt: str


def request_of(record: Record) -> Request:
    """The request that makes the service ask the record's question: the inverse of `prompts.build_messages`.

    A question in the words of a task's own instruction becomes that task, with what follows the instruction as the
    prompt. Any other question is asked as it stands, by the record's task where that needs a prompt, else by "free".
    """
    language = language_of(record)
    question = record.question
    for task in TASKS.values():
        instruction = task.instructions.get(language)
        if instruction is None:
            continue
        if question == instruction:
            return Request(task.name, language, "")
        introduction = f"{instruction}\n{FURTHER[language]}"
        if question.startswith(introduction):
            return Request(task.name, language, question[len(introduction) :])
    named = TASKS.get(record.task or "")
    return Request("free" if named is None or named.instructions else named.name, language, question)


def task_of(record: Record) -> str:
    """The record's own `task`, else the one that its question asks for, else "free"."""
    return record.task or request_of(record).task
