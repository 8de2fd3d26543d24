"""`echoray eval` as a user types it: in process, against the running system, interrupted, killed, resumed."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from echovlm_ray.cli.main import app
from tests.data.records import record, write_lines
from tests.evaluation.phantom_records import write_phantoms
from tests.running_system import ECHORAY, RunningSystem

COUNT = 10
NEW_TOKENS = "12"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_phantoms(tmp_path_factory.mktemp("phantoms"), COUNT, ("report", "diagnosis"))


def evaluate(dataset: Path, output: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command: list[str | Path] = [
        ECHORAY,
        "eval",
        dataset,
        "-o",
        output,
        "--max-new-tokens",
        NEW_TOKENS,
        "--draws",
        "100",
        *more,
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=280, env={**os.environ, "COLUMNS": "160"})


def texts(output: Path) -> dict[tuple[str, str], str]:
    lines = [json.loads(line) for line in (output / "answers.jsonl").read_text().splitlines()]
    found = {(line["id"], line["variant"]): line["text"] for line in lines}
    # Nothing is asked twice.
    assert len(found) == len(lines)
    return found


@pytest.fixture(scope="module")
def in_process(dataset: Path, demo_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an evaluation of the demo in one process."""
    output = tmp_path_factory.mktemp("in-process")
    done = evaluate(dataset, output, "--checkpoint", str(demo_checkpoint))
    assert done.returncode == 0, done.stderr
    assert "the model and its baselines" in done.stdout
    assert "commonest report" in done.stdout
    return output


def test_everything_is_written_and_private(in_process: Path) -> None:
    names = {entry.name for entry in in_process.iterdir()}
    assert names == {"answers.jsonl", "result.json", "report.html", "scores.png"}
    assert all(entry.stat().st_mode & 0o077 == 0 for entry in in_process.iterdir())
    result = json.loads((in_process / "result.json").read_text())
    assert result["records"] == COUNT
    assert {group["variant"] for group in result["groups"]} == {
        "model",
        "blank image",
        "shuffled images",
        "commonest report",
    }
    assert len(texts(in_process)) == 3 * COUNT


def test_the_service_gives_the_answers_of_the_process(
    dataset: Path, in_process: Path, running_system: RunningSystem, tmp_path: Path
) -> None:
    done = evaluate(dataset, tmp_path, "--server", running_system.gateway_address, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["records"] == COUNT
    assert texts(tmp_path) == texts(in_process)
    first, second = (json.loads((folder / "result.json").read_text()) for folder in (tmp_path, in_process))
    assert first["settings"] == second["settings"]
    assert first["groups"] == second["groups"]


def test_two_evaluations_are_compared(dataset: Path, in_process: Path) -> None:
    result = call("compare", dataset, in_process, in_process, "--draws", "100", "--json")
    assert result.exit_code == 0
    comparison = json.loads(result.stdout)
    assert comparison["notices"] == ["both are the same model, asked in the same way"]
    compared = [metric for metric in comparison["metrics"] if metric["by"] == "all" and not metric["error"]]
    assert {"attribute F1", "diagnosis accuracy", "BLEU-1 (words)"} <= {metric["name"] for metric in compared}
    assert all((metric["difference"], metric["p_value"]) == (0.0, 1.0) for metric in compared)
    assert "difference" in call("compare", dataset, in_process, in_process, "--draws", "100").stdout


def test_another_dataset_is_not_compared(dataset: Path, in_process: Path, tmp_path: Path) -> None:
    other = write_phantoms(tmp_path, COUNT - 2, ("report",))
    result = call("compare", other, in_process, in_process)
    assert result.exit_code == 2
    assert "evaluated other records" in result.stderr
    result = call("compare", dataset, in_process, tmp_path)
    assert result.exit_code == 2
    assert "finish that evaluation first" in result.stderr


def test_export(dataset: Path, in_process: Path, tmp_path: Path) -> None:
    result = call("export", dataset, in_process, tmp_path / "u2", "--name", "39", "--json")
    assert result.exit_code == 0
    (written,) = json.loads(result.stdout)
    assert (written["task"], written["records"]) == ("report", COUNT)
    assert Path(written["predictions"]).is_file()
    assert Path(written["references"]).is_file()


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_what_was_stopped_goes_on(
    how: signal.Signals, dataset: Path, in_process: Path, running_system: RunningSystem, tmp_path: Path
) -> None:
    command: list[str | Path] = [ECHORAY, "eval", dataset, "-o", tmp_path, "--server", running_system.gateway_address]
    command += ["--max-new-tokens", NEW_TOKENS, "--draws", "100", "--concurrency", "1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "answers.jsonl"
    while not log.exists() or log.read_bytes().count(b"\n") < 4:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(how)
    _, errors = process.communicate(timeout=60)
    kept = log.read_bytes().count(b"\n")
    assert 4 <= kept < 3 * COUNT
    if how != signal.SIGKILL:
        assert process.returncode == 130
        assert re.search(r"interrupted; \d+ answers are kept, and the same command goes on from there", errors)
        assert "Traceback" not in errors
    before = log.read_bytes()
    done = evaluate(dataset, tmp_path, "--server", running_system.gateway_address)
    assert done.returncode == 0, done.stderr
    assert log.read_bytes().startswith(before[: before.rindex(b"\n") + 1])
    assert texts(tmp_path) == texts(in_process)


def call(*arguments: object) -> Result:
    result = CliRunner().invoke(app, ["eval", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_no_service_is_said(dataset: Path, tmp_path: Path) -> None:
    result = call(dataset, "-o", tmp_path, "--server", "127.0.0.1:1")
    assert result.exit_code == 3
    assert "no EchoVLM server answers" in result.stderr


def test_what_cannot_be_used_is_said_in_one_line(tmp_path: Path) -> None:
    broken = write_lines(tmp_path / "broken.jsonl", [record("one", image=[])])
    twice = write_lines(tmp_path / "twice.jsonl", [record("one"), record("one")])
    wrong = write_lines(tmp_path / "wrong.jsonl", [record("one", attributes={"class": "no such"}, organ="breast")])
    cases: list[tuple[list[Any], str]] = [
        ([tmp_path / "none.jsonl"], "No such file"),
        ([broken], "marks 1 images"),
        ([twice], "give each record an id of its own"),
        ([wrong], "line 1"),
        ([twice, "--images", tmp_path / "none"], "there is no folder"),
        ([twice, "--organs", "guessed"], "neither found nor given"),
    ]
    for arguments, text in cases:
        result = call("run", *arguments, "-o", tmp_path / "out", "--server", "127.0.0.1:1")
        assert result.exit_code == 2, arguments
        assert text in result.stderr
        assert result.stderr.count("\n") == 1


def test_help_comes_without_anything_heavy() -> None:
    heavy = {"torch", "transformers", "ray", "numpy", "sacrebleu", "jieba", "nltk", "matplotlib", "pydicom", "PIL"}
    code = f"import sys, echovlm_ray.cli.main; print(*sorted({heavy!r} & set(sys.modules)))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert loaded.stdout.split() == []
    result = call("--help")
    assert result.exit_code == 0
    assert "blank image" in result.stdout
    assert "goes on where it was" in " ".join(result.stdout.split())


def test_a_missing_package_is_named_with_its_extra(dataset: Path, tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "class Missing:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] == 'sacrebleu':\n"
        "            raise ModuleNotFoundError(name, name=name)\n"
        "sys.meta_path.insert(0, Missing())\n"
        "from echovlm_ray.cli.main import app\n"
        "app()\n"
    )
    line = [sys.executable, "-c", code, "eval", str(dataset), "-o", str(tmp_path), "--server", "127.0.0.1:1"]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.strip().endswith("pip install 'echovlm-ray[eval]'")
