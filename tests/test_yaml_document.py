"""YAML from people, and from those who mean harm."""

from datetime import datetime
from pathlib import Path

import pytest

from echovlm_ray.yaml_document import DocumentError, NotYamlError, parse_yaml, read_document, write_yaml

TEXT = """\
seed: 1
stages:
  - name: first
    rate: 1e-3
  - {name: second, flip: no}
shared: &shared {a: 1}
again: *shared
"""


def test_every_key_and_item_has_its_line(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(TEXT)
    document = read_document(path, "anything")
    assert document.values["stages"] == [{"name": "first", "rate": 0.001}, {"name": "second", "flip": "no"}]
    places = [("seed",), ("stages", "0"), ("stages", "0", "rate"), ("stages", "1", "flip"), ("shared", "a")]
    assert [document.where(place) for place in places] == [f"{path}:{line}" for line in (1, 3, 4, 5, 6)]
    # What is not there has the line of what is around it; what an alias stands for, that of the alias.
    assert document.where(("stages", "0", "none")) == f"{path}:3"
    assert document.where(("again", "a")) == f"{path}:7"
    assert document.where(("none",)) == str(path)


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        ("a:\n  b: 1\n  c: 2\n  b: 3\n", 4, "b occurs twice"),
        ("a: [1, 2\nb: 1\n", 2, "expected"),
        ("a: 1\n---\nb: 1\n", 2, "another document"),
        ("a: !!python/object/apply:os.getpid []\n", 1, "could not determine a constructor"),
        ("a: 2026-13-01T25:00:00\n", None, "month must be in 1..12"),
        ("a: " + "[" * 100_000, None, "nested too deeply"),
        ("a: \x00\n", None, "special characters are not allowed"),
    ],
)
def test_what_is_no_yaml_says_where_and_why(tmp_path: Path, text: str, line: int | None, reason: str) -> None:
    with pytest.raises(NotYamlError, match=reason) as caught:
        parse_yaml(text)
    assert caught.value.line == line
    path = tmp_path / "own.yaml"
    path.write_text(text)
    with pytest.raises(DocumentError, match=reason):
        read_document(path, "anything")


def test_aliases_of_aliases_cost_nothing(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x]"] + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 60)]
    path = tmp_path / "own.yaml"
    path.write_text("\n".join(lines) + "\nself: &self {inner: *self}\n")
    document = read_document(path, "anything")
    assert len(document.values) == 61
    assert len(document.lines) < 1000


@pytest.mark.parametrize(("text", "value"), [("", None), ("# nothing\n", None), ('{"a": [1, null]}', {"a": [1, None]})])
def test_json_is_yaml_and_nothing_is_none(text: str, value: object) -> None:
    assert parse_yaml(text) == value


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    value = {"b": ["Nein, ü 不", "no", "1", 1, 1.5, True, None], "a": {"when": datetime(2026, 1, 2, 3, 4, 5)}}
    path = tmp_path / "own.yaml"
    write_yaml(path, value)
    assert parse_yaml(path.read_text()) == value
    assert list(parse_yaml(path.read_text())) == ["b", "a"]
