"""`echoray data phantom`: what a user types, and what it answers."""

import json
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from echovlm_ray.cli.main import app

runner = CliRunner()


def test_a_corpus_is_written_and_said_to_be_synthetic(tmp_path: Path) -> None:
    out, sheet = tmp_path / "corpus", tmp_path / "sheet.png"
    arguments = ["data", "phantom", str(out), "--count", "3", "--organ", "heart", "--language", "en"]
    done = runner.invoke(app, [*arguments, "--contact-sheet", str(sheet)])
    assert done.exit_code == 0, done.output
    assert "3 phantoms" in done.output
    assert "not from a patient" in done.output
    assert len(json.loads((out / "records.json").read_text())) == 3
    assert "not from a patient" in json.loads((out / "about.json").read_text())["notice"]
    assert Image.open(sheet).width >= 224


def test_json_for_programs(tmp_path: Path) -> None:
    settings = "gain=1.12,blur=0.6,jpeg_quality=80"
    done = runner.invoke(
        app, ["data", "phantom", str(tmp_path / "out"), "--count", "2", "--settings", settings, "--json"]
    )
    facts = json.loads(done.stdout)
    assert facts["settings"] == {"gain": 1.12, "blur": 0.6, "jpeg_quality": 80}
    assert sum(facts["phantoms"].values()) == 2


def test_all_classes_are_listed() -> None:
    done = runner.invoke(app, ["data", "phantom", "--list"])
    assert done.exit_code == 0
    assert "breast/simple_cyst" in done.output
    assert len(json.loads(runner.invoke(app, ["data", "phantom", "--list", "--json"]).stdout)["classes"]) == 43


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "OUT is missing"),
        (["OUT", "--organ", "spleen"], "there is no organ 'spleen'"),
        (["OUT", "--class", "cyst"], "there is no class 'cyst'"),
        (["OUT", "--language", "fr"], "is not among en, zh, both"),
        (["OUT", "--task", "poem"], "is not among report"),
        (["OUT", "--format", "gif"], "is not among png, dicom, cine"),
        (["OUT", "--settings", "gain=bright"], "--settings: gain:"),
        (["OUT", "--settings", "gian=2"], "--settings: gian:"),
        (["OUT", "--settings", "gain"], "--settings: gain:"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, arguments: list[str], message: str) -> None:
    out = tmp_path / "out"
    done = runner.invoke(app, ["data", "phantom", *(str(out) if part == "OUT" else part for part in arguments)])
    assert done.exit_code == 2
    assert message in done.output
    assert not out.exists()
