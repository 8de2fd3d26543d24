"""One organ's experts replaced under load, with Control and a replica killed on the way; then what must not pass."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from echovlm_ray.client import EchoVLMClient, NotFoundError, OrganInCanaryError
from echovlm_ray.client.control import ExpertControlClient
from experts.bundles.bundle import Bundle
from tests.changed_bundles import changed_bundle, not_a_number
from tests.live_rollouts import WHO, ask, bundle_of, held, in_state, kill, load, rollout_of, timed_load, until
from tests.running_system import RunningSystem


@pytest.fixture
def control(running_system: RunningSystem) -> Iterator[ExpertControlClient]:
    with ExpertControlClient(running_system.control_address, timeout_s=10) as client:
        yield client


@pytest.fixture
def heart(running_system: RunningSystem) -> Bundle:
    return bundle_of(running_system, "heart")


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

        control.roll_back_stable("heart", digest=manifest.digest, actor=WHO)
        until(lambda: ask(system, "heart") == before, "the version before")
        until(lambda: held(control, "heart") == [{heart.digest}], "the new version unloaded")

    assert {answer for answer in answered if answer[0] == "liver"} == {liver}
    assert {answer for answer in answered if answer[0] == "heart"} == {before, after}
    history = control.history("heart", verify=True)
    assert not history.faults
    assert [entry.event for entry in history.entries][:5] == ["stage", "verify", "warm_up", "canary", "promote"]


def check_change(system: RunningSystem, change: Callable[[], None], version: str) -> None:
    """Every request that begins once `change` has returned is answered by a version, however busy the system is."""
    with timed_load(system, "heart", streams=4) as answered:
        until(lambda: len(answered) >= 8, "answers before")
        change()
        changed = time.monotonic()
        until(lambda: sum(began > changed for began, _ in answered) >= 8, "answers after")
    assert {answered_by for began, answered_by in answered if began > changed} == {version}


def test_no_request_begins_with_the_version_before_once_a_change_is_done(
    running_system: RunningSystem, control: ExpertControlClient, heart: Bundle, tmp_path: Path
) -> None:
    manifest = changed_bundle(tmp_path / "next", heart, "1.3.0")
    control.push(tmp_path / "next")
    control.stage("heart", digest=manifest.digest, actor=WHO)
    in_state(control, "heart", "warm")

    def promote() -> None:
        assert not control.promote("heart", digest=manifest.digest, actor=WHO).not_taken_up

    def is_back() -> bool:
        state = next(control.watch())
        (rollout,) = [found for found in state.rollouts if found.organ == "heart"]
        return (rollout.digest, rollout.state) == (heart.digest, "stable") and not state.not_taken_up

    def roll_back() -> None:
        # The controller promotes the version before, once it is loaded again.
        control.roll_back_stable("heart", digest=manifest.digest, actor=WHO)
        until(is_back, "the version before")

    check_change(running_system, promote, "1.3.0")
    check_change(running_system, roll_back, "1.0.0")


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
    # A thousandth of a percent: none of the requests here is chosen.
    control.canary("lung", 0.001, digest=manifest.digest, actor=WHO)
    with pytest.raises(OrganInCanaryError, match="'lung' is new and in canary") as caught:
        ask(running_system, "lung")
    assert (caught.value.organ, caught.value.percent) == ("lung", 0.001)
    with load(running_system, ("heart", "liver")):
        assert not control.promote("lung", digest=manifest.digest, actor=WHO).not_taken_up
        assert ask(running_system, "lung")[:2] == ("lung", "1.0.0"), "at once, although the system is busy"
    with EchoVLMClient(running_system.gateway_address) as client:
        assert "lung" in {served.organ for served in client.model_info().organs}
    assert len(running_system.replicas("expert-lung")) == 1
    running_system.wait_until_healthy("echovlm.v1.ExpertGroup/lung", 30)
    control.retire("lung", actor=WHO)
    with pytest.raises(NotFoundError):
        ask(running_system, "lung")
    until(lambda: not control.list("lung").replicas, "its application removed")
    assert "lung" not in {member.organ for member in control.list().live.members}
    assert ask(running_system, "heart")[1] == "1.0.0"
