"""Answers survive a kill at any byte, and belong to one model, one way of asking, one question."""

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from echovlm_ray.evaluation.answers import Answer, AnswerLog, AnswerLogError, read_answers
from echovlm_ray.evaluation.settings import AskSettings, Target, settings_digest


def answer(identity: str = "r1", **more: str) -> Answer:
    fields = {"id": identity, "settings": "s", "variant": "model", "question": "q", "text": "A cyst.\n囊肿"}
    return Answer.model_validate(fields | more)


def test_answers_are_found_again(tmp_path: Path) -> None:
    path = tmp_path / "out" / "answers.jsonl"
    with AnswerLog(path) as log:
        log.add(answer())
        log.add(answer("r2", refused="broken", text=""))
    assert path.stat().st_mode & 0o077 == 0
    with AnswerLog(path) as log:
        assert len(log) == 2
        assert log.get(("r1", "s", "model", "q")) == answer()
        for other in (("r9", "s", "model", "q"), ("r1", "t", "model", "q"), ("r1", "s", "blank image", "q")):
            assert log.get(other) is None
        assert log.get(("r1", "s", "model", "another question")) is None


@given(cut=st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_a_kill_at_any_byte_loses_one_answer_at_most(cut: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("log") / "answers.jsonl"
    with AnswerLog(path) as log:
        for number in range(5):
            log.add(answer(f"r{number}"))
    content = path.read_bytes()
    cut %= len(content) + 1
    path.write_bytes(content[:cut])
    whole = content[:cut].count(b"\n")
    assert len(read_answers(path)) == whole
    with AnswerLog(path) as log:
        assert len(log) == whole
        log.add(answer("new"))
    with AnswerLog(path) as log:
        assert len(log) == whole + 1


def test_an_answer_is_in_the_file_before_anything_else_happens(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from tests.evaluation.test_answers import answer, AnswerLog\n"
        "log = AnswerLog(Path(sys.argv[1])); log.add(answer()); os._exit(9)"
    )
    path = tmp_path / "answers.jsonl"
    done = subprocess.run([sys.executable, "-c", code, path], cwd=Path(__file__).resolve().parents[2])
    assert done.returncode == 9
    assert list(read_answers(path).values()) == [answer()]


@pytest.mark.parametrize("line", [b"{}\n", b"[1]\n", b'{"id": \n', b"\xff\n", b"[" * 100_000 + b"\n"])
def test_a_damaged_line_is_named(line: bytes, tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    with AnswerLog(path) as log:
        log.add(answer())
    path.write_bytes(path.read_bytes() + line)
    with pytest.raises(AnswerLogError, match="line 2 is no answer"):
        AnswerLog(path)


def test_two_evaluations_do_not_write_to_one_file(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    with AnswerLog(path), pytest.raises(AnswerLogError, match="another evaluation"):
        AnswerLog(path)
    AnswerLog(path).close()


def test_whatever_changes_an_answer_changes_the_digest() -> None:
    target = Target(name="a", version="1", backbone_digest="b", expert_set_id="e", organs={})
    same = settings_digest(target.model_copy(update={"name": "renamed"}), AskSettings(), 0)
    assert same == settings_digest(target, AskSettings(), 0)
    others = {
        settings_digest(target.model_copy(update={"expert_set_id": "f"}), AskSettings(), 0),
        settings_digest(target.model_copy(update={"backbone_digest": "f"}), AskSettings(), 0),
        settings_digest(target, AskSettings(max_new_tokens=9), 0),
        settings_digest(target, AskSettings(organs="given"), 0),
        settings_digest(target, AskSettings(), 1),
    }
    assert len(others | {same}) == 6
