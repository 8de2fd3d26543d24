"""Text to attributes: strict, so that a text that says nothing is worth nothing.

Only words that are there count. No keyword is not "normal"; a value and its opposite together are no value, but a
contradiction; a word that is denied or left open ("no cyst", "cyst cannot be excluded") states nothing of its own.
"""

import re
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache

from echovlm_ray.data.phantom.attributes import Attributes
from echovlm_ray.data.phantom.polarity import Polarity, polarities, without_doubt
from echovlm_ray.data.phantom.regions import REGIONS
from echovlm_ray.data.phantom.schema import Organ, Region
from echovlm_ray.data.phantom.scores import category
from echovlm_ray.tasks import Language

# What begins a section.
_MARKS = {
    "en": re.compile(r"(?:ultrasound )?(?:(?P<findings>findings)|(?P<impression>impression))\s*:"),
    "zh": re.compile(r"(?:超声)?(?:(?P<findings>所见|表现)|(?P<impression>提示|诊断)):"),
}


@dataclass(frozen=True, slots=True)
class _Mention:
    name: str
    value: str
    polarity: Polarity


def parse(text: str, language: Language, organ: Organ | None = None) -> Attributes:
    """What a text states, from a person or a model.

    A text with the marks of findings and impression is read by section: attributes from the findings, the diagnosis
    and the category from the impression. Any other text is read as a whole.

    Args:
        text: a report, or anything else.
        language: "en" or "zh".
        organ: the region that the text is about, where it is known; else it has to be named in the text.

    Returns:
        What is stated. Of a text without any keyword nothing is.
    """
    plain = _plain(text, language)
    findings, impression = _sections(plain, language)
    contradictions: list[str] = []
    if organ is None:
        organ, several = _organ(plain, findings, language)
        if several:
            contradictions.append("organ")
    if organ is None:
        return Attributes(None, None, (), tuple(contradictions))
    region = REGIONS[organ]
    class_name, several = _diagnosis(impression, region, language)
    if several:
        contradictions.append("diagnosis")
    values, conflicting = _values(findings, region, language)
    contradictions.extend(conflicting)
    pairs = tuple((name, values[name]) for name in region.attribute if name in values)
    attributes = Attributes(organ, class_name, pairs)
    contradictions.extend(_against_diagnosis(attributes, region))
    if _category_differs(impression, attributes, language):
        contradictions.append("category")
    return Attributes(organ, class_name, pairs, tuple(dict.fromkeys(contradictions)))


def parse_diagnosis(text: str, language: Language, organ: Organ) -> str | None:
    """The class that a text names, among those of an organ; None where it names none, or several."""
    _, impression = _sections(_plain(text, language), language)
    return _diagnosis(impression, REGIONS[organ], language)[0]


def parse_organ(text: str, language: Language) -> Organ | None:
    """The region that a text names; None where it names none, or several."""
    plain = _plain(text, language)
    return _organ(plain, _sections(plain, language)[0], language)[0]


def parse_values(text: str, language: Language, organ: Organ) -> Mapping[str, str]:
    """Attribute → value of a text about a known region, read as a whole, without those stated in two ways."""
    return _values(_plain(text, language), REGIONS[organ], language)[0]


def read_yes_or_no(text: str, language: Language) -> str | None:
    """ "yes" or "no" where an answer begins with it, else None."""
    found = re.match(r"(yes\b|是(?!否|不是|吗))|(no\b|否|不是)", _plain(text, language))
    if found is None:
        return None
    return "yes" if found.group(1) else "no"


def _plain(text: str, language: Language) -> str:
    """Lower case, one kind of punctuation, single spaces; in Chinese none."""
    folded = unicodedata.normalize("NFKC", text).lower().replace("。", ".")
    folded = re.sub(r"[\u2010-\u2015\u2212]", "-", folded)
    return re.sub(r"\s+", "" if language == "zh" else " ", folded)


def _sections(plain: str, language: Language) -> tuple[str, str]:
    """All findings and all impressions; the whole text for both where neither is marked.

    What stands before the first mark belongs to the findings.
    """
    marks = list(_MARKS[language].finditer(plain))
    if not marks:
        return plain, plain
    parts: dict[str, list[str]] = {"findings": [plain[: marks[0].start()]], "impression": []}
    for mark, end in zip(marks, [*(mark.start() for mark in marks[1:]), len(plain)], strict=True):
        parts[mark.lastgroup or "findings"].append(plain[mark.end() : end])
    return " . ".join(parts["findings"]), " . ".join(parts["impression"])


def _organ(plain: str, findings: str, language: Language) -> tuple[Organ | None, bool]:
    """The region named, by the findings where they name one; and whether the text names several."""
    everywhere = _organs(plain, language)
    found = _organs(findings, language) or everywhere
    return (next(iter(found)) if len(found) == 1 else None), len(everywhere) > 1


def _organs(part: str, language: Language) -> set[Organ]:
    pattern, meanings = _subject_pattern(language)
    named = (meanings[re.sub(r"[\s-]+", " ", match.group())] for match in pattern.finditer(part))
    return {organ for organ in named if organ is not None}


def _diagnosis(impression: str, region: Region, language: Language) -> tuple[str | None, bool]:
    mentions = list(_mentions(impression, *_diagnosis_pattern(region.organ, language), language))
    named = {mention.value for mention in mentions if mention.polarity is Polarity.STATED}
    return (named.pop(), False) if len(named) == 1 else (None, len(named) > 1)


def _values(findings: str, region: Region, language: Language) -> tuple[dict[str, str], list[str]]:
    """The values stated once and for all, and the attributes stated in two ways."""
    pattern, _ = _diagnosis_pattern(region.organ, language)
    findings = pattern.sub(lambda diagnosis: without_doubt(diagnosis.group(), language), findings)
    stated: dict[str, set[str]] = {}
    denied: dict[str, set[str]] = {}
    for mention in _mentions(findings, *_value_pattern(region.organ, language), language):
        if mention.polarity is not Polarity.OPEN:
            kind = stated if mention.polarity is Polarity.STATED else denied
            kind.setdefault(mention.name, set()).add(mention.value)
    conflicting = [name for name, values in stated.items() if len(values) > 1 or values & denied.get(name, set())]
    return {name: next(iter(values)) for name, values in stated.items() if name not in conflicting}, conflicting


def _against_diagnosis(attributes: Attributes, region: Region) -> Iterator[str]:
    """Attributes that a picture of this class cannot have."""
    if attributes.class_name is None:
        return
    allowed: Mapping[str, tuple[str, ...]] = region.class_named[attributes.class_name].choices
    for name, value in attributes.pairs:
        if name != "side" and value not in allowed.get(name, ()):
            yield name


def _category_differs(impression: str, attributes: Attributes, language: Language) -> bool:
    """Whether a category is stated, and is not the one that follows from the attributes."""
    stated = re.search(r"(?:bi|ti|o|li)-?rads|\bsfu", impression)
    if stated is None or attributes.class_name is None or attributes.organ is None:
        return False
    try:
        found = category(attributes)
    except KeyError:
        # Too little is stated for a category to follow from it.
        return False
    return found is None or _plain(found.text(language), language) not in impression


def _mentions(
    text: str, pattern: re.Pattern[str], meanings: Mapping[str, tuple[str, str]], language: Language
) -> Iterator[_Mention]:
    """Every keyword in the text, the longest where several begin, and whether the text states it."""
    matches = list(pattern.finditer(text))
    found = polarities(text, [match.span() for match in matches], language)
    for match, polarity in zip(matches, found, strict=True):
        yield _Mention(*meanings[re.sub(r"[\s-]+", " ", match.group())], polarity=polarity)


def _compiled(phrases: list[str], language: Language) -> re.Pattern[str]:
    longest_first = sorted(phrases, key=len, reverse=True)
    alternatives = "|".join(r"[\s-]+".join(map(re.escape, re.split(r"[\s-]+", phrase))) for phrase in longest_first)
    return re.compile(rf"(?<![a-z])(?:{alternatives})(?![a-z])" if language == "en" else f"(?:{alternatives})")


def _key(phrase: str, language: Language) -> str:
    return re.sub(r"[\s-]+", " ", _plain(phrase, language))


@cache
def _subject_pattern(language: Language) -> tuple[re.Pattern[str], Mapping[str, Organ | None]]:
    """The words for regions; and diagnoses that contain the word for another region, which name none (血管瘤)."""
    meanings: dict[str, Organ | None] = {
        _key(text.format(side=""), language).strip(): organ
        for organ, region in REGIONS.items()
        for text in region.subject.read(language)
    }
    subjects = dict(meanings)
    for organ, region in REGIONS.items():
        for phantom_class in region.classes:
            for diagnosis in (_key(text, language) for text in phantom_class.diagnosis.read(language)):
                if any(word in diagnosis and other != organ for word, other in subjects.items()):
                    meanings.setdefault(diagnosis, None)
    return _compiled(list(meanings), language), meanings


@cache
def _diagnosis_pattern(organ: Organ, language: Language) -> tuple[re.Pattern[str], Mapping[str, tuple[str, str]]]:
    meanings = {
        _key(text, language): ("diagnosis", phantom_class.name)
        for phantom_class in REGIONS[organ].classes
        for text in phantom_class.diagnosis.read(language)
    }
    return _compiled(list(meanings), language), meanings


@cache
def _value_pattern(organ: Organ, language: Language) -> tuple[re.Pattern[str], Mapping[str, tuple[str, str]]]:
    meanings = {
        _key(text, language): (attribute.name, value)
        for attribute in REGIONS[organ].attributes
        for value, value_words in attribute.values.items()
        for text in value_words.read(language)
    }
    return _compiled(list(meanings), language), meanings
