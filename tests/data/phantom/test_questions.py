"""Questions with true answers, and those that a picture does not answer."""

import pytest

from echovlm_ray.data.phantom.catalogue import all_classes, attribute_sets
from echovlm_ray.data.phantom.questions import CANNOT_BE_TOLD, Question, questions, read_answer
from echovlm_ray.tasks import LANGUAGES, Language


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_true_answer_reads_as_what_is_expected(language: Language) -> None:
    for organ, name in all_classes():
        for attributes in attribute_sets(organ, name):
            for question in questions(attributes, language):
                assert read_answer(question.answer, question, language) == question.expected, question


def by_subject(organ_and_class: tuple[str, str], language: Language, side: str | None) -> dict[str, Question]:
    organ, name = next(pair for pair in all_classes() if pair == organ_and_class)
    attributes = next(found for found in attribute_sets(organ, name) if found.side == side)
    return {question.about: question for question in questions(attributes, language)}


def test_what_the_pixels_do_not_decide_cannot_be_told() -> None:
    asked = by_subject(("breast", "simple_cyst"), "en", None)
    assert {about for about, question in asked.items() if question.expected == CANNOT_BE_TOLD} == {
        "side",
        "millimetres",
        "flow",
        "age",
    }
    assert asked["side"].answer == "This cannot be told from the image: there is no body marker."


def test_a_body_marker_decides_the_side() -> None:
    assert by_subject(("breast", "simple_cyst"), "en", "left")["side"].expected == "left"
    assert "side" not in by_subject(("liver", "normal"), "en", None)


def test_normal_or_not() -> None:
    assert by_subject(("liver", "normal"), "en", None)["normal"].answer == "Yes, normal liver."
    assert by_subject(("liver", "cirrhosis"), "zh", None)["normal"].answer == "否，肝硬化。"


def test_nothing_to_measure_where_there_is_no_lesion() -> None:
    assert "millimetres" not in by_subject(("breast", "normal"), "en", None)


@pytest.mark.parametrize("text", ["", "Maybe.", "small or large: small, large", "It is nice."])
def test_a_vague_answer_says_nothing(text: str) -> None:
    asked = by_subject(("breast", "simple_cyst"), "en", None)
    assert read_answer(text, asked["size"], "en") is None
    assert read_answer(text, asked["normal"], "en") is None
