"""Records about a phantom in the format of EchoVLM's authors: questions and true answers."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from echovlm_ray.data.phantom.attributes import Attributes
from echovlm_ray.data.phantom.draws import draws
from echovlm_ray.data.phantom.phantom import NOTICE
from echovlm_ray.data.phantom.questions import diagnosis_options, options_text, questions
from echovlm_ray.data.phantom.wording.render import (
    STYLES,
    all_wordings,
    render,
    render_caption,
    render_diagnosis,
    render_findings,
    render_impression,
    value_of_class,
)
from echovlm_ray.prompts import Medium, build_messages
from echovlm_ray.tasks import TASKS, Language, TaskName, Wording

Record = dict[str, Any]


def records(
    attributes: Attributes,
    seed: int,
    index: int,
    *,
    path: str,
    medium: Medium = "image",
    tasks: Sequence[TaskName] = ("report",),
    languages: Sequence[Language] = ("en", "zh"),
    questions_each: int = 2,
) -> Iterator[Record]:
    """The records about one phantom.

    Args:
        attributes: what it shows.
        seed: of the corpus; with `index` it decides wording, questions and the order of options.
        index: of the phantom.
        path: of its file, as the record has it.
        medium: "video" for a loop.
        tasks: of `phantom_tasks`.
        languages: of question and answer.
        questions_each: the number of questions ("vqa") in each language.
    """
    for language in languages:
        for task in tasks:
            rng = draws(seed, index, f"{task} {language}")
            wording = TASKS[task].phantoms
            if wording == "question":
                available = questions(attributes, language)
                picked = sorted(rng.permutation(len(available))[:questions_each])
                for number, question in enumerate(available[place] for place in picked):
                    extra = {"answer": question.answer, "about": question.about, "expected": question.expected}
                    start = _record(attributes, seed, index, path, medium, task, language, question.text)
                    yield _answered(start, question.answer, extra, f"-{number + 1}")
                continue
            prompt, extra = "", {}
            if wording == "diagnosis":
                assert attributes.organ is not None
                options = diagnosis_options(attributes.organ, language, rng)
                prompt = options_text(options, language)
                extra = {"options": list(options), "answer": value_of_class(attributes, language)}
            answer = _answer(attributes, wording, language, int(rng.integers(STYLES)))
            if wording == "report":
                extra = {"references": [text for text in all_wordings(attributes, language) if text != answer]}
            yield _answered(_record(attributes, seed, index, path, medium, task, language, prompt), answer, extra)


def _answer(attributes: Attributes, wording: Wording | None, language: Language, style: int) -> str:
    if wording == "report":
        return render(attributes, language, style)
    if wording == "findings":
        return render_findings(attributes, language, style)
    if wording == "impression":
        return render_impression(attributes, language, style)
    if wording == "caption":
        return render_caption(attributes, language)
    assert wording == "diagnosis", "no phantom answers this task"
    return render_diagnosis(attributes, language)


def _record(
    attributes: Attributes,
    seed: int,
    index: int,
    path: str,
    medium: Medium,
    task: TaskName,
    language: Language,
    prompt: str,
) -> Record:
    system, user = build_messages(task, language, prompt, [medium])
    name = f"{attributes.organ}-{attributes.class_name}-{seed}-{index}"
    media = {"image": [path]} if medium == "image" else {"image": [], "video": [path]}
    text = "".join(part["text"] if part["type"] == "text" else f"<{part['type']}>" for part in user["content"])
    return {
        "id": f"{name}-{task}-{language}",
        **media,
        "conversations": [
            {"from": "system", "value": "".join(part["text"] for part in system["content"] if part["type"] == "text")},
            {"from": "human", "value": text},
        ],
        "organ": attributes.organ,
        "task": task,
        "language": language,
        # Every phantom is a separate patient.
        "patient": f"phantom-{seed}-{index}",
        "attributes": attributes.as_json(),
        "notice": NOTICE,
    }


def _answered(record: Record, answer: str, extra: Mapping[str, Any], suffix: str = "") -> Record:
    record["id"] += suffix
    record["conversations"].append({"from": "gpt", "value": answer})
    return {**record, **extra}
