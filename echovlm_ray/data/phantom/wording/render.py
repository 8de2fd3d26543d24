"""Attributes to text: the report and its parts, each in a few styles of wording."""

from itertools import chain
from types import ModuleType

from echovlm_ray.data.phantom.attributes import Attributes
from echovlm_ray.data.phantom.catalogue import find_class
from echovlm_ray.data.phantom.regions import REGIONS
from echovlm_ray.data.phantom.schema import SIDE, Region, Words
from echovlm_ray.data.phantom.scores import category
from echovlm_ray.data.phantom.wording import chinese, english
from echovlm_ray.tasks import Language

STYLES = 3
_GRAMMAR: dict[Language, ModuleType] = {"en": english, "zh": chinese}


def render(attributes: Attributes, language: Language, style: int = 0) -> str:
    """The report, in the form "Ultrasound findings: …; Ultrasound impression: …".

    Args:
        attributes: complete, as of a picture.
        language: "en" or "zh".
        style: 0, 1 or 2; the wording, not the content, depends on it.
    """
    grammar = _GRAMMAR[language]
    return str(
        grammar.FINDINGS
        + _findings(attributes, language, style)
        + grammar.BETWEEN_SECTIONS
        + grammar.IMPRESSION
        + _impression(attributes, language, style)
        + grammar.END
    )


def render_findings(attributes: Attributes, language: Language, style: int = 0) -> str:
    """The findings alone."""
    grammar = _GRAMMAR[language]
    return f"{grammar.FINDINGS}{_findings(attributes, language, style)}{grammar.END}"


def render_impression(attributes: Attributes, language: Language, style: int = 0) -> str:
    """The impression alone."""
    grammar = _GRAMMAR[language]
    return f"{grammar.IMPRESSION}{_impression(attributes, language, style)}{grammar.END}"


def render_caption(attributes: Attributes, language: Language) -> str:
    """One sentence: what is looked at, and the diagnosis."""
    _, _, diagnosis = _parts(attributes, language)
    return str(_GRAMMAR[language].caption(subject(attributes, language), diagnosis[0]))


def render_diagnosis(attributes: Attributes, language: Language) -> str:
    """The diagnosis, and the signs that every picture of its class has."""
    region, fixed, diagnosis = _parts(attributes, language)
    signs = [region.attribute[name].values[value].written(language)[0] for name, value in fixed]
    return str(_GRAMMAR[language].diagnosis_answer(diagnosis[0], signs))


def all_wordings(attributes: Attributes, language: Language) -> tuple[str, ...]:
    """The report in every style: what an n-gram metric needs as references."""
    return tuple(dict.fromkeys(render(attributes, language, style) for style in range(STYLES)))


def subject(attributes: Attributes, language: Language) -> str:
    """What is looked at, with the side where a body marker shows it: "left breast"."""
    region, _, _ = _parts(attributes, language)
    side = "" if attributes.side is None else value_words(region, SIDE, attributes.side, language)
    return " ".join(region.subject.written(language)[0].format(side=side).split())


def value_words(region: Region, name: str, value: str, language: Language, style: int = 0) -> str:
    """The words of one value."""
    return _pick(region.attribute[name].values[value], language, style)


def value_of_class(attributes: Attributes, language: Language) -> str:
    """The diagnosis in the words that options have."""
    return _parts(attributes, language)[2][0]


def stated_words(attributes: Attributes, language: Language) -> tuple[str, ...]:
    """Every wording that a text can have for the values and the diagnosis."""
    region, _, diagnosis = _parts(attributes, language)
    values = (region.attribute[name].values[value].written(language) for name, value in attributes.pairs)
    return tuple(dict.fromkeys(chain(diagnosis, *values)))


def lead_sentence(region: Region, name: str, value: str, language: Language) -> str:
    """A sentence that states one value: "There is a mass."."""
    grammar = _GRAMMAR[language]
    return str(grammar.lead_sentence(value_words(region, name, value, language, 1), (), 1) + grammar.END)


def _pick(choice: Words, language: Language, style: int) -> str:
    written = choice.written(language)
    return written[style % len(written)]


def _parts(attributes: Attributes, language: Language) -> tuple[Region, list[tuple[str, str]], tuple[str, ...]]:
    assert attributes.organ is not None
    assert attributes.class_name is not None
    phantom_class = find_class(attributes.organ, attributes.class_name)
    fixed = [(name, values[0]) for name, values in phantom_class.choices.items() if len(values) == 1]
    return REGIONS[attributes.organ], fixed, phantom_class.diagnosis.written(language)


def _findings(attributes: Attributes, language: Language, style: int) -> str:
    grammar = _GRAMMAR[language]
    region, _, _ = _parts(attributes, language)
    values = attributes.values
    sentences = []
    for sentence in region.sentences:
        clauses = [
            value_words(region, name, values[name], language, style) for name in sentence.attributes if name in values
        ]
        if sentence.lead is None:
            sentences.append(grammar.subject_sentence(subject(attributes, language), clauses, style))
        else:
            lead = value_words(region, sentence.lead, values[sentence.lead], language, style)
            sentences.append(grammar.lead_sentence(lead, clauses, style))
    return str(grammar.BETWEEN_SENTENCES.join(sentences))


def _impression(attributes: Attributes, language: Language, style: int) -> str:
    _, _, diagnosis = _parts(attributes, language)
    found = category(attributes)
    text = None if found is None else found.text(language)
    return str(_GRAMMAR[language].impression(diagnosis[style % len(diagnosis)], text, style))
