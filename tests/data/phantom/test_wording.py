"""Reports and their parser: every attribute set, both languages, every style."""

import re

import pytest

from echovlm_ray.data.phantom.attributes import Attributes
from echovlm_ray.data.phantom.catalogue import all_classes, attribute_sets, attributes_of
from echovlm_ray.data.phantom.parsing import parse, parse_diagnosis, parse_organ
from echovlm_ray.data.phantom.questions import diagnosis_options, questions
from echovlm_ray.data.phantom.regions import REGIONS
from echovlm_ray.data.phantom.schema import NORMAL, ORGANS, Organ
from echovlm_ray.data.phantom.wording.render import (
    STYLES,
    all_wordings,
    render,
    render_caption,
    render_diagnosis,
    render_findings,
    render_impression,
)
from echovlm_ray.tasks import LANGUAGES, Language
from tests.data.phantom.generators import generator

CLASSES = all_classes()


def every_set() -> list[Attributes]:
    return [attributes for organ, name in CLASSES for attributes in attribute_sets(organ, name)]


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_report_reads_back_as_what_it_was_written_from(language: Language) -> None:
    for attributes in every_set():
        for text in all_wordings(attributes, language):
            assert parse(text, language) == attributes, text


@pytest.mark.parametrize("language", LANGUAGES)
def test_no_two_attribute_sets_share_a_report(language: Language) -> None:
    seen: dict[str, Attributes] = {}
    for attributes in every_set():
        for text in all_wordings(attributes, language):
            assert seen.setdefault(text, attributes) == attributes, text


@pytest.mark.parametrize("language", LANGUAGES)
def test_styles_differ(language: Language) -> None:
    for organ, name in CLASSES:
        attributes = next(attribute_sets(organ, name))
        assert len(all_wordings(attributes, language)) == STYLES
        assert all(render(attributes, language, style) in all_wordings(attributes, language) for style in range(STYLES))


def test_the_published_form() -> None:
    attributes = attributes_of(
        "breast",
        "simple_cyst",
        {
            "side": "left",
            "tissue": "fatty",
            "lesion": "mass",
            "size": "small",
            "depth": "deep",
            "shape": "oval",
            "orientation": "parallel",
            "margin": "circumscribed",
            "echo": "anechoic",
            "posterior": "enhancement",
        },
    )
    assert render(attributes, "en") == (
        "Ultrasound findings: Left breast: fatty tissue. Mass: small, deep, oval, parallel to the skin, circumscribed "
        "margin, anechoic, posterior enhancement; Ultrasound impression: simple cyst, BI-RADS 2."
    )
    assert render(attributes, "zh") == (
        "超声所见：左侧乳腺：脂肪型组织。肿块：体积小，位置深，椭圆形，平行于皮肤，边缘光整，无回声，后方回声增强；"
        "超声提示：单纯囊肿，BI-RADS 2类。"
    )


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize(("organ", "name"), CLASSES)
def test_the_parts_of_a_report_say_the_same(organ: Organ, name: str, language: Language) -> None:
    for attributes in attribute_sets(organ, name):
        for style in range(STYLES):
            findings = parse(render_findings(attributes, language, style), language)
            assert (findings.organ, findings.class_name, findings.pairs) == (organ, None, attributes.pairs)
            assert parse_diagnosis(render_impression(attributes, language, style), language, organ) == name
        for text in (render_caption(attributes, language), render_diagnosis(attributes, language)):
            assert parse_diagnosis(text, language, organ) == name
        assert parse_organ(render_caption(attributes, language), language) == organ


def test_the_vocabulary_is_small() -> None:
    words: set[str] = set()
    characters: set[str] = set()
    for attributes in every_set():
        for language in LANGUAGES:
            texts = [*all_wordings(attributes, language), render_diagnosis(attributes, language)]
            texts += [part for question in questions(attributes, language) for part in (question.text, question.answer)]
            joined = " ".join(texts)
            if language == "en":
                words.update(re.findall(r"[a-z0-9]+", joined.lower()))
            else:
                characters.update(joined)
    assert len(words) + len(characters) < 700


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("organ", ORGANS)
def test_chance_among_the_options_is_at_most_a_fifth(organ: Organ, language: Language) -> None:
    options = diagnosis_options(organ, language, generator())
    assert len(set(options)) == len(options) >= 5
    read = {parse_diagnosis(option, language, organ) for option in options}
    assert read == {phantom_class.name for phantom_class in REGIONS[organ].classes}


def test_every_region_begins_with_normal() -> None:
    assert all(region.classes[0].name == NORMAL for region in REGIONS.values())


def test_words_of_a_region_mean_one_thing() -> None:
    for region in REGIONS.values():
        for language in LANGUAGES:
            texts = [
                text
                for attribute in region.attributes
                for value in attribute.values.values()
                for text in value.read(language)
            ]
            assert len(texts) == len(set(texts)), region.organ


def test_only_attributes_of_the_class_are_taken() -> None:
    with pytest.raises(ValueError, match="tissue of breast/normal is one of fatty, fibroglandular, mixed, not 'dense'"):
        attributes_of("breast", "normal", {"tissue": "dense", "lesion": "none"})
    with pytest.raises(ValueError, match="breast/normal needs a value each of tissue, lesion"):
        attributes_of("breast", "normal", {"tissue": "fatty"})
    with pytest.raises(ValueError, match="heart/normal needs"):
        attributes_of("heart", "normal", {"side": "left"})


def test_attributes_survive_json() -> None:
    for attributes in every_set():
        assert Attributes.from_json(attributes.as_json()) == attributes
