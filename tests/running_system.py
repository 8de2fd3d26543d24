"""Starts the whole system as a user does, and leaves nothing behind when the tests end, however they end."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import psutil
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc

from echovlm_ray.serving.cluster.system_secret import channels_to

ECHORAY = Path(sys.executable).with_name("echoray")
START_SECONDS = 180
STOP_SECONDS = 60
# The files beside the rollouts' database that are there only while it is in use.
PASSING = ("-wal", "-shm", ".incoming", ".lock")


@dataclass(frozen=True)
class RunningSystem:
    """A system that answers."""

    gateway_address: str
    control_address: str
    checkpoint: Path
    process: subprocess.Popen[bytes]
    log: Path

    def status(self) -> dict[str, Any]:
        """What `echoray status --json` prints."""
        command: list[str | Path] = [ECHORAY, "status", "--json", "--control", self.control_address]
        done = subprocess.run(command, capture_output=True, timeout=60)
        # 1 only says that some part is not running.
        assert done.returncode in (0, 1), done.stderr.decode()
        status: dict[str, Any] = json.loads(done.stdout)
        return status

    def replicas(self, application: str) -> list[dict[str, Any]]:
        """The replicas of one application, as status shows them."""
        return [
            replica
            for found in self.status()["applications"]
            if found["name"] == application
            for replica in found["replicas"]
        ]

    def inner_channel(self, address: str) -> Any:
        """A channel to a part that serves the other parts only."""
        return channels_to(self.status()["identity"]).blocking(address)

    def health(self, service: str) -> int:
        """The status of a service in `grpc.health.v1` at the gateway, which learns of new organs with a delay."""
        with grpc.insecure_channel(self.gateway_address) as channel:
            request = health_pb2.HealthCheckRequest(service=service)
            try:
                return int(health_pb2_grpc.HealthStub(channel).Check(request, timeout=10).status)
            except grpc.RpcError as error:
                if error.code() != grpc.StatusCode.NOT_FOUND:
                    raise
                # What Watch says of it.
                return int(health_pb2.HealthCheckResponse.SERVICE_UNKNOWN)

    def wait_until_healthy(self, service: str, seconds: float) -> float:
        """Waits for a service; returns how long it took."""
        started = time.monotonic()
        while self.health(service) != health_pb2.HealthCheckResponse.SERVING:
            assert time.monotonic() - started < seconds, f"{service!r} is not SERVING after {seconds} s"
            time.sleep(0.05)
        return time.monotonic() - started


def free_port() -> int:
    """A port without a listener."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def running(checkpoint: Path, directory: Path, **overrides: dict[str, Any]) -> Iterator[RunningSystem]:
    """Runs `echoray serve` on a checkpoint until the block ends; `overrides` are sections of the configuration."""
    gateway_port, control_port = free_port(), free_port()
    settings: dict[str, dict[str, Any]] = {name: dict(section) for name, section in overrides.items()}
    settings.setdefault("gateway", {})["port"] = gateway_port
    settings.setdefault("control", {})["port"] = control_port
    settings.setdefault("model", {})["checkpoint"] = str(checkpoint)
    config = directory / "config.yaml"
    config.write_text(yaml.safe_dump(settings))
    log = directory / "serve.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [ECHORAY, "serve", "--config", config], stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    system = RunningSystem(f"127.0.0.1:{gateway_port}", f"127.0.0.1:{control_port}", checkpoint, process, log)
    try:
        _wait_until_ready(system)
        yield system
    finally:
        leftover = stop(process)
    # A database elsewhere leaves the checkpoint's to another system, which may be running.
    if "database" not in settings.get("rollouts", {}):
        leftover += [path.name for path in (checkpoint / "rollouts").glob("*") if path.name.endswith(PASSING)]
    assert not leftover, f"left behind after Ctrl-C: {leftover}"


def _wait_until_ready(system: RunningSystem) -> None:
    deadline = time.monotonic() + START_SECONDS
    while "Ready" not in (text := system.log.read_text(errors="replace")):
        assert system.process.poll() is None, f"echoray serve ended with {system.process.returncode}:\n{text}"
        assert time.monotonic() < deadline, f"echoray serve is not ready after {START_SECONDS} s:\n{text}"
        time.sleep(0.1)


def title_of(process: psutil.Process) -> str:
    """The command line of a process, empty where it has ended."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def stop(process: subprocess.Popen[bytes]) -> list[str]:
    """Sends Ctrl-C, and returns what still runs of the system afterwards, killed."""
    family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    process.send_signal(signal.SIGINT)
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        family.append(psutil.Process(process.pid))
    _, alive = psutil.wait_procs(family, timeout=5)
    leftover = []
    for child in alive:
        try:
            leftover.append(" ".join(child.cmdline())[:200])
            child.kill()
        except psutil.NoSuchProcess:
            continue
    return leftover
