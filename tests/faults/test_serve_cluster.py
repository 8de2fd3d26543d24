"""Two systems on one Ray cluster: side by side by name, and never one in the place of the other by mistake."""

import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from echovlm_ray.checkpoint.demo import make_demo
from tests.running_system import ECHORAY, free_port
from tests.waiting import until

START_S = 180
STOP_S = 90
# Ray's agent gathers every ten seconds.
METRICS_S = 40
# Small: two systems share two cores.
SMALL: dict[str, Any] = {"router": {"experts": "local"}, "serve": {"object_store_bytes": 78_643_200}}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a Ray of one node that was started apart; only its own processes are ended."""
    address = f"127.0.0.1:{free_port()}"
    folder = tmp_path_factory.mktemp("ray")
    command: list[str | Path] = [Path(sys.executable).with_name("ray"), "start", "--head", "--block", "--num-cpus=16"]
    command += [f"--port={address.rpartition(':')[2]}", "--node-ip-address=127.0.0.1", "--include-dashboard=false"]
    command += ["--disable-usage-stats", f"--temp-dir={folder}", "--object-store-memory=100000000"]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT, start_new_session=True, env=environment(folder)
    )
    try:
        until(lambda: "raylet" in names_below(process.pid), timeout_s=START_S, pause_s=0.5)
        yield address
    finally:
        family = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGTERM)
        _, alive = psutil.wait_procs(family, timeout=20)
        for child in alive:
            child.kill()
        process.wait(20)


def names_below(pid: int) -> set[str]:
    return {child.name() for child in psutil.Process(pid).children(recursive=True)}


def environment(folder: Path) -> dict[str, str]:
    # Of a cluster of one's own the token is known; and systems of other tests and shells are not seen.
    return os.environ | {"RAY_AUTH_MODE": "disabled", "XDG_RUNTIME_DIR": str(folder)}


class Serving:
    """An `echoray serve --address`, and what it wrote."""

    def __init__(self, folder: Path, address: str, *options: str, **sections: dict[str, Any]) -> None:
        self.folder = folder
        self.address = address
        folder.mkdir(exist_ok=True)
        config = folder / "own.yaml"
        settings = {"gateway": {"port": 0}, "control": {"port": 0}, **SMALL, **sections}
        config.write_text(yaml.safe_dump(settings))
        if not (folder / "demo").exists():
            make_demo(folder / "demo")
        self.log = folder / "log"
        command: list[str | Path] = [
            ECHORAY,
            "serve",
            # The cluster of these tests has no token.
            "--insecure-ray",
            "--address",
            address,
            "--config",
            config,
            "--checkpoint",
            folder / "demo",
        ]
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                [*command, *options], stdout=output, stderr=subprocess.STDOUT, env=environment(folder)
            )

    @property
    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def ready(self) -> "Serving":
        deadline = time.monotonic() + START_S
        while "Ready" not in self.text:
            assert self.process.poll() is None, self.text
            assert time.monotonic() < deadline, self.text
            time.sleep(0.1)
        return self

    def answers(self, *options: str) -> bool:
        """Whether `echoray info` finds its gateway."""
        command: list[str | Path] = [ECHORAY, "info", "--json", "--timeout", "20", *options]
        return subprocess.run(command, capture_output=True, env=environment(self.folder), timeout=60).returncode == 0

    def stop(self) -> int:
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(STOP_S)


@contextmanager
def ending(serving: Serving) -> Iterator[Serving]:
    try:
        yield serving
    finally:
        if serving.process.poll() is None:
            serving.stop()


def metrics_of_both(serving: Serving) -> None:
    """Both systems' samples are at the same address, distinguished by a label, which the one without a name lacks."""
    found = re.search(r"metrics +(http://\S+)", serving.text)
    assert found is not None
    deadline = time.monotonic() + METRICS_S
    while time.monotonic() < deadline:
        with urllib.request.urlopen(found[1], timeout=10) as answer:
            samples = [line for line in answer.read().decode().splitlines() if line.startswith("ray_echovlm_live{")]
        named = [line for line in samples if 'system="team-a"' in line]
        if named and len(named) < len(samples):
            return
        time.sleep(0.5)
    raise AssertionError(samples)


def test_systems_share_a_cluster_by_name_only(cluster: str, tmp_path: Path) -> None:
    with ExitStack() as stack:
        first = stack.enter_context(ending(Serving(tmp_path / "a", cluster, "--name", "team-a").ready()))
        assert first.answers("--name", "team-a")

        # The same name, from another deployment: refused, with who has it.
        other = Serving(tmp_path / "b", cluster, "--name", "team-a")
        assert other.process.wait(START_S) == 1
        assert "the cluster runs the system 'team-a' already, another deployment" in other.text
        assert "--take-over" in other.text
        assert first.answers("--name", "team-a")

        # On purpose: the first one says by whom it was replaced, and its end removes nothing.
        other = stack.enter_context(ending(Serving(tmp_path / "b", cluster, "--name", "team-a", "--take-over").ready()))
        assert first.process.wait(STOP_S) == 4
        assert "was taken over by process" in first.text
        assert other.answers("--name", "team-a")

        beside = stack.enter_context(ending(Serving(tmp_path / "c", cluster).ready()))
        metrics_of_both(beside)
        done = subprocess.run(
            [ECHORAY, "stop", "--address", cluster, "--name", "team-a"],
            capture_output=True,
            text=True,
            env=environment(tmp_path),
            timeout=STOP_S,
        )
        assert done.returncode == 0, done
        assert "team-a.gateway" in done.stdout
        assert other.process.wait(STOP_S) == 0
        assert beside.answers("--name", "")
        assert beside.stop() == 0
