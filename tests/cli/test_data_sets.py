"""`echoray data check | stats | split | convert` as a user types them."""

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from echovlm_ray.cli.main import app
from echovlm_ray.model.configuration import EchoVLMConfig
from echovlm_ray.model.processing import EchoVLMProcessor
from echovlm_ray.training.encode import ExampleEncoder
from echovlm_ray.training.record_source import RecordSource
from tests.data.records import png, record, turns, write_lines


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "a.png").write_bytes(png())
    return tmp_path


def data(*arguments: object) -> Result:
    result = CliRunner().invoke(app, ["data", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_a_clean_file_ends_with_0(folder: Path) -> None:
    result = data("check", write_lines(folder / "all.jsonl", [record("one")]))
    assert result.exit_code == 0
    assert "Nothing is wrong." in result.stdout


def test_findings_end_with_1(folder: Path) -> None:
    path = write_lines(folder / "all.jsonl", [record("one"), record("one", image=["\x1b[2J.png"])])
    result = data("check", path, "--json")
    assert result.exit_code == 1
    report = json.loads(result.stdout)
    assert report["found"] == {"duplicate id": 1, "not a path": 1}
    result = data("check", path, "--names")
    assert result.exit_code == 1
    assert "\x1b[2J" not in result.stdout


def test_what_cannot_be_used_ends_with_2(folder: Path) -> None:
    path = write_lines(folder / "all.jsonl", [record("one")])
    for arguments in (
        ("check", folder / "none.json"),
        ("check", path, path),
        ("check", path, folder / "." / "all.jsonl"),
        ("check", path, "--images", folder / "none"),
        ("check", path, "--patient-pattern", "("),
        ("split", path, folder / "out", "--fractions", "a=1"),
        ("split", path, folder / "out", "--by", "age"),
        ("convert", path, folder / "out.json", "--to", "xml"),
        ("convert", path, path),
        ("convert", path, folder / "out.json", "--to", "swift", "--embed"),
    ):
        result = data(*arguments)
        assert result.exit_code == 2, arguments
        assert result.stderr.startswith("error: ")
        assert result.stderr.count("\n") == 1
    assert sorted(entry.name for entry in folder.iterdir()) == ["a.png", "all.jsonl"]


def test_a_file_that_is_no_dataset_ends_with_2_and_is_named(folder: Path) -> None:
    whole = write_lines(folder / "all.jsonl", [record("one")])
    for name, content in (("a.json", b""), ("b.json", b"[]"), ("c.json", "[]".encode("utf-16"))):
        (folder / name).write_bytes(content)
        result = data("check", whole, folder / name)
        assert result.exit_code == 2
        assert name in result.stdout
        assert "Nothing is wrong" not in result.stdout
        assert data("stats", folder / name).exit_code == 2
        assert data("split", folder / name, folder / "out").exit_code == 2


def test_tokens_are_counted_with_a_checkpoint(folder: Path, demo_checkpoint: Path) -> None:
    long = record("long", conversations=turns("<image>What?", "word " * 200))
    path = write_lines(folder / "all.jsonl", [record("one"), long])
    result = data("check", path, "--checkpoint", demo_checkpoint, "--max-tokens", 300, "--json")
    assert result.exit_code == 1
    (finding,) = json.loads(result.stdout)["findings"]
    assert (finding["kind"], finding["line"]) == ("too long", 2)


def test_the_tokens_are_those_that_training_counts(folder: Path, demo_checkpoint: Path) -> None:
    path = write_lines(folder / "all.jsonl", [record("one")])
    backbone = demo_checkpoint / "backbone"
    encoder = ExampleEncoder(
        EchoVLMProcessor.from_pretrained(backbone),
        EchoVLMConfig.from_pretrained(backbone),
        max_tokens=1000,
        max_visual_tokens=196,
    )
    length = len(encoder.encode(RecordSource(path).example(0, 0)))
    for limit, findings in ((length, 0), (length - 1, 1)):
        result = data("check", path, "--checkpoint", demo_checkpoint, "--max-tokens", limit, "--json")
        report = json.loads(result.stdout)
        assert len(report["findings"]) == findings
    assert f"takes {length} tokens" in report["findings"][0]["text"]


def test_records_that_training_refuses_are_found_while_tokens_are_counted(folder: Path, demo_checkpoint: Path) -> None:
    two = record("two", conversations=turns("<image><image>What?", "A cyst."))
    path = write_lines(folder / "all.jsonl", [two, record("odd", attributes={"organ": "liver", "count": 1})])
    result = data("check", path, "--checkpoint", demo_checkpoint, "--json")
    assert json.loads(result.stdout)["found"] == {"marks": 1, "attributes": 1}


def test_stats(folder: Path) -> None:
    path = write_lines(folder / "all.jsonl", [record("one", organ="liver"), record("two", organ="liver")])
    assert json.loads(data("stats", path, "--json").stdout)["organs"] == {"liver": 2}
    assert "liver 2" in data("stats", path).stdout


def test_split_then_check_finds_nothing(folder: Path) -> None:
    records = [record(f"r{number}", patient=f"p{number % 9}", note="kept") for number in range(60)]
    path = write_lines(folder / "all.jsonl", records)
    result = data("split", path, folder / "parts", "--fractions", "train=0.7,test=0.3", "--json")
    assert result.exit_code == 0
    counts = json.loads(result.stdout)["records"]
    assert sum(counts.values()) == 60
    sides = [folder / "parts" / f"{side}.jsonl" for side in counts]
    assert data("check", *sides, "--no-images").exit_code == 0
    written = [json.loads(line) for side in sides for line in side.read_text().splitlines()]
    assert sorted(written, key=lambda raw: int(raw["id"][1:])) == records
    again = data("split", path, folder / "again", "--fractions", "train=0.7,test=0.3")
    assert again.exit_code == 0
    assert [(folder / "again" / side.name).read_bytes() for side in sides] == [side.read_bytes() for side in sides]


def test_what_is_there_is_not_replaced(folder: Path) -> None:
    path = write_lines(folder / "all.jsonl", [record(f"r{number}", patient=f"p{number}") for number in range(9)])
    assert data("split", path, folder / "parts").exit_code == 0
    assert data("convert", path, folder / "swift.jsonl").exit_code == 0
    before = {entry: entry.read_bytes() for entry in folder.rglob("*") if entry.is_file()}
    for arguments in (
        ("split", path, folder / "parts", "--fractions", "left=0.5,right=0.5"),
        ("split", path, path),
        ("convert", path, folder / "swift.jsonl"),
        ("convert", path, path),
        ("phantom", folder / "parts", "--count", 1),
        ("phantom", folder / "new", "--count", 1, "--contact-sheet", folder / "a.png"),
    ):
        result = data(*arguments)
        assert result.exit_code == 2, arguments
        assert re.search(r"give a new (folder|name)", result.stderr)
    assert {entry: entry.read_bytes() for entry in folder.rglob("*") if entry.is_file()} == before


def test_convert_there_and_back(folder: Path) -> None:
    path = write_lines(folder / "all.jsonl", [record("one"), record("two", note="心")])
    for form in ("swift", "openai"):
        there, back = folder / f"{form}.json", folder / f"back-{form}.jsonl"
        assert data("convert", path, there, "--to", form).exit_code == 0
        assert data("convert", there, back, "--to", "published").exit_code == 0
        assert back.read_text() == path.read_text()


@pytest.mark.parametrize("address", ["http://there/a.png", "file:///etc/a.png", "HTTPS://there/a.png", "s3://bucket/a"])
def test_an_address_is_refused_by_every_command(folder: Path, address: str) -> None:
    path = write_lines(folder / "all.jsonl", [record("one"), record("two", image=[address])])
    for form in ("published", "swift", "openai"):
        result = data("convert", path, folder / "out.jsonl", "--to", form)
        assert result.exit_code == 2
        assert "line 2: image 1 is named by an address" in result.stderr
        assert "there" not in result.stderr
        assert not (folder / "out.jsonl").exists()
    assert data("check", path).exit_code == 1


def test_convert_fills_in_what_records_do_not_name(folder: Path) -> None:
    path = write_lines(folder / "all.jsonl", [record("one"), record("two", organ="heart")])
    data("convert", path, folder / "out.jsonl", "--to", "published", "--organ", "liver", "--language", "en")
    written = [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]
    assert [raw["organ"] for raw in written] == ["liver", "heart"]


def test_a_broken_record_stops_a_conversion_and_leaves_nothing(folder: Path) -> None:
    path = write_lines(folder / "all.jsonl", [record("one"), record("two", image=[])])
    result = data("convert", path, folder / "out.jsonl")
    assert result.exit_code == 2
    assert "line 2" in result.stderr
    assert not (folder / "out.jsonl").exists()
    assert not list(folder.glob(".*"))
