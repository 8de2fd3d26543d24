"""The tasks, and the languages of an answer: one table of each for all other parts.

For a new task, add a value in `protos/echovlm.proto`, its name in `TaskName` and its row in `TASKS`. The client, the
command line, the gateway's checks, the prompts, datasets and evaluation use these.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from protos import echovlm_pb2

TaskName = Literal["report", "findings", "impression", "diagnosis", "caption", "vqa", "free"]
Language = Literal["en", "zh"]
# The kind of answer for evaluation: a text about the whole image, one diagnosis, or the answer to a question.
AnswerKind = Literal["text", "diagnosis", "question"]
# The attributes of an image that an answer states.
Stated = Literal["organ", "values", "diagnosis"]
# The texts that `data.phantom` can write about a synthetic image.
Wording = Literal["report", "findings", "impression", "diagnosis", "caption", "question"]


@dataclass(frozen=True, slots=True)
class Task:
    """One task.

    Attributes:
        name: the name in the client and the command line.
        value: the value in `echovlm.v1.Task`.
        instructions: the instructions for the model in each language; empty if there is only the caller's prompt.
        needs_image: whether it needs an image.
        answer: the kind of answer, which determines the metrics.
        states: the attributes that the answer states, if the image's attributes are known.
        phantoms: the text of a right answer about a synthetic image; None if there is none.
    """

    name: TaskName
    value: echovlm_pb2.Task
    instructions: Mapping[Language, str]
    needs_image: bool = True
    answer: AnswerKind = "text"
    states: tuple[Stated, ...] = ()
    phantoms: Wording | None = None

    @property
    def needs_prompt(self) -> bool:
        """Whether it needs the caller's prompt."""
        return not self.instructions

    @property
    def label(self) -> str:
        """Its name in `echovlm.v1.Task`, for messages."""
        return f"TASK_{self.name.upper()}"


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            "report",
            echovlm_pb2.TASK_REPORT,
            {
                "en": (
                    "Write the ultrasound report for these images, in the form "
                    '"Ultrasound findings: …; Ultrasound impression: …".'
                ),
                "zh": "请根据这些超声图像书写超声报告，格式为“超声所见：…；超声提示：…”。",
            },
            states=("organ", "values", "diagnosis"),
            phantoms="report",
        ),
        Task(
            "findings",
            echovlm_pb2.TASK_FINDINGS,
            {
                "en": 'Describe the findings in these ultrasound images, in the form "Ultrasound findings: …".',
                "zh": "请描述这些超声图像的所见，格式为“超声所见：…”。",
            },
            states=("organ", "values"),
            phantoms="findings",
        ),
        Task(
            "impression",
            echovlm_pb2.TASK_IMPRESSION,
            {
                "en": (
                    'State the impression that these ultrasound images give, in the form "Ultrasound impression: …".'
                ),
                "zh": "请给出这些超声图像的超声提示，格式为“超声提示：…”。",
            },
            states=("diagnosis",),
            phantoms="impression",
        ),
        Task(
            "diagnosis",
            echovlm_pb2.TASK_DIAGNOSIS,
            {
                "en": "Which diagnosis do these ultrasound images suggest? Name it, and the signs that speak for it.",
                "zh": "这些超声图像提示什么诊断？请写出诊断及支持该诊断的征象。",
            },
            answer="diagnosis",
            states=("diagnosis",),
            phantoms="diagnosis",
        ),
        Task(
            "caption",
            echovlm_pb2.TASK_CAPTION,
            {
                "en": "Describe these ultrasound images in one or two sentences.",
                "zh": "请用一两句话描述这些超声图像。",
            },
            states=("organ", "diagnosis"),
            phantoms="caption",
        ),
        Task("vqa", echovlm_pb2.TASK_VQA, {}, answer="question", phantoms="question"),
        Task("free", echovlm_pb2.TASK_UNSPECIFIED, {}, needs_image=False),
    )
}

LANGUAGES: dict[Language, echovlm_pb2.Language] = {
    "en": echovlm_pb2.LANGUAGE_ENGLISH,
    "zh": echovlm_pb2.LANGUAGE_CHINESE,
}
# The default language of an answer.
DEFAULT_LANGUAGE: Language = "en"


def phantom_tasks() -> tuple[TaskName, ...]:
    """The tasks for synthetic images."""
    return tuple(task.name for task in TASKS.values() if task.phantoms is not None)


def task_of(value: int) -> Task | None:
    """The task of a value of `echovlm.v1.Task`, or None."""
    return next((task for task in TASKS.values() if task.value == value), None)


def language_of(value: int) -> Language | None:
    """The language of a value of `echovlm.v1.Language`: the default if it is unset, None if it is unknown."""
    if value == echovlm_pb2.LANGUAGE_UNSPECIFIED:
        return DEFAULT_LANGUAGE
    return next((name for name, number in LANGUAGES.items() if number == value), None)
