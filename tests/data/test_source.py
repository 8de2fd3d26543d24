"""Finding records in files of any size and in any state."""

import json
import multiprocessing
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from echovlm_ray.data import source
from echovlm_ray.data.record import InvalidDataError
from echovlm_ray.data.source import RecordFile

texts = st.text(alphabet=st.sampled_from('ab"\\[]{},:\n 心\u2028'), max_size=12)
objects = st.recursive(texts | st.integers(), lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner))


def read(path: Path) -> list[Any]:
    with RecordFile(path) as file:
        assert file.problems == []
        found = [file.raw(index) for index in range(len(file))]
    assert all(problem is None for _, problem in found)
    return [raw for raw, _ in found]


@given(records=st.lists(objects, min_size=1, max_size=5), indent=st.sampled_from([None, 1]), block=st.integers(1, 9))
@settings(max_examples=150, deadline=None)
def test_an_array_is_read_as_json_reads_it(
    records: list[Any], indent: int | None, block: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("array") / "records.json"
    path.write_text(json.dumps(records, indent=indent, ensure_ascii=False), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(source, "BLOCK_BYTES", block)
        assert read(path) == records


@given(records=st.lists(st.dictionaries(texts, objects), min_size=1, max_size=5), block=st.integers(1, 9))
@settings(max_examples=100, deadline=None)
def test_lines_are_read_as_json_reads_them(
    records: list[Any], block: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("lines") / "records.jsonl"
    path.write_text("\r\n \n".join(json.dumps(raw) for raw in records), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(source, "BLOCK_BYTES", block)
        assert read(path) == records
        with RecordFile(path) as file:
            assert [file.line(index) for index in range(len(file))] == [1 + 2 * n for n in range(len(records))]


def test_lines_of_an_array_are_where_its_elements_begin(tmp_path: Path) -> None:
    path = tmp_path / "records.json"
    path.write_text('[\n\n {"a":\n 1},\n{"b": 2}, 3\n]\n')
    with RecordFile(path) as file:
        assert [file.line(index) for index in range(len(file))] == [3, 5, 5]


@pytest.mark.parametrize(
    ("content", "index", "text"),
    [
        ('[\n{"a": 1},\n{"a": x},\n{"a": 3}]', 1, "line 3, column 7"),
        ('{"a": 1}\n{"a": \n{"a": 3}\n', 1, "line 2, column 6"),
        ('[\n{"a": 1},\n]', 1, "Expecting value"),
        ('{"a": NaN}', 0, "NaN"),
        ('{"a": ' + "9" * 5000 + "}", 0, "huge"),
        ('{"a": 1, "a": 2}', 0, "same field twice"),
        ("[" + "[" * 100_000 + "]" * 100_000 + "]", 0, "nested too deep"),
    ],
)
def test_broken_json_is_named_and_the_rest_is_read(content: str, index: int, text: str, tmp_path: Path) -> None:
    path = tmp_path / "records"
    path.write_text(content)
    with RecordFile(path) as file:
        for other in range(len(file)):
            _, problem = file.raw(other)
            assert (problem is not None) == (other == index)
        _, problem = file.raw(index)
    assert problem is not None
    assert text in problem.text


@pytest.mark.parametrize(
    ("content", "line", "text"),
    [
        ('[\n{"a": 1},\n{"a": ', 3, "truncated"),
        ('[\n{"a": "no end', 2, "truncated"),
        ('[{"a": 1}]\n{"b": 2}\n', 2, "follows the end"),
    ],
)
def test_a_damaged_array_is_named_with_its_line(content: str, line: int, text: str, tmp_path: Path) -> None:
    path = tmp_path / "records.json"
    path.write_text(content)
    with RecordFile(path) as file:
        ((found_line, problem),) = file.problems
    assert found_line == line
    assert text in problem.text


def test_a_byte_order_mark_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\n')
    assert read(path) == [{"a": 1}]
    path.write_bytes(b'\xef\xbb\xbf[{"a": 1}]')
    assert read(path) == [{"a": 1}]


def test_other_encodings_are_refused_with_the_way_out(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    path.write_text('{"a": 1}\n', encoding="utf-16")
    with pytest.raises(InvalidDataError, match="save it as UTF-8"):
        RecordFile(path)
    path.write_bytes(b'{"a": 1}\n{"a": "\xff"}\n')
    with RecordFile(path) as file:
        _, problem = file.raw(1)
    assert problem is not None
    assert problem.text == "line 2 is not UTF-8: save the file as UTF-8"


@pytest.mark.parametrize("content", [b"", b" \n\n", b"\xef\xbb\xbf"])
def test_an_empty_file_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "records.json"
    path.write_bytes(content)
    with pytest.raises(InvalidDataError, match="is empty"):
        RecordFile(path)


def test_no_pipe_is_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InvalidDataError, match="not a regular file"):
        RecordFile(tmp_path / "pipe")


def test_a_record_over_the_limit_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "MAX_RECORD_BYTES", 100)
    path = tmp_path / "records.jsonl"
    path.write_text('{"a": 1}\n{"a": "' + "x" * 200 + '"}\n{"a": 3}\n')
    with RecordFile(path) as file:
        problems = [file.raw(index)[1] for index in range(3)]
    assert problems[0] is problems[2] is None
    assert problems[1] is not None
    assert "the limit is 100" in problems[1].text


def read_all(file: RecordFile, backwards: bool) -> None:
    for _ in range(20):
        for index in sorted(range(len(file)), reverse=backwards):
            assert file.raw(index) == ({"n": index, "text": "x" * index}, None)


def test_forked_processes_read_at_the_same_time(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    path.write_text("".join(json.dumps({"n": number, "text": "x" * number}) + "\n" for number in range(300)))
    context = multiprocessing.get_context("fork")
    with RecordFile(path) as file:
        readers = [context.Process(target=read_all, args=(file, backwards)) for backwards in (False, True)]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join()
    assert [reader.exitcode for reader in readers] == [0, 0]


def test_a_pickled_file_is_opened_again_if_it_is_the_same(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    path.write_text('{"a": 1}\n\n{"a": 2}\n')
    with RecordFile(path) as file:
        sent = pickle.dumps(file)
    with pickle.loads(sent) as copy:
        assert [copy.raw(index)[0] for index in range(len(copy))] == [{"a": 1}, {"a": 2}]
        assert copy.line(1) == 3
    path.write_text('{"a": 1}\n{"b": 22}\n')
    with pytest.raises(InvalidDataError, match="was changed while it was in use"):
        pickle.loads(sent)
    path.unlink()
    with pytest.raises(FileNotFoundError):
        pickle.loads(sent)


def test_a_file_that_becomes_shorter_gives_an_error(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    path.write_text('{"a": 1}\n{"a": 2}\n')
    with RecordFile(path) as file:
        os.truncate(path, 4)
        _, problem = file.raw(1)
    assert problem is not None
    assert "shorter" in problem.text


def test_a_folder_is_answered_with_the_file_in_it(tmp_path: Path) -> None:
    with pytest.raises(InvalidDataError, match="is a folder: name the file with the records, a JSON"):
        RecordFile(tmp_path)
    (tmp_path / "records.json").write_text("[]")
    with pytest.raises(InvalidDataError, match=r"is a folder: name the file with the records, .*/records\.json"):
        RecordFile(tmp_path)
