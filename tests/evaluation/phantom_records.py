"""Records with known truth: attributes of phantoms, their reports and questions, and small images."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from echovlm_ray.data.dataset import RecordDataset
from echovlm_ray.data.phantom.attributes import Attributes
from echovlm_ray.data.phantom.catalogue import draw_attributes
from echovlm_ray.data.phantom.phantom import NOTICE
from echovlm_ray.data.phantom.questions import diagnosis_options, options_text, questions
from echovlm_ray.data.phantom.schema import Organ
from echovlm_ray.data.phantom.wording.render import render, render_diagnosis
from echovlm_ray.evaluation.items import Item, load_items
from echovlm_ray.prompts import FURTHER
from echovlm_ray.tasks import TASKS, Language
from tests.data.records import png, turns, write_lines

CLASSES: tuple[tuple[Organ, str], ...] = (
    ("breast", "normal"),
    ("breast", "simple_cyst"),
    ("breast", "circumscribed_mass"),
    ("kidney", "normal"),
    ("kidney", "simple_cyst"),
)


def phantom_record(
    identity: str, attributes: Attributes, task: str, language: Language, image: str, patient: str | None = None
) -> dict[str, Any]:
    """A record of one of the tasks report, diagnosis and vqa."""
    assert attributes.organ is not None
    more: dict[str, Any] = {}
    if task == "report":
        question, answer = TASKS["report"].instructions[language], render(attributes, language)
    elif task == "diagnosis":
        options = diagnosis_options(attributes.organ, language, np.random.default_rng(0))
        more["options"] = list(options)
        question = f"{TASKS['diagnosis'].instructions[language]}\n{FURTHER[language]}{options_text(options, language)}"
        answer = render_diagnosis(attributes, language)
    else:
        asked = questions(attributes, language)[0]
        question, answer = asked.text, asked.answer
    return {
        "id": identity,
        "image": [image],
        "conversations": turns(f"<image>{question}", answer),
        "organ": attributes.organ,
        "task": task,
        "language": language,
        "attributes": attributes.as_json(),
        "notice": NOTICE,
        **({} if patient is None else {"patient": patient}),
        **more,
    }


def phantom_records(count: int, tasks: Sequence[str] = ("report", "diagnosis", "vqa")) -> list[dict[str, Any]]:
    """Records of all classes, tasks and both languages in turn; each with an image of its own."""
    rng = np.random.default_rng(1)
    records = []
    for number in range(count):
        organ, class_name = CLASSES[number % len(CLASSES)]
        language: Language = "en" if number // len(CLASSES) % 2 == 0 else "zh"
        task = tasks[number // (2 * len(CLASSES)) % len(tasks)]
        attributes = draw_attributes(rng, organ, class_name)
        patient = f"p{number // 2}"
        records.append(phantom_record(f"r{number}", attributes, task, language, f"{number}.png", patient))
    return records


def write_phantoms(folder: Path, count: int, tasks: Sequence[str] = ("report", "diagnosis", "vqa")) -> Path:
    """A dataset with its images in a folder."""
    for number in range(count):
        (folder / f"{number}.png").write_bytes(png(1 + number % 250, (56, 56)))
    return write_lines(folder / "data.jsonl", phantom_records(count, tasks))


def items_of(path: Path) -> tuple[Item, ...]:
    with RecordDataset(path) as dataset:
        return load_items(dataset).items
