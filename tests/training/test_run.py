"""A run as it is started from a shell: killed, stopped, disturbed, and gone on with."""

import json
import multiprocessing
import os
import signal
import socket
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner

from echovlm_ray.cli.main import app
from echovlm_ray.training.recipe_file import write_recipe
from echovlm_ray.training.run import RUN_NAME
from echovlm_ray.training.state import (
    is_complete,
    last_checkpoint,
    mark_complete,
    remove_old,
    remove_unfinished,
    step_of,
)
from tests.training.apart import run_command
from tests.training.support import recipe, write_records

OPTIONS = ("--device", "cpu", "--threads", "1", "--quiet")
STAGE = "1-all"


def train(*arguments: object) -> tuple[int, str, str]:
    """The command in this process: its exit code, output and errors."""
    done = CliRunner().invoke(app, ["train", "model", *map(str, arguments), *OPTIONS])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.stdout, done.stderr


def train_apart(errors: Path, *arguments: object, limit_bytes: int | None = None) -> BaseProcess:
    """The command in a process of its own, to be killed; its errors go to a file.

    Args:
        errors: the file.
        arguments: the command's.
        limit_bytes: once a checkpoint is whole, no file may become larger: what a full disk does, without one.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["echovlm_ray.cli.main", "echovlm_ray.training.stage", "tests.training.apart"])
    process = context.Process(
        target=run_command, args=(["train", "model", *map(str, arguments), *OPTIONS], errors, limit_bytes)
    )
    process.start()
    return process


def new_run(folder: Path, start: Path, records: Path, **changes: Any) -> list[object]:
    """The options of a run of ten steps over two and a half records a step: epochs end within steps."""
    stage = {"name": "all", "steps": 10, "batch_size": 4, "micro_batch_size": 2, "learning_rate": 3e-3}
    write_recipe(folder.with_suffix(".yaml"), recipe(**{"stages": [stage], "save_every": 1, "keep": 3, **changes}))
    options = ["--from", start, "--fresh", "--data", records, "--recipe", folder.with_suffix(".yaml")]
    return [*options, "--output", folder]


def weights(folder: Path) -> bytes:
    return (folder / "model" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def uninterrupted(start: Path, records: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    code, output, errors = train(*new_run(folder, start, records))
    assert code == 0, errors
    assert f"Next: echoray checkpoint split {folder / 'model'}" in output
    return folder


def wait_for(folder: Path, pattern: str, process: BaseProcess, least_step: int = 0, stage: str = STAGE) -> None:
    deadline = time.monotonic() + 120
    while not any(least_step <= (step_of(path) if least_step else 0) for path in (folder / stage).glob(pattern)):
        assert process.is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.mark.parametrize("step", [2, 7])
def test_a_run_that_was_killed_ends_in_the_same_bytes(
    uninterrupted: Path, start: Path, records: Path, tmp_path: Path, step: int
) -> None:
    folder = tmp_path / "run"
    # With worker processes; the run that it is compared with has none.
    data = {"max_tokens": 512, "max_visual_tokens": 16, "workers": 1}
    process = train_apart(tmp_path / "errors", *new_run(folder, start, records, data=data))
    wait_for(folder, "checkpoint-*[0-9]", process, step)
    # At whatever moment it is: perhaps in the middle of writing this checkpoint.
    process.kill()
    process.join()
    assert not (folder / "model").exists()
    code, _, errors = train("--resume", folder)
    assert code == 0, errors
    assert weights(folder) == weights(uninterrupted)
    logs = [[json.loads(line) for line in (each / STAGE / "log.jsonl").open()] for each in (folder, uninterrupted)]
    timed = {"train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss"}
    steps = [[entry for entry in log if not timed & entry.keys()] for log in logs]
    assert [entry["step"] for entry in steps[0]] == list(range(1, 11))
    assert steps[0] == steps[1]


def test_a_run_that_was_killed_in_a_stage_of_adapters_ends_in_the_same_bytes(
    start: Path, records: Path, tmp_path: Path
) -> None:
    each = {"batch_size": 2, "micro_batch_size": 1, "learning_rate": 1e-2}
    stages = [
        {"name": "mixture", "steps": 2, "train": ["experts", "gates"], **each},
        {
            "name": "adapters",
            "steps": 6,
            "train": ["coefficient"],
            "adapters": {"parts": ["vision", "attention"]},
            **each,
        },
    ]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    code, _, errors = train(*new_run(whole, start, records, stages=stages))
    assert code == 0, errors
    process = train_apart(tmp_path / "errors", *new_run(killed, start, records, stages=stages))
    wait_for(killed, "checkpoint-*[0-9]", process, 3, stage="2-adapters")
    process.kill()
    process.join()
    assert not (killed / "model").exists()
    code, _, errors = train("--resume", killed)
    assert code == 0, errors
    assert weights(killed) == weights(whole)


def test_a_run_is_trained_by_one_process_at_a_time_and_a_kill_frees_it(
    uninterrupted: Path, start: Path, records: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    # A process that reads examples outlives the one that trains for a moment, and must not hold the run.
    data = {"max_tokens": 512, "max_visual_tokens": 16, "workers": 1}
    process = train_apart(tmp_path / "errors", *new_run(folder, start, records, data=data))
    wait_for(folder, "checkpoint-*[0-9]", process, 1)
    assert process.pid is not None
    # Not one moment later: the run is short.
    os.kill(process.pid, signal.SIGSTOP)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    code, _, errors = train("--resume", folder)
    assert code == 1
    said = " ".join(errors.split())
    assert f"is being trained by process {process.pid} on {socket.gethostname()}: wait until" in said
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    process.kill()
    process.join()
    code, _, errors = train("--resume", folder)
    assert code == 0, errors
    assert weights(folder) == weights(uninterrupted)


def test_a_folder_that_holds_something_else_is_left_as_it_is(start: Path, records: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "notes").touch()
    code, _, errors = train(*new_run(folder, start, records))
    assert (code, "is not empty: give another folder" in " ".join(errors.split())) == (2, True)
    assert [path.name for path in folder.iterdir()] == ["notes"]


def test_ctrl_c_saves_and_says_how_to_go_on(uninterrupted: Path, start: Path, records: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = train_apart(tmp_path / "errors", *new_run(folder, start, records, save_every=1000))
    wait_for(folder, "log.jsonl", process)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGINT)
    process.join(60)
    errors = (tmp_path / "errors").read_text()
    checkpoint = last_checkpoint(folder / STAGE)
    assert checkpoint is not None
    assert process.exitcode == 130
    assert f"the state after step {step_of(checkpoint)} is kept" in errors
    command = f"echoray train model --resume {folder}"
    assert command in errors
    code, _, errors = train("--resume", folder)
    assert code == 0, errors
    assert weights(folder) == weights(uninterrupted)


def test_a_missing_image_in_the_middle_ends_clearly_and_can_be_mended(
    uninterrupted: Path, start: Path, tmp_path: Path
) -> None:
    records = write_records(tmp_path / "records", 10, without_image=(3,))
    folder = tmp_path / "run"
    image = tmp_path / "records" / "train.json-5.png"
    content = image.read_bytes()
    image.unlink()
    code, _, errors = train(*new_run(folder, start, records, save_every=1000))
    assert code == 1
    assert "train.json, line 1: image 1 of 1 does not exist below the image root" in " ".join(errors.split())
    assert "Traceback" not in errors
    checkpoint = last_checkpoint(folder / STAGE)
    # Saved although no checkpoint was due; at the very first step there is nothing to save.
    assert ("nothing had been saved yet" in errors) == (checkpoint is None)
    image.write_bytes(content)
    code, _, errors = train("--resume", folder)
    assert code == 0, errors
    assert weights(folder) == weights(uninterrupted)


def test_a_loss_that_is_not_a_number_ends_before_it_changes_a_weight(
    start: Path, records: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    stage = {"name": "all", "steps": 40, "batch_size": 2, "micro_batch_size": 2, "learning_rate": 1e30}
    code, _, errors = train(*new_run(folder, start, records, stages=[stage]))
    assert code == 1
    assert "not a number" in errors or "is nan" in errors or "is inf" in errors
    assert "is kept. Lower learning_rate" in errors
    assert "Traceback" not in errors
    checkpoint = last_checkpoint(folder / STAGE)
    assert checkpoint is not None
    assert all(value.isfinite().all() for value in load_file(checkpoint / "model.safetensors").values())


def test_a_full_disk_keeps_the_last_whole_checkpoint(
    uninterrupted: Path, start: Path, records: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    size = (uninterrupted / STAGE / "checkpoint-10" / "optimizer.pt").stat().st_size
    options = new_run(folder, start, records)
    process = train_apart(tmp_path / "errors", *options, limit_bytes=size // 2)
    process.join(120)
    errors = (tmp_path / "errors").read_text()
    assert process.exitcode == 1
    assert "the state after step 1 is kept" in errors
    assert "Traceback" not in errors
    assert f"--resume {folder}" in errors
    code, _, errors = train("--resume", folder)
    assert code == 0, errors
    assert weights(folder) == weights(uninterrupted)


def test_stages_follow_one_another(start: Path, records: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    each = {"steps": 2, "batch_size": 2, "micro_batch_size": 2, "learning_rate": 1e-2}
    stages = [
        {"name": "mixture", "train": ["experts", "gates"], **each},
        {"name": "adapters", "train": ["coefficient"], "adapters": {"parts": ["vision", "attention"]}, **each},
    ]
    code, _, errors = train(*new_run(folder, start, records, stages=stages, weights="bfloat16"))
    assert code == 0, errors
    first = load_file(folder / "1-mixture" / "model" / "model.safetensors")
    last = load_file(folder / "model" / "model.safetensors")
    assert first.keys() == last.keys()
    moved = {name for name, value in last.items() if not value.float().equal(first[name].bfloat16().float())}
    expected = ("coefficient", "attn", "visual.blocks.0.mlp")
    assert moved
    assert all(any(part in name for part in expected) for name in moved)


def test_what_cannot_be_begun_or_resumed_is_refused(
    uninterrupted: Path, start: Path, records: Path, tmp_path: Path
) -> None:
    for arguments, code, problem in (
        (["--data", records], 2, "needs --output, and --data or a recipe"),
        (["--resume", tmp_path], 2, f"has no {RUN_NAME}"),
        (["--resume", uninterrupted, "--data", records], 2, "leave --data, --output and --set out"),
        (["--from", start, "--fresh", "--data", records, "--output", uninterrupted], 2, "go on with it by --resume"),
        (["--from", tmp_path, "--data", records, "--output", tmp_path / "a"], 2, "no config.json"),
        (
            ["--data", tmp_path / "absent.json", "--from", start, "--fresh", "--output", tmp_path / "b"],
            2,
            "No such file",
        ),
        (
            ["--data", records, "--validation", records, "--output", tmp_path / "c"],
            2,
            "both trained on and measured on",
        ),
        (["--data", records, "--recipe", "papre", "--output", tmp_path / "d"], 2, "there is no such recipe"),
    ):
        found, _, errors = train(*arguments)
        assert (found, problem in " ".join(errors.split())) == (code, True), errors
        assert "Traceback" not in errors
    # What cannot be used begins no run, so the mended command can be given again.
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_would_not_be_divided_is_refused(start: Path, records: Path, tmp_path: Path) -> None:
    code, _, errors = train(*new_run(tmp_path / "run", start, records, shard=True))
    assert code == 1
    assert "shard divides the model among several GPUs" in " ".join(errors.split())


def test_only_whole_checkpoints_count(tmp_path: Path) -> None:
    for step in (2, 10, 20):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"0123456789")
    assert last_checkpoint(tmp_path) is None
    mark_complete(tmp_path / "checkpoint-2")
    mark_complete(tmp_path / "checkpoint-10")
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    (tmp_path / "checkpoint-10" / "model.safetensors").write_bytes(b"01234")
    assert not is_complete(tmp_path / "checkpoint-10")
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    assert remove_unfinished(tmp_path)
    assert not remove_unfinished(tmp_path)
    remove_old(tmp_path, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2"]
