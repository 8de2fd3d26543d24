"""What the model is asked: every task in both languages, images first."""

from typing import get_args

import pytest

from echovlm_ray.prompts import build_messages
from echovlm_ray.tasks import LANGUAGES, TASKS, Language, TaskName


def text_of(task: TaskName, language: Language, prompt: str = "") -> str:
    part = build_messages(task, language, prompt, ["image"])[1]["content"][-1]
    assert part["type"] == "text"
    return part["text"]


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_task_asks_something_of_its_own(language: Language) -> None:
    texts = [text_of(task, language, "Is it benign?") for task in get_args(TaskName) if TASKS[task].instructions]
    assert len(set(texts)) == len(texts) == 5
    assert all("Is it benign?" in text for text in texts)


def test_a_report_has_its_form() -> None:
    assert '"Ultrasound findings: …; Ultrasound impression: …"' in text_of("report", "en")
    assert "“超声所见：…；超声提示：…”" in text_of("report", "zh")


def test_languages_do_not_mix() -> None:
    for task in get_args(TaskName):
        english, chinese = (build_messages(task, language, "1", []) for language in LANGUAGES)
        assert str(english).isascii() or "…" in str(english)
        assert not any("\u4e00" <= character <= "\u9fff" for character in str(english))
        assert any("\u4e00" <= character <= "\u9fff" for character in str(chinese))


def test_images_come_first_in_the_first_user_turn() -> None:
    system, user = build_messages("report", "en", "", ["image", "video", "image"])
    assert system["role"] == "system"
    assert user["role"] == "user"
    assert [part["type"] for part in user["content"]] == ["image", "video", "image", "text"]


@pytest.mark.parametrize("task", ["free", "vqa"])
def test_questions_are_asked_as_they_are_and_cannot_be_empty(task: TaskName) -> None:
    assert text_of(task, "zh", "  Is it benign?\n") == "Is it benign?"
    with pytest.raises(ValueError, match="without a prompt"):
        build_messages(task, "en", " \n", ["image"])
