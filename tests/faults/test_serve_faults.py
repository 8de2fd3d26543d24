"""`echoray serve` when its Ray dies, when signals reach everything at once, and when its terminal closes."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import yaml

from echovlm_ray.checkpoint.demo import make_demo
from tests.running_system import ECHORAY

START_S = 180
# Noticing and ending take seconds; without them, Ray's own minute and more.
END_S = 45
RAYS_OWN_WORDS = ("Failed to push error", "gcs_rpc_client", "core_worker", "Traceback")


class Serving:
    """A whole system below one process, and all that it wrote."""

    def __init__(self, directory: Path, *options: str) -> None:
        checkpoint, config = directory / "demo", directory / "own.yaml"
        make_demo(checkpoint)
        config.write_text(yaml.safe_dump({"gateway": {"port": 0}, "control": {"port": 0}}))
        self.log = directory / "log"
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                [ECHORAY, "serve", "--config", config, "--checkpoint", checkpoint, *options],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | {"XDG_RUNTIME_DIR": str(directory)},
                start_new_session=True,
            )
        self.wait_for("Ready")
        self.family = psutil.Process(self.process.pid).children(recursive=True)

    @property
    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def wait_for(self, words: str, times: int = 1) -> None:
        deadline = time.monotonic() + START_S
        while self.text.count(words) < times:
            assert self.process.poll() is None, self.text
            assert time.monotonic() < deadline, self.text
            time.sleep(0.1)

    def member(self, name: str) -> psutil.Process:
        return next(member for member in self.family if member.name() == name)

    def ends(self) -> int:
        """Its exit status; nothing that it started is left."""
        code = self.process.wait(END_S)
        _, alive = psutil.wait_procs(self.family, timeout=2)
        assert not alive
        return code


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Serving]]:
    started: list[Serving] = []

    def start(*options: str) -> Serving:
        started.append(Serving(tmp_path, *options))
        return started[-1]

    yield start
    for serving in started:
        for process in serving.family:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        serving.process.kill()
        serving.process.wait()


@pytest.mark.parametrize("name", ["raylet", "gcs_server"])
def test_a_ray_that_dies_is_noticed_and_ends_all(serve: Callable[..., Serving], name: str) -> None:
    serving = serve()
    serving.member(name).kill()
    assert serving.ends() == 3
    assert f"({name}) has ended" in serving.text


def test_the_whole_group_may_get_the_signal(serve: Callable[..., Serving]) -> None:
    serving = serve()
    os.killpg(serving.process.pid, signal.SIGTERM)
    assert serving.ends() == 0
    assert serving.text.count("Stopping") == 1
    assert "Stopped." in serving.text
    assert not [words for words in RAYS_OWN_WORDS if words in serving.text]


def test_every_process_may_get_the_signal(serve: Callable[..., Serving]) -> None:
    """As from systemd's KillMode=control-group: Ray's processes end at the same moment."""
    serving = serve()
    for process in [psutil.Process(serving.process.pid), *serving.family]:
        # Some end because another one did.
        with suppress(psutil.NoSuchProcess):
            process.terminate()
    assert serving.ends() == 0
    assert not [words for words in RAYS_OWN_WORDS if words in serving.text]


def test_a_killed_serve_leaves_nothing(serve: Callable[..., Serving]) -> None:
    serving = serve()
    serving.process.kill()
    assert serving.process.wait(5) == -signal.SIGKILL
    _, alive = psutil.wait_procs(serving.family, timeout=END_S)
    assert not alive


def test_it_starts_again_if_asked_to(serve: Callable[..., Serving]) -> None:
    serving = serve("--restart")
    serving.member("raylet").kill()
    serving.wait_for("Starting again in")
    serving.wait_for("Ready", 2)
    serving.family = psutil.Process(serving.process.pid).children(recursive=True)
    serving.process.send_signal(signal.SIGTERM)
    assert serving.ends() == 0
