"""Prompts by task and language: messages for ChatML, images first in the first user turn.

The messages have the format of transformers' chat templates. `EchoVLMProcessor.encode_chat` converts them to token ids,
without control tokens from a caller's text.
"""

from collections.abc import Sequence
from typing import Literal, TypedDict

from echovlm_ray.tasks import TASKS, Language, TaskName

Medium = Literal["image", "video"]


class TextPart(TypedDict):
    """Text in a message."""

    type: Literal["text"]
    text: str


class MediumPart(TypedDict):
    """The position of an image or a video in a message."""

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
FURTHER: dict[Language, str] = {"en": "Further information: ", "zh": "补充信息："}


def build_messages(task: TaskName, language: Language, prompt: str, media: Sequence[Medium]) -> list[Message]:
    """Builds the chat for a task.

    Args:
        task: the task; one without instructions uses only the prompt.
        language: the language of the answer and of the instructions.
        prompt: the caller's text; leading and trailing white space is removed.
        media: one entry per image or video, in order.

    Raises:
        ValueError: the task needs a prompt and there is none.
    """
    prompt = prompt.strip()
    instructions = TASKS[task].instructions
    if not instructions:
        if not prompt:
            raise ValueError(f"the task {task!r} asks nothing without a prompt: give one")
        text = prompt
    else:
        text = instructions[language]
        if prompt:
            text = f"{text}\n{FURTHER[language]}{prompt}"
    content: list[TextPart | MediumPart] = [{"type": medium} for medium in media]
    content.append({"type": "text", "text": text})
    return [
        {"role": "system", "content": [{"type": "text", "text": SYSTEM[language]}]},
        {"role": "user", "content": content},
    ]
