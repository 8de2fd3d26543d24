"""`echoray serve` and `echoray stop` short of a whole system: what is refused, and that nothing stays behind."""

import os
import pty
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import psutil
import pytest
import yaml

from echovlm_ray.checkpoint.demo import make_demo
from echovlm_ray.cli.state import claimed
from tests.running_system import ECHORAY, free_port, title_of

HIDE_CURSOR, SHOW_CURSOR = b"\x1b[?25l", b"\x1b[?25h"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("serve") / "demo"
    make_demo(directory)
    return directory


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Systems of other tests and shells are not seen."""
    return os.environ | {"XDG_RUNTIME_DIR": str(tmp_path)}


def refused(*arguments: str | Path, environment: dict[str, str]) -> str:
    """What a command that must fail before Ray starts writes to stderr."""
    done = subprocess.run(
        [ECHORAY, *arguments], capture_output=True, text=True, timeout=60, env=environment, check=False
    )
    assert done.returncode == 2, done
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
    assert "Starting Ray" not in done.stdout
    return done.stderr


def test_a_missing_checkpoint_says_how_to_make_one(tmp_path: Path, environment: dict[str, str]) -> None:
    text = refused("serve", "--checkpoint", tmp_path / "absent", environment=environment)
    assert "echoray checkpoint demo" in text


def test_a_released_checkpoint_says_how_to_split_it(checkpoint: Path, environment: dict[str, str]) -> None:
    assert "echoray checkpoint split" in refused(
        "serve", "--checkpoint", checkpoint / "backbone", environment=environment
    )


def test_a_wrong_file_is_told_by_line(tmp_path: Path, environment: dict[str, str]) -> None:
    path = tmp_path / "own.yaml"
    path.write_text("router:\n  max_batch: 3\n")
    text = refused("serve", "--config", path, environment=environment)
    assert f"{path}:2: router.max_batch is unknown; did you mean max_batch_size?" in text


def test_a_taken_port_is_told(checkpoint: Path, tmp_path: Path, environment: dict[str, str]) -> None:
    with socket.socket() as owner:
        owner.bind(("127.0.0.1", 0))
        owner.listen()
        port = owner.getsockname()[1]
        path = tmp_path / "own.yaml"
        path.write_text(yaml.safe_dump({"gateway": {"port": port}, "control": {"port": 0}}))
        text = refused("serve", "--config", path, "--checkpoint", checkpoint, environment=environment)
    assert f"127.0.0.1:{port}" in text
    assert "gateway.port" in text


def test_detach_needs_a_cluster(environment: dict[str, str]) -> None:
    assert "--address" in refused("serve", "--detach", environment=environment)


def test_there_is_nothing_to_stop(environment: dict[str, str]) -> None:
    assert "no EchoVLM-Ray of yours" in refused("stop", environment=environment)


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_an_unreachable_cluster_is_told(checkpoint: Path, environment: dict[str, str], scheme: str) -> None:
    done = subprocess.run(
        [ECHORAY, "serve", "--checkpoint", checkpoint, "--address", f"{scheme}127.0.0.1:{free_port()}"],
        capture_output=True,
        text=True,
        timeout=60,
        env=environment,
        check=False,
    )
    assert done.returncode == 1
    assert "Ray cluster" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture
def starting(checkpoint: Path, tmp_path: Path, environment: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """A system that has just begun to start."""
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump({"gateway": {"port": 0}, "control": {"port": 0}}))
    shown, terminal = pty.openpty()
    process = subprocess.Popen(
        [ECHORAY, "serve", "--config", path, "--checkpoint", checkpoint],
        stdout=terminal,
        stderr=terminal,
        env=environment | {"TERM": "xterm"},
        start_new_session=True,
    )
    os.close(terminal)
    with (tmp_path / "shown").open("wb") as output:
        reader = threading.Thread(target=copy_until_closed, args=(shown, output))
        reader.start()
        yield process
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        reader.join()
    # However it ended, the terminal is as it was.
    written = (tmp_path / "shown").read_bytes()
    assert written.rfind(SHOW_CURSOR) > written.rfind(HIDE_CURSOR) >= 0


def copy_until_closed(descriptor: int, output: BinaryIO) -> None:
    with suppress(OSError):
        while piece := os.read(descriptor, 4096):
            output.write(piece)
    os.close(descriptor)


def family_with(process: subprocess.Popen[bytes], name: str) -> list[psutil.Process]:
    """All processes of a system, once one of them has `name` in its title."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        assert process.poll() is None, "it ended by itself"
        family = psutil.Process(process.pid).children(recursive=True)
        if any(name in title_of(member) for member in family):
            return family
        time.sleep(0.05)
    raise AssertionError(f"no {name} within 60 s")


def assert_gone(family: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(family, timeout=5)
    assert not alive


@pytest.mark.parametrize("stage", ["gcs_server", "ServeReplica"])
def test_one_ctrl_c_while_it_starts_leaves_nothing(starting: subprocess.Popen[bytes], stage: str) -> None:
    family = family_with(starting, stage)
    starting.send_signal(signal.SIGINT)
    assert starting.wait(60) == 130
    assert_gone(family)


def test_a_second_ctrl_c_does_not_wait(starting: subprocess.Popen[bytes]) -> None:
    family = family_with(starting, "ServeReplica")
    starting.send_signal(signal.SIGINT)
    time.sleep(0.1)
    starting.send_signal(signal.SIGINT)
    assert starting.wait(10) == 130
    assert_gone(family)


def test_stop_ends_it_from_another_shell(starting: subprocess.Popen[bytes], environment: dict[str, str]) -> None:
    family = family_with(starting, "ServeReplica")
    done = subprocess.run([ECHORAY, "stop"], capture_output=True, text=True, timeout=90, env=environment, check=False)
    assert done.returncode == 0, done
    assert str(starting.pid) in done.stdout
    assert starting.wait(5) == 130
    assert_gone(family)
    assert "no EchoVLM-Ray of yours" in refused("stop", environment=environment)


def test_light_commands_load_nothing_heavy() -> None:
    heavy = {"ray", "torch", "transformers", "yaml", "psutil"}
    code = f"import sys, echovlm_ray.cli.main; print(*sorted({heavy!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_a_second_start_names_the_first_one(
    checkpoint: Path, environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    # The other one has only begun to start: it does not listen yet.
    for resource in (f"the rollouts' database {checkpoint}/rollouts/rollouts.db", "port 50052"):
        with claimed({resource: ""}):
            text = refused("serve", "--checkpoint", checkpoint, environment=environment)
        assert f"another `echoray serve` (process {os.getpid()}) is starting or running here with {resource}" in text
        assert f"`echoray stop --pid {os.getpid()}` ends it" in text
