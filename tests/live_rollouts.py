"""Helpers for tests of rollouts on a running system: requests, waiting, kills, and resident bundles."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

from echovlm_ray.checkpoint.layout import read_index, registry_root
from echovlm_ray.client import EchoVLMClient
from echovlm_ray.client.control import ExpertControlClient
from echovlm_ray.client.errors import EchoVLMError
from experts.bundles.bundle import Bundle
from experts.registry.registry import Registry
from protos import control_pb2
from tests import waiting
from tests.running_system import RunningSystem

TIMEOUT_SECONDS = 90.0
WHO = "end-to-end test"
Found = TypeVar("Found")

# (organ, version of its bundle, text)
Answered = tuple[str, str, str]


def until(look: Callable[[], Found | None], what: str, pause_s: float = 0.05) -> Found:
    """As `waiting.until`, also while Control is away."""

    def looked() -> Found | None:
        try:
            return look()
        except EchoVLMError:
            return None

    return waiting.until(looked, what, timeout_s=TIMEOUT_SECONDS, pause_s=pause_s)


def ask(system: RunningSystem, organ: str, new_tokens: int = 24) -> Answered:
    with EchoVLMClient(system.gateway_address) as client:
        return answer_of(client, organ, new_tokens)


def answer_of(client: EchoVLMClient, organ: str, new_tokens: int = 24) -> Answered:
    answer = client.generate(
        prompt="What is shown?", task="free", organs=[organ], max_new_tokens=new_tokens, timeout_s=TIMEOUT_SECONDS
    )
    (share,) = answer.summary.provenance.organs
    return share.organ, share.bundle_version, answer.text


@contextmanager
def load(system: RunningSystem, organs: tuple[str, ...], pause_s: float = 0.0) -> Iterator[list[Answered]]:
    """One stream of requests for each organ while the block lasts; a single one that fails fails the block."""
    stop = threading.Event()
    answered: list[Answered] = []

    def stream(organ: str) -> None:
        with EchoVLMClient(system.gateway_address) as client:
            while not stop.wait(pause_s):
                answered.append(answer_of(client, organ))

    with ThreadPoolExecutor(len(organs)) as pool:
        streams: list[Future[None]] = [pool.submit(stream, organ) for organ in organs]
        try:
            yield answered
        finally:
            stop.set()
        for each in streams:
            each.result()


@contextmanager
def timed_load(system: RunningSystem, organ: str, streams: int) -> Iterator[list[tuple[float, str]]]:
    """Streams of requests while the block lasts; what comes is when each began, and the version that answered it."""
    stop = threading.Event()
    answered: list[tuple[float, str]] = []

    def stream() -> None:
        with EchoVLMClient(system.gateway_address) as client:
            while not stop.is_set():
                began = time.monotonic()
                answered.append((began, answer_of(client, organ)[1]))

    with ThreadPoolExecutor(streams) as pool:
        under_way: list[Future[None]] = [pool.submit(stream) for _ in range(streams)]
        try:
            yield answered
        finally:
            stop.set()
        for each in under_way:
            each.result()


def rollout_of(control: ExpertControlClient, organ: str) -> control_pb2.Rollout:
    """The organ's newest rollout."""
    (rollout,) = control.list(organ).rollouts
    return rollout


def in_state(control: ExpertControlClient, organ: str, *states: str) -> control_pb2.Rollout:
    def look() -> control_pb2.Rollout | None:
        rollout = rollout_of(control, organ)
        assert rollout.state in states or rollout.state not in ("failed", "rolled_back"), rollout.reason
        return rollout if rollout.state in states else None

    return until(look, f"{organ} {' or '.join(states)}")


def pids_of(system: RunningSystem, *applications: str) -> list[int]:
    """All of them in one look: once Control is gone, it cannot be asked where the others are."""
    found = {each["name"]: each["replicas"] for each in system.status()["applications"]}
    pids = [int(replica["pid"]) for application in applications for replica in found[application]]
    assert len(pids) == len(applications)
    return pids


def kill(system: RunningSystem, *applications: str) -> list[int]:
    """Ends the replicas of some applications at once."""
    pids = pids_of(system, *applications)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    return pids


def held(control: ExpertControlClient, organ: str) -> list[set[str]]:
    """The resident bundles of each replica, without those that stay only for a rollback."""
    replicas = control.list(organ).replicas
    return [
        {bundle.digest for bundle in replica.bundles if bundle.progress == 1 and not bundle.spare}
        for replica in replicas
    ]


def bundle_of(system: RunningSystem, organ: str) -> Bundle:
    """The checkpoint's initial bundle."""
    index = read_index(system.checkpoint)
    return Registry(registry_root(system.checkpoint)).open(index.entry(organ).bundle_digest)
