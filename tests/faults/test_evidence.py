"""Without requests, time alone does not promote; after a promotion the old version stays resident for a rollback."""

import json
import time
from pathlib import Path

from echovlm_ray.client.control import ExpertControlClient
from tests.changed_bundles import changed_bundle
from tests.live_rollouts import WHO, ask, bundle_of, in_state, rollout_of, until
from tests.running_system import RunningSystem

ORGAN, VERSION = "thyroid", "1.6.0"
SUCCESSES = 3


def spare(control: ExpertControlClient) -> list[set[str]]:
    replicas = control.list(ORGAN).replicas
    return [{bundle.digest for bundle in replica.bundles if bundle.spare} for replica in replicas]


def test_a_step_waits_for_requests_and_the_version_before_stays_to_go_back_to(
    running_system: RunningSystem, tmp_path: Path
) -> None:
    system, first = running_system, bundle_of(running_system, ORGAN)
    digest = changed_bundle(tmp_path / "next", first, VERSION).digest
    before = ask(system, ORGAN)
    step = {"percent": 100, "hold_s": 0, "min_successes": SUCCESSES}
    with ExpertControlClient(system.control_address, timeout_s=10) as control:
        control.push(tmp_path / "next")
        control.apply(json.dumps({"organ": ORGAN, "digest": digest, "steps": [step]}), actor=WHO)
        in_state(control, ORGAN, "canary")
        time.sleep(3.0)
        words = f"{SUCCESSES} more successful requests of {SUCCESSES}"
        until(lambda: rollout_of(control, ORGAN).waits_for == words, "it says what it waits for")
        for _ in range(SUCCESSES):
            assert ask(system, ORGAN)[1] == VERSION
        in_state(control, ORGAN, "stable")

        until(lambda: spare(control) == [{first.digest}], "the version before kept")
        control.roll_back_stable(ORGAN, digest=digest, actor=WHO)
        in_state(control, ORGAN, "stable")
        until(lambda: ask(system, ORGAN) == before, "the version before")
        events = [entry.event for entry in control.history(ORGAN, last=5).entries]
        assert events == ["stage", "verify", "warm_up", "promote", "rollback"]
