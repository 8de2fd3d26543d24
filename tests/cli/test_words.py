"""Error messages have the cause and the command to type; and tables at 80 columns."""

import json
import os
import re
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from sqlalchemy import event
from typer.testing import CliRunner

from echovlm_ray.cli.main import app
from experts.bundles.manifest import MANIFEST_NAME
from router.rollouts import database as databases
from tests.cli.calls import done, invoke, refused
from tests.cli.control_server import System, make_bundle

LOCK = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("BEGIN IMMEDIATE")
print("held", flush=True)
sys.stdin.read()
"""


def with_pragma(system: System, pragma: str) -> None:
    database = system.store.database
    system.controller.stop()
    database.close()

    @event.listens_for(database.engine, "connect")
    def prepare(connection: sqlite3.Connection, _: object) -> None:
        connection.execute(pragma)


def test_a_full_disk_is_named_with_its_folder(system: System) -> None:
    with_pragma(system, "PRAGMA max_page_count = 1")
    text = ""
    for _ in range(200):
        result = invoke(system, "retire", "heart", "--version", "1.1.0", "--reason", "x" * 500)
        if result.exit_code:
            text = result.stderr
            break
        with system.store.write() as transaction:
            transaction.connection.exec_driver_sql("DELETE FROM retired")
    assert result.exit_code == 3
    assert f"the disk is full: the rollouts' database {system.directory}/rollouts.db cannot be written" in text
    assert f"Make room in {system.directory}" in text
    assert "internal error" not in text


def test_a_database_that_another_process_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.cli.control_server import running_control

    monkeypatch.setattr(databases, "BUSY_TIMEOUT_S", 0.3)
    with running_control(tmp_path) as system:
        path = system.directory / "rollouts.db"
        with subprocess.Popen(
            [sys.executable, "-c", LOCK, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as holder:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "held\n"
            text = refused(system, "stage", "heart", "1.1.0", code=3)
            # What only reads goes on.
            assert "heart" in done(system, "list")
            holder.communicate()
    assert f"{path} is locked by process {holder.pid}" in text
    assert f"`fuser {path}`" in text
    assert "nothing answers" not in text


@pytest.mark.parametrize("command", ["history", "watch", "promote", "rollback", "retire"])
def test_an_unknown_organ_is_told_with_those_that_there_are(system: System, command: str) -> None:
    assert "there are breast, heart" in refused(system, command, "nosuch", code=2)


def test_other_unknown_names_are_told_with_those_that_there_are(system: System) -> None:
    assert "there are breast, heart" in refused(system, "list", "--organ", "nosuch", code=2)
    assert "bundles of breast, heart" in refused(system, "stage", "nosuch", "1.0.0", code=2)
    assert "heart-99" in refused(system, "rollback", "heart", "--rollout", "heart-99", code=2)
    # In the registry, and nothing was done with it yet.
    system.add("lung", "1.0.0")
    assert done(system, "history", "lung").startswith("Nothing has happened to lung yet.")


@pytest.mark.parametrize("percent", ["100.0001", "100.00000001", "-0.0001", "99.9999999e9"])
def test_a_number_is_told_with_all_that_tells_it_from_others(system: System, percent: str) -> None:
    assert f"{float(percent)!r} must be" in refused(system, "canary", "heart", f"--percent={percent}", code=2)


@pytest.mark.parametrize("percent", ["inf", "-inf", "nan"])
def test_a_percentage_that_is_no_number_is_told(system: System, percent: str) -> None:
    assert "percent" in refused(system, "canary", "heart", f"--percent={percent}", code=2)


@pytest.mark.parametrize("seconds", ["nan", "inf", "-1", "0"])
def test_a_timeout_that_is_none_is_refused_before_anything_is_called(seconds: str) -> None:
    for command in (("status",), ("experts", "list"), ("info",), ("generate", "--prompt", "x")):
        result = CliRunner().invoke(app, [*command, f"--timeout={seconds}"])
        assert result.exit_code == 2, result.output
        assert "--timeout" in result.output


@pytest.mark.parametrize("address", ["", "127.0.0.1", "127.0.0.1:", "127.0.0.1:x", "127.0.0.1:99999", "http://a:1"])
def test_an_address_that_is_none_is_told(address: str) -> None:
    for command in (("status", "--control"), ("experts", "list", "--control"), ("info", "--server")):
        result = CliRunner().invoke(app, [*command, address])
        assert result.exit_code == 2, result.output
        assert "give host:port" in " ".join(result.output.split())


def test_a_hostile_manifest_made_by_hand_is_refused_wherever_it_comes_in(system: System, tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle", "lung", "0.1.0")
    content = json.loads((bundle / MANIFEST_NAME).read_bytes())
    hostile: dict[str, object] = {
        "name": "a\x1b]0;owned\x07",
        "description": "fine\x9b2J",
        "authors": "a\u202eb",
        "license": "a\u2028b",
        "intended_use": "a\u200bb",
        "training_data": "a\rb",
        "changelog": {"0.1.0": "\x1b[2J"},
        "eval_metrics": {"\x1b[31m": 1.0},
        "references": ["\u2066"],
        "organ_synonyms": ["\ufeff"],
        "task": "\x00",
        "\x1b[31m": "no such field",
    }
    for field, value in hostile.items():
        (bundle / MANIFEST_NAME).write_text(json.dumps({**content, field: value}, ensure_ascii=False))
        for arguments in (
            ("push", bundle, "--control", system.address),
            ("push", bundle, "--registry", tmp_path / "registry"),
            ("verify", bundle),
            ("show", bundle),
        ):
            result = CliRunner().invoke(app, ["experts", *map(str, arguments)])
            assert result.exit_code == 1, (field, arguments, result.output)
            assert result.stderr.isprintable() or result.stderr.rstrip("\n").isprintable()
            assert field.replace("\x1b", r"\x1b") in result.stderr
    assert system.registry.list("lung") == []


def test_a_hostile_file_name_in_a_manifest_is_refused(system: System, tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle", "lung", "0.1.0")
    content = json.loads((bundle / MANIFEST_NAME).read_bytes())
    for name in ("\x1b[2J.safetensors", "x" * 3000 + ".safetensors", "a\x00.safetensors"):
        content["files"][0]["path"] = name
        (bundle / MANIFEST_NAME).write_text(json.dumps(content))
        assert "150" in refused(system, "push", bundle, code=2)


def words_of(system: System, *arguments: object) -> set[str]:
    """What is printed 80 columns wide, word by word, and nothing wider."""
    printed = subprocess.run(
        [Path(sys.executable).with_name("echoray"), "experts", *map(str, arguments), "--control", system.address],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "80"},
        timeout=60,
        check=True,
    ).stdout
    assert all(len(row) <= 80 for row in printed.splitlines() if not row.startswith("head "))
    return set(re.split(r"[\s,:]+", printed))


def test_at_80_columns_no_word_is_broken(system: System) -> None:
    system.add("gynaecology", "1.10.0-rc.1")
    reason = "the echocardiographers at 10.20.30.40:50052 compared eight-hundred-and-fifty examinations of valves"
    done(system, "stage", "heart", "1.1.0", "--wait", "--reason", reason, "--actor", "Anna-Katharina.Musterfrau")
    expected = {*re.split(r"[\s,:]+", reason), "Anna-Katharina.Musterfrau", "heart-2"}
    digest = system.digests["heart", "1.1.0"][:12]
    history = words_of(system, "history")
    assert expected | {digest, "verified", "staged"} <= history
    shown = words_of(system, "list")
    assert {"Anna-Katharina.Musterfrau", "heart-2", digest, "gynaecology-experts", "1.10.0-rc.1", "heart-1"} <= shown
