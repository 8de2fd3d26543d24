"""Prompts by task and language: messages for ChatML, images first in the first user turn.

The messages have the form that chat templates of transformers take. `EchoVLMProcessor.encode_chat` makes token ids of
them in which a caller's text stays text.
"""

from collections.abc import Sequence
from typing import Literal, TypedDict, get_args

Task = Literal["report", "findings", "impression", "diagnosis", "caption", "vqa", "free"]
Language = Literal["en", "zh"]
TASKS: tuple[Task, ...] = get_args(Task)
LANGUAGES: tuple[Language, ...] = get_args(Language)
# Tasks that ask nothing without the caller's own words.
NEEDS_PROMPT: frozenset[Task] = frozenset(("vqa", "free"))
# Tasks about a picture.
NEEDS_IMAGE: frozenset[Task] = frozenset(TASKS) - {"free"}

Medium = Literal["image", "video"]


class TextPart(TypedDict):
    """Text in a message."""

    type: Literal["text"]
    text: str


class MediumPart(TypedDict):
    """The place of an image or a video in a message."""

    type: Medium


class Message(TypedDict):
    """One turn of a chat."""

    role: Literal["system", "user", "assistant"]
    content: list[TextPart | MediumPart]


SYSTEM: dict[Language, str] = {
    "en": (
        "You are an assistant for ultrasound. Describe only what the images show, use the terms of ultrasound "
        "reporting, and say so where the images do not allow a statement."
    ),
    "zh": "你是一名超声影像助手。只描述图像所显示的内容，使用规范的超声术语；图像不足以判断时，请直接说明。",
}
INSTRUCTIONS: dict[Language, dict[Task, str]] = {
    "en": {
        "report": (
            "Write the ultrasound report for these images, in the form "
            '"Ultrasound findings: …; Ultrasound impression: …".'
        ),
        "findings": 'Describe the findings in these ultrasound images, in the form "Ultrasound findings: …".',
        "impression": 'State the impression that these ultrasound images give, in the form "Ultrasound impression: …".',
        "diagnosis": "Which diagnosis do these ultrasound images suggest? Name it, and the signs that speak for it.",
        "caption": "Describe these ultrasound images in one or two sentences.",
    },
    "zh": {
        "report": "请根据这些超声图像书写超声报告，格式为“超声所见：…；超声提示：…”。",
        "findings": "请描述这些超声图像的所见，格式为“超声所见：…”。",
        "impression": "请给出这些超声图像的超声提示，格式为“超声提示：…”。",
        "diagnosis": "这些超声图像提示什么诊断？请写出诊断及支持该诊断的征象。",
        "caption": "请用一两句话描述这些超声图像。",
    },
}
FURTHER: dict[Language, str] = {"en": "Further information: ", "zh": "补充信息："}


def build_messages(task: Task, language: Language, prompt: str, media: Sequence[Medium]) -> list[Message]:
    """The chat that asks for a task.

    Args:
        task: what is wanted; "vqa" and "free" ask the prompt alone.
        language: of the answer, and of our own words.
        prompt: the caller's text; white space around it is dropped.
        media: one entry per image or video, in order.

    Raises:
        ValueError: the task needs a prompt and there is none.
    """
    prompt = prompt.strip()
    if task in NEEDS_PROMPT:
        if not prompt:
            raise ValueError(f"the task {task!r} asks nothing without a prompt: give one")
        text = prompt
    else:
        text = INSTRUCTIONS[language][task]
        if prompt:
            text = f"{text}\n{FURTHER[language]}{prompt}"
    content: list[TextPart | MediumPart] = [{"type": medium} for medium in media]
    content.append({"type": "text", "text": text})
    return [
        {"role": "system", "content": [{"type": "text", "text": SYSTEM[language]}]},
        {"role": "user", "content": content},
    ]
