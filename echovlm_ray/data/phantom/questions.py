"""Questions about a picture with their true answers, among them "cannot be told", and the options of a diagnosis."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from echovlm_ray.data.phantom.attributes import Attributes
from echovlm_ray.data.phantom.parsing import parse_values, read_yes_or_no
from echovlm_ray.data.phantom.regions import REGIONS
from echovlm_ray.data.phantom.schema import SIDE, Organ, Region, words
from echovlm_ray.data.phantom.wording.render import lead_sentence, value_words
from echovlm_ray.tasks import Language

CANNOT_BE_TOLD = "cannot_be_told"
_CANNOT = words("This cannot be told from the image", "图像无法判断", "cannot be told", "无法判断")
# What no phantom decides, and why.
_UNDECIDED = {
    "millimetres": (
        words("How many millimetres does the lesion measure?", "病灶大小是多少毫米？"),
        words("there is no scale", "没有标尺"),
    ),
    "flow": (
        words("Is there flow on colour Doppler?", "彩色多普勒有血流信号吗？"),
        words("there is no colour Doppler", "没有彩色多普勒"),
    ),
    "age": (
        words("How old is the patient?", "患者年龄多大？"),
        words("the age is not shown", "未显示年龄"),
    ),
}
_NO_MARKER = words("there is no body marker", "没有体位标记")
_IS_NORMAL = words("Is the image normal?", "图像正常吗？")


@dataclass(frozen=True, slots=True)
class Question:
    """A question about one picture.

    Attributes:
        organ: the region shown.
        about: an attribute; or "normal", or what cannot be told: "millimetres", "flow", "age".
        expected: the value's name; "yes" or "no" for "normal"; `CANNOT_BE_TOLD`.
        text: of the question.
        answer: the true answer in words.
    """

    organ: Organ
    about: str
    expected: str
    text: str
    answer: str


def questions(attributes: Attributes, language: Language) -> tuple[Question, ...]:
    """All questions about a picture: each attribute stated of it, whether it is normal, and what cannot be told."""
    assert attributes.organ is not None
    return tuple(_questions(attributes, attributes.organ, language))


def read_answer(text: str, question: Question, language: Language) -> str | None:
    """Parses an answer in the terms of `Question.expected`; None if it has no value or several."""
    plain = text.lower()
    if any(phrase.lower() in plain for phrase in _CANNOT.read(language)):
        return CANNOT_BE_TOLD
    if question.about == "normal":
        return read_yes_or_no(text, language)
    return parse_values(text, language, question.organ).get(question.about)


def diagnosis_options(organ: Organ, language: Language, rng: np.random.Generator) -> tuple[str, ...]:
    """The diagnoses of a region in random order; one of them is right, so chance is at most 0.2."""
    names = [phantom_class.diagnosis.written(language)[0] for phantom_class in REGIONS[organ].classes]
    return tuple(names[index] for index in rng.permutation(len(names)))


def options_text(options: tuple[str, ...], language: Language) -> str:
    """The options as they are added to the question."""
    return f"Options: {'; '.join(options)}." if language == "en" else f"选项：{'；'.join(options)}。"


def _questions(attributes: Attributes, organ: Organ, language: Language) -> Iterator[Question]:
    region = REGIONS[organ]
    for name, value in attributes.pairs:
        text = region.attribute[name].question.written(language)[0]
        if any(sentence.lead == name for sentence in region.sentences):
            answer = lead_sentence(region, name, value, language)
        else:
            answer = _answer(value_words(region, name, value, language), language)
        yield Question(organ, name, value, text, answer)
    if region.has_side and attributes.side is None:
        text = region.attribute[SIDE].question.written(language)[0]
        yield Question(organ, SIDE, CANNOT_BE_TOLD, text, _cannot(_NO_MARKER.written(language)[0], language))
    yield _normal_question(attributes, region, language)
    for about, (question, reason) in _UNDECIDED.items():
        # Where there is no lesion, there is nothing to measure.
        if about == "millimetres" and attributes.get("size") is None:
            continue
        text = question.written(language)[0]
        yield Question(organ, about, CANNOT_BE_TOLD, text, _cannot(reason.written(language)[0], language))


def _normal_question(attributes: Attributes, region: Region, language: Language) -> Question:
    assert attributes.class_name is not None
    diagnosis = region.class_named[attributes.class_name].diagnosis.written(language)[0]
    expected = "yes" if attributes.is_normal else "no"
    if language == "en":
        answer = f"{expected.capitalize()}, {diagnosis}."
    else:
        answer = f"{'是' if attributes.is_normal else '否'}，{diagnosis}。"
    return Question(region.organ, "normal", expected, _IS_NORMAL.written(language)[0], answer)


def _answer(text: str, language: Language) -> str:
    return f"{text[:1].upper()}{text[1:]}." if language == "en" else f"{text}。"


def _cannot(reason: str, language: Language) -> str:
    start = _CANNOT.written(language)[0]
    return f"{start}: {reason}." if language == "en" else f"{start}：{reason}。"
