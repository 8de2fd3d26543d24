"""What counts as a record, in each of its forms."""

from typing import Any

import pytest

from echovlm_ray.data.parse import is_blank, parse_record
from echovlm_ray.data.record import language_of, request_of, task_of
from echovlm_ray.prompts import FURTHER
from echovlm_ray.tasks import TASKS
from tests.data.records import record, turns

PRIVATE = "MUELLER-ANNA-1961"


def kinds(raw: object) -> list[str]:
    return [problem.kind for problem in parse_record(raw)[1]]


def test_a_published_record() -> None:
    parsed, problems = parse_record(record("one", organ="breast", patient=7, description="A simple cyst."))
    assert problems == []
    assert parsed is not None
    assert (parsed.id, parsed.images, parsed.organ, parsed.patient) == ("one", ("a.png",), "breast", "7")
    assert (parsed.question, parsed.target) == ("What is seen?", "A simple cyst.")
    assert parsed.extra == {"description": "A simple cyst."}


def test_messages_of_both_kinds_are_the_same_record() -> None:
    swift: dict[str, Any] = {
        "id": "one",
        "messages": [
            {"role": "system", "content": "You describe ultrasound."},
            {"role": "user", "content": "<image>What is seen?"},
            {"role": "assistant", "content": "A simple cyst."},
        ],
        "images": ["a.png"],
    }
    parts = [{"type": "image_url", "image_url": {"url": "a.png"}}, {"type": "text", "text": "What is seen?"}]
    openai = {
        "id": "one",
        "messages": [swift["messages"][0], {"role": "user", "content": parts}, swift["messages"][2]],
    }
    published = parse_record(record("one"))
    assert parse_record(swift) == parse_record(openai) == published == (published[0], [])


@pytest.mark.parametrize(
    ("raw", "kind"),
    [
        ([], "wrong type"),
        (None, "wrong type"),
        ({"id": "x"}, "unknown form"),
        (record("x", conversations=[]), "wrong type"),
        (record("x", conversations="text"), "wrong type"),
        (record("x", conversations=[{"from": "human"}]), "wrong type"),
        (record("x", conversations=[{"from": "human", "value": 7}]), "wrong type"),
        (record("x", conversations=[{"from": "robot", "value": "a"}]), "turns"),
        (record("x", conversations=[{"from": ["human"], "value": "a"}]), "turns"),
        (record(""), "no id"),
        (record("x", id=None), "no id"),
        (record("x", id=True), "no id"),
        (record("x", image=["a.png", 7]), "wrong type"),
        (record("x", image={"a": 1}), "wrong type"),
        (record("x", organ=["breast"]), "wrong type"),
        (record("x", attributes=[]), "wrong type"),
        (record("x", language="de"), "language"),
        (record("x", options=["a", "b"], answer="c"), "options"),
        (record("x", image=[]), "marks"),
        (record("x", image=["a.png", "b.png"]), "marks"),
        (record("x", conversations=turns("<image><image>What?", "A cyst.")), "marks"),
        (record("x", conversations=turns("<image>What?", "A <image> cyst.")), "marks"),
        (record("x", conversations=turns("<image>What?", " \n")), "empty answer"),
        (record("x", conversations=turns("<image> ", "A cyst.")), "empty question"),
        (record("x", conversations=turns("<image>What?")), "turns"),
        (record("x", conversations=turns("<image>What?", "A cyst.")[::-1]), "turns"),
        (record("x", conversations=[{"from": "system", "value": "a"}]), "turns"),
        (record("x", conversations=turns("<image>What?", "\ud800")), "not Unicode"),
        ({"id": "x", "messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "wrong type"),
        ({"id": "x", "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": 3}]}]}, "wrong type"),
    ],
)
def test_what_is_wrong_is_named(raw: object, kind: str) -> None:
    assert kind in kinds(raw)


def test_deep_nesting_is_refused_without_recursion() -> None:
    deep: Any = []
    for _ in range(100_000):
        deep = [deep]
    assert kinds(record("x", more=deep)) == ["nested too deep"]
    while deep:
        # Python would take this apart recursively.
        deep = deep.pop()


def test_problems_quote_nothing() -> None:
    hostile = [
        record(PRIVATE, image=[PRIVATE, PRIVATE]),
        record(PRIVATE, conversations=turns(f"<image>{PRIVATE}", "")),
        record(PRIVATE, organ=[PRIVATE]),
        record(PRIVATE, language=PRIVATE, options=[PRIVATE], answer="no"),
        {"id": PRIVATE, "messages": [{"role": PRIVATE, "content": PRIVATE}]},
    ]
    for raw in hostile:
        _, problems = parse_record(raw)
        assert problems
        assert not any(PRIVATE in problem.text or PRIVATE in problem.kind for problem in problems)


def test_language_and_task_are_told_where_the_record_does_not_say() -> None:
    question = TASKS["report"].instructions["zh"]
    parsed, _ = parse_record(record("x", conversations=turns(f"<image>{question}", "超声所见：无回声区 3 mm。")))
    assert parsed is not None
    assert (language_of(parsed), task_of(parsed)) == ("zh", "report")
    parsed, _ = parse_record(record("x"))
    assert parsed is not None
    assert (language_of(parsed), task_of(parsed)) == ("en", "free")


def test_the_service_is_asked_the_record_s_own_question() -> None:
    instruction = TASKS["diagnosis"].instructions["en"]
    cases = {
        instruction: ("diagnosis", ""),
        f"{instruction}\n{FURTHER['en']}Options: cyst; mass": ("diagnosis", "Options: cyst; mass"),
        "What is seen?": ("free", "What is seen?"),
    }
    for text, expected in cases.items():
        parsed, _ = parse_record(record("x", conversations=turns(f"<image>{text}", "A cyst.")))
        assert parsed is not None
        request = request_of(parsed)
        assert (request.task, request.prompt) == expected
    parsed, _ = parse_record(record("x", task="vqa"))
    assert parsed is not None
    assert request_of(parsed).task == "vqa"


BLANKS = (
    "",
    " ",
    "\t\n",
    "\u200b",
    "\u2060\ufeff",
    "\u00a0\u3000",
    "\u00ad",
    "\u3164",
    "\u2800",
    "\ufe0f",
    "\u202e \u202c",
)


@pytest.mark.parametrize("text", BLANKS)
def test_text_that_cannot_be_seen_is_none(text: str) -> None:
    assert is_blank(text)
    for change, kind in (
        ({"id": text}, "no id"),
        ({"conversations": turns("<image>What?", text)}, "empty answer"),
        ({"conversations": turns(f"<image>{text}", "A cyst.")}, "empty question"),
        ({"options": ["A cyst.", text]}, "empty answer"),
        ({"references": [text]}, "empty answer"),
    ):
        _, problems = parse_record(record("one", **{"image": ["a.png"], **change}))
        assert [problem.kind for problem in problems] == [kind], change
    found, problems = parse_record(record("one", patient=text, organ=text))
    assert found is not None
    assert (found.patient, found.organ, problems) == (None, None, [])


@pytest.mark.parametrize("text", ["a", "囊", "-", "é", "\u200bx", "‍👩‍⚕️"])
def test_text_that_can_be_seen_is_some(text: str) -> None:
    assert not is_blank(text)
    assert parse_record(record(text))[1] == []


def test_an_organ_against_the_attributes_is_found() -> None:
    attributes = {"organ": "breast", "class": "normal", "values": {"tissue": "fatty", "lesion": "none"}}
    for organ, expected in (("liver", ["organ"]), ("breast", []), (None, [])):
        _, problems = parse_record(record("one", organ=organ, attributes=attributes))
        assert [problem.kind for problem in problems] == expected
