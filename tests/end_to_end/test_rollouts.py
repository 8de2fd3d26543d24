"""One organ's experts replaced under load, with Control and a replica killed on the way; then what must not pass."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest

from echovlm_ray.checkpoint.layout import read_index, registry_root
from echovlm_ray.client import EchoVLMClient
from echovlm_ray.client.control import ExpertControlClient
from echovlm_ray.client.errors import EchoVLMError
from experts.bundle import Bundle
from experts.registry import Registry
from protos import control_pb2
from tests.changed_bundles import changed_bundle, not_a_number
from tests.running_system import RunningSystem

PATIENCE_SECONDS = 90.0
WHO = "end-to-end test"
Found = TypeVar("Found")

# (organ, version of its bundle, text)
Answered = tuple[str, str, str]


def until(look: Callable[[], Found | None], what: str) -> Found:
    """Looks again and again, also while Control is away."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            found = look()
        except EchoVLMError:
            found = None
        if found:
            return found
        assert time.monotonic() < deadline, f"not within {PATIENCE_SECONDS} s: {what}"
        time.sleep(0.05)


def ask(system: RunningSystem, organ: str) -> Answered:
    with EchoVLMClient(system.gateway_address) as client:
        return answer_of(client, organ)


def answer_of(client: EchoVLMClient, organ: str) -> Answered:
    answer = client.generate(
        prompt="What is shown?", task="free", organs=[organ], max_new_tokens=24, timeout_s=PATIENCE_SECONDS
    )
    (share,) = answer.summary.provenance.organs
    return share.organ, share.bundle_version, answer.text


@contextmanager
def load(system: RunningSystem, organs: tuple[str, ...]) -> Iterator[list[Answered]]:
    """One stream of requests for each organ while the block lasts; a single one that fails fails the block."""
    stop = threading.Event()
    answered: list[Answered] = []

    def stream(organ: str) -> None:
        with EchoVLMClient(system.gateway_address) as client:
            while not stop.is_set():
                answered.append(answer_of(client, organ))

    with ThreadPoolExecutor(len(organs)) as pool:
        streams: list[Future[None]] = [pool.submit(stream, organ) for organ in organs]
        try:
            yield answered
        finally:
            stop.set()
        for each in streams:
            each.result()


def rollout_of(control: ExpertControlClient, organ: str) -> control_pb2.Rollout:
    (rollout,) = control.list(organ).rollouts
    return rollout


def in_state(control: ExpertControlClient, organ: str, state: str) -> control_pb2.Rollout:
    def look() -> control_pb2.Rollout | None:
        rollout = rollout_of(control, organ)
        assert rollout.state == state or rollout.state not in ("failed", "rolled_back"), rollout.reason
        return rollout if rollout.state == state else None

    return until(look, f"{organ} {state}")


def kill(system: RunningSystem, *applications: str) -> list[int]:
    """Ends the replicas of some applications at once."""
    # All of them first: with Control gone nobody says where the others are.
    pids = [int(replica["pid"]) for application in applications for replica in system.replicas(application)]
    assert len(pids) == len(applications)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    return pids


def held(control: ExpertControlClient, organ: str) -> list[set[str]]:
    replicas = control.list(organ).replicas
    return [{bundle.digest for bundle in replica.bundles if bundle.progress == 1} for replica in replicas]


@pytest.fixture
def control(running_system: RunningSystem) -> Iterator[ExpertControlClient]:
    with ExpertControlClient(running_system.control_address, timeout_s=10) as client:
        yield client


@pytest.fixture
def heart(running_system: RunningSystem) -> Bundle:
    index = read_index(running_system.checkpoint)
    return Registry(registry_root(running_system.checkpoint)).open(index.entry("heart").bundle_digest)


def test_an_organs_experts_are_replaced_under_load(
    running_system: RunningSystem, control: ExpertControlClient, heart: Bundle, tmp_path: Path
) -> None:
    system = running_system
    manifest = changed_bundle(tmp_path / "next", heart, "1.1.0")
    before, liver = ask(system, "heart"), ask(system, "liver")
    assert before[1] == "1.0.0"

    with load(system, ("heart", "liver")) as answered:
        pushed = control.push(tmp_path / "next")
        assert pushed.digest == manifest.digest
        memory = control.stage("heart", version="1.1.0", actor=WHO, dry_run=True).memory
        assert [replica.fits for replica in memory] == [True]
        control.stage("heart", version="1.1.0", actor=WHO)
        (killed,) = kill(system, "control")
        in_state(control, "heart", "warm")
        assert [replica["pid"] for replica in system.replicas("control")] != [killed]
        assert {version for organ, version, _ in answered if organ == "heart"} == {"1.0.0"}

        seen = len(answered)
        control.canary("heart", 50, digest=manifest.digest, actor=WHO)
        both = {"1.0.0", "1.1.0"}
        until(lambda: {version for organ, version, _ in answered[seen:] if organ == "heart"} == both, "both versions")

        control.promote("heart", digest=manifest.digest, actor=WHO)
        until(lambda: ask(system, "heart")[1] == "1.1.0", "the new version")
        until(lambda: held(control, "heart") == [{manifest.digest}], "the old version unloaded")
        after = ask(system, "heart")
        assert (after[1], after[2] != before[2]) == ("1.1.0", True)

        # A replica that comes back while Control is away as well serves what was promoted.
        kill(system, "expert-heart", "control")
        assert ask(system, "heart") == after
        until(lambda: held(control, "heart") == [{manifest.digest}], "the replica and Control are back")

        control.rollback("heart", digest=manifest.digest, actor=WHO)
        until(lambda: ask(system, "heart") == before, "the version before")
        until(lambda: held(control, "heart") == [{heart.digest}], "the new version unloaded")

    assert {answer for answer in answered if answer[0] == "liver"} == {liver}
    assert {answer for answer in answered if answer[0] == "heart"} == {before, after}
    history = control.history("heart", verify=True)
    assert not history.faults
    assert [entry.event for entry in history.entries][:5] == ["stage", "verify", "warm_up", "canary", "promote"]


def test_a_bad_candidate_ends_failed_and_the_incumbent_answers_as_before(
    running_system: RunningSystem, control: ExpertControlClient, heart: Bundle, tmp_path: Path
) -> None:
    changed_bundle(tmp_path / "bad", heart, "1.2.0", not_a_number)
    before = ask(running_system, "heart")
    digest = control.push(tmp_path / "bad").digest
    control.stage("heart", digest=digest, actor=WHO)
    until(lambda: rollout_of(control, "heart").state == "failed", "failed")
    rollout = rollout_of(control, "heart")
    assert rollout.digest == digest
    assert "not a number" in rollout.reason
    assert "not a number" in control.history("heart", last=1).entries[0].reason
    assert ask(running_system, "heart") == before
    assert held(control, "heart") == [{heart.digest}]


def test_an_organ_that_was_never_there_comes_and_goes(
    running_system: RunningSystem, control: ExpertControlClient, heart: Bundle, tmp_path: Path
) -> None:
    names: dict[str, Any] = {"organ": "lung", "name": "echovlm-demo-lung", "organ_synonyms": ("pulmo",)}
    manifest = changed_bundle(tmp_path / "lung", heart, "1.0.0", **names)
    control.push(tmp_path / "lung")
    control.stage("lung", version="1.0.0", actor=WHO)
    in_state(control, "lung", "warm")
    control.promote("lung", digest=manifest.digest, actor=WHO)
    until(lambda: ask(running_system, "lung")[:2] == ("lung", "1.0.0"), "the lung's answer")
    assert len(running_system.replicas("expert-lung")) == 1
    running_system.wait_until_healthy("echovlm.v1.ExpertGroup/lung", 30)
    control.retire("lung", actor=WHO)
    until(lambda: not control.list("lung").replicas, "its application removed")
    assert "lung" not in {member.organ for member in control.list().live.members}
    assert ask(running_system, "heart")[1] == "1.0.0"
