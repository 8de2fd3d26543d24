"""`kill -9` of Control and of an expert replica at every stage of a rollout, on the running system and under load."""

import os
import signal
import sqlite3
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import pytest

from echovlm_ray.client import EchoVLMClient, Text
from echovlm_ray.client.control import ExpertControlClient
from experts.bundles.bundle import Bundle
from protos import control_pb2
from tests.changed_bundles import changed_bundle
from tests.live_rollouts import WHO, Answered, ask, bundle_of, held, in_state, load, pids_of, rollout_of, until
from tests.running_system import RunningSystem

ORGAN, BYSTANDER = "kidney", "liver"
OLD, NEW = "1.0.0", "1.9.0"
LONG_ANSWER = 400
VICTIMS = {"control": ("control",), "replica": (f"expert-{ORGAN}",), "both": (f"expert-{ORGAN}", "control")}


@dataclass
class Scene:
    """One organ of a running system, and the version that it may get.

    Attributes:
        old: the digest of the version before.
        new: the digest of the candidate.
        alone: (organ, version) → what it answers on an idle system.
        long: version → its long answer on an idle system.
    """

    system: RunningSystem
    control: ExpertControlClient
    old: str
    new: str
    alone: dict[tuple[str, str], Answered]
    long: dict[str, Answered]
    callers: ThreadPoolExecutor

    def stage(self) -> None:
        self.control.stage(ORGAN, digest=self.new, actor=WHO)

    def warm(self) -> None:
        self.stage()
        in_state(self.control, ORGAN, "warm")

    def canary(self, percent: float) -> None:
        self.warm()
        self.control.canary(ORGAN, percent, digest=self.new, actor=WHO)

    def promote(self) -> None:
        self.control.promote(ORGAN, digest=self.new, actor=WHO)

    def roll_back(self) -> None:
        """Takes the new version back, from wherever it stands."""
        if self.state() == "stable":
            self.control.roll_back_stable(ORGAN, digest=self.new, actor=WHO)
        else:
            self.control.rollback(ORGAN, digest=self.new, actor=WHO)

    def state(self) -> str:
        """Of the newest rollout, read where the death of no process delays it."""
        path = self.system.checkpoint / "rollouts" / "rollouts.db"
        connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
        try:
            query = "SELECT state FROM rollouts WHERE organ = ? ORDER BY sequence DESC LIMIT 1"
            return str(connection.execute(query, (ORGAN,)).fetchone()[0])
        finally:
            connection.close()

    def wait_for_state(self, state: str) -> None:
        until(lambda: self.state() == state, state, pause_s=0.001)

    def serves(self, version: str) -> None:
        until(lambda: ask(self.system, ORGAN)[1] == version, version)

    def long_request(self) -> "Future[Answered]":
        """A request that is under way for seconds."""
        begun = threading.Event()

        def run() -> Answered:
            text = ""
            with (
                EchoVLMClient(self.system.gateway_address) as client,
                client.stream(
                    prompt="What is shown?", task="free", organs=[ORGAN], max_new_tokens=LONG_ANSWER, timeout_s=90
                ) as stream,
            ):
                for event in stream:
                    if isinstance(event, Text):
                        text += event.text
                        begun.set()
                assert stream.summary is not None
                (share,) = stream.summary.provenance.organs
            return share.organ, share.bundle_version, text

        future = self.callers.submit(run)
        assert begun.wait(60)
        return future

    def settled(self, digest: str) -> None:
        """One version is live, nothing is in flight, and replicas hold that one and no other."""
        until(lambda: held(self.control, ORGAN) == [{digest}], f"only {digest[:12]} held")
        live = self.control.list().live
        assert [member.bundle_digest for member in live.members if member.organ == ORGAN] == [digest]


Pinned = tuple[str, "Future[Answered]"]


def staged(scene: Scene) -> None:
    scene.stage()


def verified(scene: Scene) -> None:
    scene.stage()
    scene.wait_for_state("verified")


def warm(scene: Scene) -> None:
    scene.warm()


def shadow(scene: Scene) -> None:
    scene.warm()
    scene.control.shadow(ORGAN, 100, digest=scene.new, actor=WHO)
    ask(scene.system, ORGAN)


def canary(scene: Scene) -> None:
    scene.canary(50)
    ask(scene.system, ORGAN)


def promoted(scene: Scene) -> None:
    scene.warm()
    scene.promote()


def draining(scene: Scene) -> Pinned:
    scene.warm()
    under_way = scene.long_request()
    scene.promote()
    scene.serves(NEW)
    return OLD, under_way


def taken_back(scene: Scene) -> None:
    scene.canary(100)
    scene.serves(NEW)
    scene.roll_back()


def taken_back_and_draining(scene: Scene) -> Pinned:
    scene.canary(100)
    scene.serves(NEW)
    under_way = scene.long_request()
    scene.roll_back()
    scene.serves(OLD)
    return NEW, under_way


def restoring(scene: Scene) -> None:
    scene.warm()
    scene.promote()
    scene.settled(scene.new)
    scene.roll_back()


def restored_and_loading(scene: Scene) -> None:
    restoring(scene)
    scene.wait_for_state("verified")


def restored_and_draining(scene: Scene) -> Pinned:
    scene.warm()
    scene.promote()
    scene.settled(scene.new)
    under_way = scene.long_request()
    scene.roll_back()
    scene.serves(OLD)
    return NEW, under_way


# Where the kill comes, the states in which the newest rollout may then be, and what becomes of it by itself.
STAGES: dict[str, tuple[Callable[[Scene], Pinned | None], str, str]] = {
    "staged": (staged, "staged", "warm"),
    "verified": (verified, "verified", "warm"),
    "warm": (warm, "warm", "warm"),
    "shadow": (shadow, "shadow", "shadow"),
    "canary": (canary, "canary", "canary"),
    "promoted": (promoted, "stable", "stable"),
    "draining": (draining, "stable", "stable"),
    "taken back": (taken_back, "rolled_back", "rolled_back"),
    "taken back, draining": (taken_back_and_draining, "rolled_back", "rolled_back"),
    "restoring": (restoring, "staged", "stable"),
    "restoring, verified": (restored_and_loading, "verified", "stable"),
    "restored, draining": (restored_and_draining, "stable", "stable"),
}
# What runs without `--every-stage`.
QUICK = {("verified", "both"), ("canary", "control"), ("draining", "both"), ("taken back, draining", "replica")}
CASES = [
    pytest.param(stage, victim, marks=() if (stage, victim) in QUICK else pytest.mark.thorough, id=f"{stage}-{victim}")
    for stage in STAGES
    for victim in VICTIMS
]


@pytest.fixture(scope="module")
def scene(running_system: RunningSystem, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    bundle: Bundle = bundle_of(running_system, ORGAN)
    folder = tmp_path_factory.mktemp("candidate") / "next"
    manifest = changed_bundle(folder, bundle, NEW)
    with (
        ExpertControlClient(running_system.control_address, timeout_s=10) as control,
        ThreadPoolExecutor(4) as callers,
    ):
        control.push(folder)
        scene = Scene(running_system, control, bundle.digest, manifest.digest, {}, {}, callers)
        scene.alone = {(organ, OLD): ask(running_system, organ) for organ in (ORGAN, BYSTANDER)}
        scene.long[OLD] = ask(running_system, ORGAN, LONG_ANSWER)
        scene.canary(100)
        scene.serves(NEW)
        scene.alone[ORGAN, NEW] = ask(running_system, ORGAN)
        scene.long[NEW] = ask(running_system, ORGAN, LONG_ANSWER)
        scene.roll_back()
        scene.settled(scene.old)
        assert scene.alone[ORGAN, NEW][2] != scene.alone[ORGAN, OLD][2]
        yield scene


@pytest.mark.parametrize(("stage", "victim"), CASES)
def test_killed_at_a_stage(scene: Scene, stage: str, victim: str) -> None:
    bring, state, goes_on_to = STAGES[stage]
    pids = pids_of(scene.system, *VICTIMS[victim])
    with load(scene.system, (ORGAN, BYSTANDER), pause_s=0.1) as answered:
        pinned = bring(scene)
        assert pinned is None or not pinned[1].done()
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        at_the_kill = scene.state()
        seen = len(answered)
        assert at_the_kill == state
        rollout = in_state_after(scene, goes_on_to)
        assert rollout.state == goes_on_to
        check_replicas(scene, rollout)
        if pinned is not None:
            version, under_way = pinned
            assert under_way.result() == scene.long[version]
        bring_back(scene, rollout)
        until(lambda: len(answered) > seen + 4, "answers after the kill")
    assert pids_of(scene.system, *VICTIMS[victim]) != pids
    check_answers(scene, stage, answered)
    assert not scene.control.history(verify=True).faults


def in_state_after(scene: Scene, state: str) -> control_pb2.Rollout:
    def look() -> control_pb2.Rollout | None:
        rollout = rollout_of(scene.control, ORGAN)
        return rollout if rollout.state == state else None

    return until(look, f"{state}, but it is {scene.state()}")


def check_replicas(scene: Scene, rollout: control_pb2.Rollout) -> None:
    """They come to hold what is live, and the candidate where there is one; pinned requests may keep a further one."""
    members = scene.control.list().live.members
    (live,) = [member.bundle_digest for member in members if member.organ == ORGAN]
    wanted = {live} | ({rollout.digest} if rollout.state in ("warm", "shadow", "canary") else set())
    until(lambda: all(wanted <= each for each in held(scene.control, ORGAN) or [set()]), f"{wanted} held")


def bring_back(scene: Scene, rollout: control_pb2.Rollout) -> None:
    """The version before serves again, and nothing else is held."""
    if rollout.state in ("warm", "shadow", "canary") or (rollout.digest == scene.new and rollout.state == "stable"):
        scene.roll_back()
    scene.serves(OLD)
    scene.settled(scene.old)


def check_answers(scene: Scene, stage: str, answered: list[Answered]) -> None:
    """Nothing failed, or `load` had raised; and every answer is the one that its version gives alone."""
    for answer in answered:
        assert answer == scene.alone[answer[0], answer[1]]
    if stage in ("staged", "verified", "warm", "shadow"):
        assert {version for organ, version, _ in answered if organ == ORGAN} == {OLD}
