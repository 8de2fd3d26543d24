"""Control is killed while it evaluates a gate: nothing is promoted, and the next one evaluates from the beginning."""

import json
from pathlib import Path

import pytest

from echovlm_ray.cli.main import app
from echovlm_ray.client.control import ExpertControlClient
from echovlm_ray.client.errors import FailedPreconditionError
from protos import control_pb2
from tests.changed_bundles import changed_bundle
from tests.live_rollouts import WHO, ask, bundle_of, held, in_state, kill, rollout_of, until
from tests.running_system import RunningSystem

ORGAN = "gynaecology"


def phantoms(folder: Path) -> Path:
    options = ["--organ", ORGAN, "--count", "5", "--seed", "92002", "--language", "en", "--task", "report"]
    app(["data", "phantom", str(folder), *options], standalone_mode=False)
    return folder / "records.json"


def is_asking(rollout: control_pb2.Rollout) -> bool:
    return rollout.gates[0].state == "open" and 0 < rollout.gates[0].answered < rollout.gates[0].questions


def test_a_gate_outlives_control_and_its_figures_decide(running_system: RunningSystem, tmp_path: Path) -> None:
    system, first = running_system, bundle_of(running_system, ORGAN)
    equal = changed_bundle(tmp_path / "equal", first, "1.8.0", lambda tensor: tensor)
    worse = changed_bundle(tmp_path / "worse", first, "1.8.1")
    # Random weights say nothing that is right, and have no prototype by which an organ is found.
    gate = {"dataset": str(phantoms(tmp_path / "held")), "metric": "attribute_f1", "organ": ORGAN, "organs": "given"}
    gates = [{**gate, "at_least": 0, "not_below_incumbent_by": 0.01}]
    with ExpertControlClient(system.control_address, timeout_s=20) as control:
        for name in ("equal", "worse"):
            control.push(tmp_path / name)
        control.apply(json.dumps({"organ": ORGAN, "digest": equal.digest, "gates": gates}), actor=WHO)
        until(lambda: is_asking(rollout_of(control, ORGAN)), "the gate under way", pause_s=0.01)
        # The candidate answers no request meanwhile.
        assert ask(system, ORGAN)[1] == first.manifest.version
        kill(system, "control")
        stable = in_state(control, ORGAN, "stable")
        assert [found.state for found in stable.gates] == ["passed"]
        events = [entry.event for entry in control.history(ORGAN, last=5).entries]
        assert events == ["stage", "verify", "warm_up", "evaluate", "promote"]
        assert control.history(ORGAN, verify=True).faults == []

        control.stage(ORGAN, digest=worse.digest, actor=WHO)
        in_state(control, ORGAN, "warm")
        control.promote(ORGAN, actor=WHO, gates_json=json.dumps([{**gate, "at_least": 0.5}]))
        until(lambda: rollout_of(control, ORGAN).gates[0].state == "failed", "refused")
        with pytest.raises(FailedPreconditionError, match=r"not pass its gates.*attribute_f1 of gynaecology is 0.000"):
            control.promote(ORGAN, actor=WHO)
        evaluations = {found.digest: found.passed for found in control.list(ORGAN).evaluations}
        assert evaluations == {equal.digest: True, worse.digest: False}
        assert ask(system, ORGAN)[1] == "1.8.0"

        control.rollback(ORGAN, actor=WHO)
        control.roll_back_stable(ORGAN, digest=equal.digest, actor=WHO)
        in_state(control, ORGAN, "stable")
        until(lambda: held(control, ORGAN) == [{first.digest}], "only the first version held")
