"""The parser on texts that a model might write: strict, and never mistaken for normal."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from echovlm_ray.data.phantom.catalogue import all_classes, attribute_sets
from echovlm_ray.data.phantom.parsing import parse, parse_diagnosis, parse_organ
from echovlm_ray.data.phantom.regions import REGIONS
from echovlm_ray.data.phantom.schema import ORGANS, Organ
from echovlm_ray.data.phantom.wording.render import render, render_impression
from echovlm_ray.tasks import Language


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize(
    "text",
    [
        "",
        " \n",
        "asdf qwer",
        "超声",
        "Ultrasound findings: ; Ultrasound impression: .",
        "超声所见：；超声提示：。",
        "0 1 2 ,,,",
    ],
)
def test_a_text_without_keywords_says_nothing(text: str, language: Language) -> None:
    read = parse(text, language)
    assert (read.organ, read.class_name, read.pairs, read.is_normal) == (None, None, (), False)
    known = parse(text, language, organ="breast")
    assert (known.class_name, known.pairs, known.is_normal) == (None, (), False)


def test_normal_is_what_says_so() -> None:
    assert parse("Breast: fatty tissue; Ultrasound impression: normal breast.", "en").is_normal
    assert not parse("Ultrasound findings: Breast: fatty tissue. No mass; Ultrasound impression: .", "en").is_normal
    assert not parse("Breast with fatty tissue.", "en").is_normal


@pytest.mark.parametrize(
    ("text", "contradiction"),
    [
        ("Breast: small mass, large mass.", "size"),
        ("Breast: a mass. No mass.", "lesion"),
        ("Breast: anechoic, hypoechoic.", "echo"),
        ("Breast. Impression: simple cyst, suspicious mass, as in carcinoma.", "diagnosis"),
        ("Ultrasound findings: Breast, liver. Mass: oval; Ultrasound impression: simple cyst.", "organ"),
        ("Ultrasound findings: Breast. Mass: hypoechoic; Ultrasound impression: simple cyst.", "echo"),
        ("Ultrasound findings: Breast. Mass: oval; Ultrasound impression: normal breast.", "lesion"),
        ("Breast: oval. Not oval.", "shape"),
        (
            "Ultrasound findings: Breast: fatty tissue. No mass; Ultrasound impression: normal breast, BI-RADS 4.",
            "category",
        ),
    ],
)
def test_contradictions_are_found(text: str, contradiction: str) -> None:
    assert contradiction in parse(text, "en").contradictions


@pytest.mark.parametrize("language", ["en", "zh"])
def test_an_impression_alone_contradicts_nothing(language: Language) -> None:
    """A category follows from findings; where they are not stated, none can be compared with the one that is."""
    for organ, name in all_classes():
        attributes = next(iter(attribute_sets(organ, name)))
        found = parse(render_impression(attributes, language), language, organ)
        assert found.class_name == name
        assert found.contradictions == ()


def test_what_is_stated_in_two_ways_is_not_stated() -> None:
    read = parse("Breast: small, large, oval.", "en")
    assert read.values == {"shape": "oval"}


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("Breast without posterior enhancement", "en"),
        ("Breast: no posterior enhancement or shadowing", "en"),
        ("Breast: neither posterior enhancement nor shadowing", "en"),
        ("Breast: posterior enhancement is not seen", "en"),
        ("Breast: posterior shadowing absent", "en"),
        ("乳腺：未见后方回声增强", "zh"),
        ("乳腺：后方回声增强未见", "zh"),
        ("乳腺：无后方回声增强或声影", "zh"),
    ],
)
def test_negated_words_state_nothing(text: str, language: Language) -> None:
    assert parse(text, language).pairs == ()


def test_negation_ends_with_its_clause() -> None:
    read = parse("Breast: no calcification, posterior enhancement, not tender, oval.", "en")
    assert read.values == {"posterior": "enhancement", "shape": "oval"}


@pytest.mark.parametrize(
    ("text", "language", "expected"),
    [
        ("Thyroid: very hypoechoic, taller than wide.", "en", {"echogenicity": "very_hypoechoic", "shape": "taller"}),
        ("Breast: not parallel to the skin.", "en", {"orientation": "not_parallel"}),
        ("乳腺：不平行于皮肤，椭圆形", "zh", {"orientation": "not_parallel", "shape": "oval"}),
        ("Vessel: no plaque, no shadow.", "en", {"plaque": "none", "posterior": "none"}),
        ("BREAST:  Circumscribed\nmargin", "en", {"margin": "circumscribed"}),
        ("Thyroid: Comet‑Tail artefacts", "en", {"foci": "comet_tail"}),
    ],
)
def test_the_longest_words_win(text: str, language: Language, expected: dict[str, str]) -> None:
    assert parse(text, language).values == expected


@pytest.mark.parametrize(
    "text",
    [
        "Ultrasound findings: Breast: oval; Ultrasound impression: simple cyst.",
        "Findings: breast, oval. Impression: simple cyst.",
        "Impression: simple cyst. Findings: breast, oval.",
        "Breast, oval. Impression: simple cyst.",
        "Breast, oval, simple cyst.",
    ],
)
def test_sections_may_be_marked_or_not(text: str) -> None:
    read = parse(text, "en")
    assert (read.organ, read.class_name, read.values) == ("breast", "simple_cyst", {"shape": "oval"})


def test_words_inside_words_do_not_count() -> None:
    assert parse("Breast: ovaloid, smallish, massive.", "en").pairs == ()


def test_a_diagnosis_is_read_within_its_organ() -> None:
    assert parse_diagnosis("Simple cyst.", "en", "kidney") == "simple_cyst"
    assert parse_diagnosis("Simple cyst.", "en", "heart") is None
    assert parse_diagnosis("No simple cyst.", "en", "kidney") is None
    assert parse_diagnosis("Either simple cyst or kidney stone", "en", "kidney") is None


def test_an_organ_is_read_where_one_is_named() -> None:
    assert parse_organ("Image of the left kidney", "en") == "kidney"
    assert parse_organ("左侧甲状腺", "zh") == "thyroid"
    assert parse_organ("the heart and the liver", "en") is None


FRAGMENTS = sorted(
    {
        text
        for region in REGIONS.values()
        for attribute in region.attributes
        for value in attribute.values.values()
        for text in value.read("en")
    }
    | {
        text
        for region in REGIONS.values()
        for phantom_class in region.classes
        for text in phantom_class.diagnosis.read("en")
    }
    | {"no", "not", "or", "impression:", "findings:", ".", ",", ";", "BI-RADS 4", "TI-RADS 3 points", "SFU grade"}
)


@given(st.text(), st.sampled_from(["en", "zh"]), st.sampled_from([None, *ORGANS]))
def test_any_text_is_read_without_an_error(text: str, language: Language, organ: Organ | None) -> None:
    assert parse(text, language, organ).contradictions is not None


@given(st.lists(st.sampled_from(FRAGMENTS), max_size=12), st.sampled_from(ORGANS))
def test_a_heap_of_keywords_has_at_most_one_value_each(fragments: list[str], organ: Organ) -> None:
    read = parse(" ".join(fragments), "en", organ)
    assert len({name for name, _ in read.pairs}) == len(read.pairs)
    allowed = REGIONS[organ].attribute
    assert all(value in allowed[name].values for name, value in read.pairs)
    assert not {name for name, _ in read.pairs} & {
        name for name in read.contradictions if read.class_name is None and name in allowed
    }


@given(st.sampled_from(all_classes()), st.sampled_from(all_classes()), st.sampled_from(["en", "zh"]))
def test_two_reports_in_one_are_no_report(
    first: tuple[Organ, str], second: tuple[Organ, str], language: Language
) -> None:
    texts = [render(next(attribute_sets(*pair)), language) for pair in (first, second)]
    read = parse(" ".join(texts), language)
    if first == second:
        assert read.class_name == first[1]
    else:
        assert read.contradictions
