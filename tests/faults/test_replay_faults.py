"""`kill -9` of Control in the middle of a replay, on the running system: nothing of the past stays."""

import os
import signal
from pathlib import Path

import pytest

from echovlm_ray.client import EchoVLMClient, FailedPreconditionError, Summary
from echovlm_ray.client.control import ExpertControlClient
from echovlm_ray.client.errors import UnavailableError
from tests.changed_bundles import changed_bundle
from tests.live_rollouts import WHO, bundle_of, held, in_state, load, pids_of, until
from tests.running_system import RunningSystem

ORGAN, BYSTANDER = "thyroid", "vessel"
NEW_TOKENS = 40


def ask(system: RunningSystem, expert_set_id: str = "") -> Summary:
    with EchoVLMClient(system.gateway_address) as client:
        answer = client.generate(
            prompt="What is shown?",
            task="free",
            organs=[ORGAN],
            max_new_tokens=NEW_TOKENS,
            temperature=1.0,
            seed=11,
            expert_set_id=expert_set_id,
            for_replay=True,
            timeout_s=60,
        )
    return answer.summary


def test_control_killed_during_a_replay_leaves_nothing_resident(running_system: RunningSystem, tmp_path: Path) -> None:
    system = running_system
    old = bundle_of(system, ORGAN)
    new = changed_bundle(tmp_path / "next", old, "1.9.0")
    before = ask(system)
    past = before.provenance.expert_set_id
    with ExpertControlClient(system.control_address, timeout_s=10) as control:
        control.push(tmp_path / "next")
        control.stage(ORGAN, digest=new.digest, actor=WHO)
        in_state(control, ORGAN, "warm")
        control.promote(ORGAN, digest=new.digest, actor=WHO)
        # The version before is not kept to go back to.
        control.retire(ORGAN, digest=old.digest, actor=WHO)
        until(lambda: held(control, ORGAN) == [{new.digest}], "only the new version held")
        with pytest.raises(FailedPreconditionError, match="echoray experts replay"):
            ask(system, past)
        assert ask(system).token_ids != before.token_ids
        with load(system, (ORGAN, BYSTANDER), pause_s=0.1) as answered, control.replay(past, organs=[ORGAN]) as replay:
            replay.wait()
            again = ask(system, past)
            assert (again.token_ids, again.provenance) == (before.token_ids, before.provenance)
            assert held(control, ORGAN) == [{old.digest, new.digest}]
            os.kill(pids_of(system, "control")[0], signal.SIGKILL)
            with pytest.raises(UnavailableError):
                next(replay)
            until(lambda: held(control, ORGAN) == [{new.digest}], "nothing held of the past")
            with pytest.raises(FailedPreconditionError, match="echoray experts replay"):
                ask(system, past)
            seen = len(answered)
            until(lambda: len(answered) > seen + 4, "answers after the kill")
        assert {version for organ, version, _ in answered if organ == ORGAN} == {"1.9.0"}
        with control.replay(past, organs=[ORGAN]) as replay:
            replay.wait()
            assert ask(system, past).token_ids == before.token_ids
        until(lambda: held(control, ORGAN) == [{new.digest}], "nothing held of the past")
