"""Judges an answer: attributes, diagnosis, the answer to a question, normal or not.

An answer is parsed by the phantoms' parser. Attributes that are missing or contradictory are wrong: the absence of
keywords never means "normal".
"""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from echovlm_ray.data.phantom.attributes import Attributes
from echovlm_ray.data.phantom.parsing import parse, parse_diagnosis
from echovlm_ray.data.phantom.polarity import Polarity, polarities
from echovlm_ray.data.phantom.questions import read_answer
from echovlm_ray.evaluation.items import Item
from echovlm_ray.tasks import Language

NORMAL, ABNORMAL = "normal", "abnormal"


@dataclass(frozen=True, slots=True)
class Judgement:
    """The judgement of one answer. Fields without a truth in the record are None.

    Attributes:
        attributes: true positives, false positives and false negatives.
        exact: whether every attribute is right, and nothing contradicts.
        diagnosis: the true class and the one that the answer names, None where it names none or several.
        choice: likewise for a question: the expected answer and the given one.
        normal: "normal" or "abnormal", and the answer's value, None if it is neither.
        missed: attributes that are not right, by name.
    """

    attributes: tuple[int, int, int] | None = None
    exact: bool | None = None
    diagnosis: tuple[str, str | None] | None = None
    choice: tuple[str, str | None] | None = None
    normal: tuple[str, str | None] | None = None
    missed: tuple[str, ...] = ()


def judge(item: Item, answer: str) -> Judgement:
    """Compares an answer with its record."""
    if item.states and item.attributes is not None:
        return _judge_text(item, item.attributes, answer)
    if item.question is not None:
        return Judgement(choice=(f"{item.question.about}: {item.question.expected}", _read(item, answer)))
    if item.answer is not None and item.options:
        truth, given = item.answer, match_option(answer, item.options, item.language)
        return Judgement(diagnosis=(truth, given)) if item.kind == "diagnosis" else Judgement(choice=(truth, given))
    if item.answer is not None and item.kind == "question":
        return Judgement(choice=(item.answer, item.answer if _plain(answer) == _plain(item.answer) else None))
    return Judgement()


def _read(item: Item, answer: str) -> str | None:
    assert item.question is not None
    given = read_answer(answer, item.question, item.language)
    return None if given is None else f"{item.question.about}: {given}"


def _judge_text(item: Item, truth: Attributes, answer: str) -> Judgement:
    stated = item.states
    # A text that should state its region counts only for that one.
    found = parse(answer, item.language, None if "organ" in stated else truth.organ)
    if stated == ("diagnosis",) and truth.organ is not None:
        class_name = parse_diagnosis(answer, item.language, truth.organ)
    else:
        class_name = found.class_name
    expected = _pairs(truth, truth.class_name, stated)
    given = _pairs(found, class_name, stated)
    # What is stated in two ways is a wrong statement too. Without findings, no category follows from what is stated.
    conflicts = [name for name in found.contradictions if "values" in stated or name in ("organ", "diagnosis")]
    wrong = len(given - expected) + len([name for name in conflicts if name not in dict(given)])
    missing = expected - given
    right = class_name if found.organ == truth.organ else None
    judged = truth.class_name if "diagnosis" in stated else None
    return Judgement(
        attributes=(len(given & expected), wrong, len(missing)),
        exact=not missing and not wrong,
        diagnosis=None if judged is None else (_class(truth, judged), right and _class(truth, right)),
        normal=None if judged is None else (_normal(truth.is_normal), _said_normal(right)),
        missed=tuple(sorted(name for name, _ in missing)),
    )


def _pairs(attributes: Attributes, class_name: str | None, stated: Sequence[str]) -> set[tuple[str, str]]:
    pairs: set[tuple[str, str]] = set()
    if "organ" in stated and attributes.organ is not None:
        pairs.add(("organ", attributes.organ))
    if "values" in stated:
        pairs.update(attributes.pairs)
    if "diagnosis" in stated and class_name is not None:
        pairs.add(("diagnosis", class_name))
    return pairs


def _class(attributes: Attributes, class_name: str) -> str:
    return f"{attributes.organ}: {class_name}"


def _normal(is_normal: bool) -> str:
    return NORMAL if is_normal else ABNORMAL


def _said_normal(class_name: str | None) -> str | None:
    return None if class_name is None else _normal(class_name == NORMAL)


def match_option(answer: str, options: Sequence[str], language: Language) -> str | None:
    """The one option that an answer gives: the same text, else the only one that it states; None where it is unclear.

    An option that is part of another one counts only where it stands alone, and one that is denied or left open ("not
    a cyst", "cyst cannot be excluded") not at all.
    """
    plain = _plain(answer)
    exact = [option for option in options if _plain(option) == plain]
    if exact:
        return exact[0]
    spans: dict[tuple[int, int], str] = {}
    for option in sorted(options, key=len, reverse=True):
        for match in _pattern(option).finditer(plain):
            if not any(start < match.end() and match.start() < end for start, end in spans):
                spans[match.span()] = option
    ordered = sorted(spans)
    found = zip(ordered, polarities(plain, ordered, language), strict=True)
    named = {spans[span] for span, polarity in found if polarity is Polarity.STATED}
    return named.pop() if len(named) == 1 else None


def _pattern(option: str) -> re.Pattern[str]:
    text = re.escape(_plain(option))
    # Whole words only, where a script has words.
    return re.compile(rf"(?<![a-z0-9]){text}(?![a-z0-9])")


def _plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).lower().replace("。", ".").split()).strip(" .;")
