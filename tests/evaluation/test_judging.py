"""Scores of an answer's attributes; an empty answer has none right."""

import numpy as np
import pytest

from echovlm_ray.data.parse import parse_record
from echovlm_ray.data.phantom.catalogue import all_classes, attribute_sets, draw_attributes
from echovlm_ray.data.phantom.questions import questions
from echovlm_ray.data.phantom.records import records
from echovlm_ray.data.phantom.wording.render import all_wordings, render, render_diagnosis
from echovlm_ray.evaluation.items import Item, item_of
from echovlm_ray.evaluation.judging import judge, match_option
from echovlm_ray.tasks import Language, TaskName, phantom_tasks
from tests.data.records import record, turns
from tests.evaluation.phantom_records import CLASSES, phantom_record

RNG = np.random.default_rng(5)
CYST = draw_attributes(RNG, "breast", "simple_cyst")
NORMAL = draw_attributes(RNG, "breast", "normal")
KIDNEY_CYST = draw_attributes(RNG, "kidney", "simple_cyst")


def item(attributes: object, task: str, language: Language = "en") -> Item:
    parsed, problems = parse_record(phantom_record("r", attributes, task, language, "a.png"))  # type: ignore[arg-type]
    assert parsed is not None
    assert not problems
    return item_of(parsed, 0)


@pytest.mark.parametrize("language", ["en", "zh"])
def test_every_wording_of_the_truth_is_right(language: Language) -> None:
    for organ, class_name in CLASSES:
        attributes = next(iter(attribute_sets(organ, class_name)))
        for text in all_wordings(attributes, language):
            found = judge(item(attributes, "report", language), text)
            assert found.exact
            # Organ and diagnosis count too.
            assert found.attributes == (len(attributes.pairs) + 2, 0, 0)
            assert found.diagnosis == (f"{organ}: {class_name}",) * 2
            assert found.normal is not None
            assert found.normal[0] == found.normal[1] == ("normal" if class_name == "normal" else "abnormal")


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("task", phantom_tasks())
def test_every_answer_of_every_class_is_right(task: TaskName, language: Language) -> None:
    """The truth of each record that `echoray data phantom` writes has full marks."""
    for number, (organ, class_name) in enumerate(all_classes()):
        attributes = draw_attributes(np.random.default_rng(number), organ, class_name)
        for raw in records(attributes, 0, number, path="a.png", tasks=(task,), languages=(language,)):
            parsed, problems = parse_record(raw)
            assert parsed is not None
            assert not problems
            asked = item_of(parsed, 0)
            for text in asked.references:
                found = judge(asked, text)
                if task == "vqa":
                    assert found.choice is not None
                    assert found.choice[0] == found.choice[1]
                else:
                    assert found.exact, text
                    assert found.diagnosis is None or found.diagnosis[0] == found.diagnosis[1]
                    assert (found.diagnosis is None) == (task == "findings")


@pytest.mark.parametrize("answer", ["", " ", "asdf qwer", "The image was seen.", "囊肿"])
def test_rubbish_is_nothing_and_never_normal(answer: str) -> None:
    for attributes in (CYST, NORMAL):
        found = judge(item(attributes, "report"), answer)
        assert found.attributes == (0, 0, len(attributes.pairs) + 2)
        assert not found.exact
        assert found.normal is not None
        assert found.normal[1] is None
        assert found.diagnosis is not None
        assert found.diagnosis[1] is None


def test_a_wrong_report_is_wrong_where_it_is_wrong() -> None:
    found = judge(item(CYST, "report"), render(NORMAL, "en"))
    assert found.diagnosis == ("breast: simple_cyst", "breast: normal")
    assert found.normal == ("abnormal", "normal")
    assert found.attributes is not None
    right, wrong, missed = found.attributes
    assert right + missed == len(CYST.pairs) + 2
    assert wrong >= 2
    assert "diagnosis" in found.missed


def test_the_right_words_about_another_region_are_wrong() -> None:
    found = judge(item(CYST, "report"), render(KIDNEY_CYST, "en"))
    assert found.diagnosis == ("breast: simple_cyst", None)
    assert found.normal == ("abnormal", None)
    assert "organ" in found.missed


@pytest.mark.parametrize("language", ["en", "zh"])
def test_a_diagnosis(language: Language) -> None:
    asked = item(CYST, "diagnosis", language)
    assert judge(asked, render_diagnosis(CYST, language)).diagnosis == ("breast: simple_cyst",) * 2
    assert judge(asked, render_diagnosis(NORMAL, language)).diagnosis == ("breast: simple_cyst", "breast: normal")
    both = " ".join(asked.options)
    assert judge(asked, both).diagnosis == ("breast: simple_cyst", None)


@pytest.mark.parametrize("language", ["en", "zh"])
def test_a_question(language: Language) -> None:
    asked = item(CYST, "vqa", language)
    assert asked.question is not None
    truth = asked.question
    found = judge(asked, truth.answer).choice
    assert found == (f"{truth.about}: {truth.expected}",) * 2
    assert judge(asked, "").choice == (f"{truth.about}: {truth.expected}", None)
    cannot = next(q for q in questions(CYST, language) if q.expected == "cannot_be_told")
    assert judge(asked, cannot.answer).choice == (f"{truth.about}: {truth.expected}", f"{truth.about}: cannot_be_told")


def test_options_without_attributes() -> None:
    raw = record("r", task="diagnosis", options=["cyst", "simple cyst", "mass"], answer="simple cyst")
    parsed, _ = parse_record(raw | {"conversations": turns("<image>Which?", "simple cyst")})
    assert parsed is not None
    asked = item_of(parsed, 0)
    assert judge(asked, "It is a Simple  cyst.").diagnosis == ("simple cyst", "simple cyst")
    assert judge(asked, "A cyst.").diagnosis == ("simple cyst", "cyst")
    assert judge(asked, "A cyst or a mass.").diagnosis == ("simple cyst", None)
    assert judge(asked, "A massive cystic thing").diagnosis == ("simple cyst", None)


def test_match_option() -> None:
    assert match_option("良性结节。", ["良性结节", "恶性结节"], "zh") == "良性结节"
    assert match_option("考虑良性结节", ["良性结节", "恶性结节"], "zh") == "良性结节"
    assert match_option("ＢＥＮＩＧＮ", ["benign", "malignant"], "en") == "benign"
    assert match_option("", ["benign", "malignant"], "en") is None


@pytest.mark.parametrize(
    ("answer", "language", "given"),
    [
        ("It is not benign.", "en", None),
        ("Not benign but malignant.", "en", "malignant"),
        ("Malignant cannot be excluded.", "en", None),
        ("Malignant?", "en", None),
        ("malignant is unlikely; benign", "en", "benign"),
        ("不是良性", "zh", None),
        ("不能排除恶性", "zh", None),
        ("良性，恶性待排除", "zh", "良性"),
    ],
)
def test_an_option_that_is_denied_or_left_open_is_not_chosen(
    answer: str, language: Language, given: str | None
) -> None:
    options = ["benign", "malignant"] if language == "en" else ["良性", "恶性"]
    assert match_option(answer, options, language) == given


def test_a_record_without_truth_is_not_judged() -> None:
    parsed, _ = parse_record(record("r"))
    assert parsed is not None
    found = judge(item_of(parsed, 0), "A simple cyst.")
    assert (found.attributes, found.exact, found.diagnosis, found.choice, found.normal) == (None,) * 5
