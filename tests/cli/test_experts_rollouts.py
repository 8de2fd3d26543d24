import getpass
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from echovlm_ray.cli.experts import app
from echovlm_ray.cli.rollout_format import format_size
from echovlm_ray.cli.state import announced
from router.rollouts.health import Observation
from tests.cli.calls import done, done_json, invoke, refused
from tests.cli.control_server import System, make_bundle
from tests.experts.bad_bundles import flip_last_byte
from tests.waiting import until

ECHORAY = Path(sys.executable).with_name("echoray")


def test_a_version_goes_from_stage_to_stable_and_back(system: System) -> None:
    staged = done(system, "stage", "heart", "1.1.0", "--reason", "finer valves", "--wait")
    assert "heart 1.1.0, rollout heart-2:" in staged
    assert "heart 1.1.0 is warm." in staged
    assert "heart 1.1.0 answers" not in staged
    rollout = system.rollout()
    assert (rollout.state, rollout.reason, rollout.actor) == ("warm", "", getpass.getuser())

    assert "answers 5 % of the requests" in done(system, "canary", "heart", "--percent", 5, "--actor", "ann")
    assert (system.rollout().state, system.rollout().percent) == ("canary", 5.0)
    assert "its answers are compared" in done(system, "shadow", "heart", "--percent", "20")
    promoted = done(system, "promote", "heart", "--wait")
    assert "heart 1.1.0 is stable." in promoted
    old = system.digests["heart", "1.0.0"]
    assert all(old not in held for held in system.fleet.held("heart").values())

    back = done(system, "rollback", "heart", "--stable", "1.1.0", "--reason", "misses effusions", "--wait")
    assert "stable before" in back
    assert "heart 1.0.0 is stable." in back
    assert system.store.policy().stable.bundle_digest("heart") == old
    new = system.digests["heart", "1.1.0"]
    assert all(set(held) == {old} for held in system.fleet.held("heart").values())
    entries = [(entry.action, entry.actor) for entry in system.store.history("heart")]
    assert ("canary", "ann") in entries
    assert new != old


def test_a_dry_run_says_what_would_happen_on_every_replica_and_touches_nothing(system: System) -> None:
    before = system.store.head()
    text = done(system, "stage", "heart", "1.1.0", "--dry-run")
    assert "Nothing was done. This would happen: the bundle is read and verified" in text
    nbytes = system.fleet.load_bytes("heart", system.digests["heart", "1.1.0"])
    size = format_size(nbytes)
    assert f"heart-1 {size} {size} 100 kB fits" in text
    assert "heart-2" in text
    shown = done_json(system, "stage", "heart", "1.1.0", "--dry-run")
    assert [memory["needed_bytes"] for memory in shown["memory"]] == [nbytes, nbytes]
    assert not shown["changed"]
    assert system.store.head() == before


def test_a_dry_run_of_what_does_not_fit_fails(system: System) -> None:
    system.fleet.limit_bytes = 1 + system.fleet.load_bytes("heart", system.digests["heart", "1.1.0"])
    result = invoke(system, "stage", "heart", "1.1.0", "--dry-run")
    assert result.exit_code == 1
    assert "does not fit" in result.stdout
    assert system.store.head().count == 1


def test_waiting_for_a_candidate_that_fails_ends_with_the_reason(system: System) -> None:
    system.add("heart", "1.2.0", damaged=True)
    result = invoke(system, "stage", "heart", "1.2.0", "--wait")
    assert result.exit_code == 1
    assert "heart 1.2.0 is failed: verification failed: " in result.stderr
    assert "echoray experts history heart" in result.stderr


def test_waiting_shows_how_far_the_loads_are(system: System) -> None:
    system.fleet.proceed.clear()
    process = subprocess.Popen(
        [ECHORAY, "experts", "stage", "heart", "1.1.0", "--wait", "--control", system.address],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if "loads" in line:
            system.fleet.proceed.set()
    assert process.wait(20) == 0
    text = "".join(lines)
    assert "heart: replica heart-1 loads 1.1.0: 40%" in text
    assert "heart: replica heart-1 holds 1.1.0, " in text
    assert text.index("is verified") < text.index("loads") < text.index("is warm")


@pytest.mark.parametrize("json", [(), ("--json",)])
def test_ctrl_c_ends_the_waiting_and_not_the_rollout(system: System, json: tuple[str, ...]) -> None:
    system.fleet.proceed.clear()
    process = subprocess.Popen(
        [*map(str, (ECHORAY, "experts", "stage", "heart", "1.1.0", "--wait", "--control", system.address, *json))],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    printed = ""
    while "loads" not in printed:
        printed += process.stderr.readline()
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "the rollout goes on" in stderr
    assert "echoray experts watch heart" in stderr
    assert f"echoray experts rollback heart --rollout {system.rollout().id}" in stderr
    assert "Traceback" not in stderr
    system.fleet.proceed.set()
    system.reach("warm")


def test_digests_may_be_given_by_their_beginning(system: System) -> None:
    key = system.digests["heart", "1.1.0"]
    done(system, "stage", "heart", key[:8], "--wait")
    assert system.rollout().digest == key
    assert "in flight, warm" in refused(
        system, "promote", "heart", "--digest", system.digests["heart", "1.0.0"], code=1
    )
    assert "there are 1.0.0" in refused(system, "canary", "heart", "--percent", 5, "--digest", "0" * 8, code=2)
    assert "is no digest" in refused(system, "promote", "heart", "--digest", "1.1.0", code=2)
    done(system, "promote", "heart", "--digest", key)


def test_a_repeated_rollback_does_not_take_back_the_version_below(system: System) -> None:
    done(system, "stage", "heart", "1.1.0", "--wait")
    done(system, "promote", "heart", "--wait")
    system.fleet.proceed.clear()
    done(system, "rollback", "heart", "--stable", "1.1.0")
    again = done(system, "rollback", "heart", "--stable", "1.1.0")
    assert "Nothing to do." in again
    assert "being brought back already" in again
    system.fleet.proceed.set()
    system.reach("stable")
    assert system.store.policy().stable.bundle_digest("heart") == system.digests["heart", "1.0.0"]
    assert "has no version before it" in refused(system, "rollback", "heart", code=1)
    assert "none before it" in refused(system, "rollback", "heart", "--stable", "1.0.0", code=1)


def test_two_operators_who_type_the_same_in_turn_take_back_one_version(system: System) -> None:
    done(system, "stage", "heart", "1.1.0", "--wait")
    done(system, "promote", "heart", "--wait", "--actor", "ann")
    system.add("heart", "1.2.0")
    done(system, "stage", "heart", "1.2.0", "--wait")
    candidate = system.rollout().id
    done(system, "canary", "heart", "--percent", 5, "--rollout", candidate)
    done(system, "rollback", "heart", "--actor", "ann", "--reason", "strange")
    head = system.store.head()
    for _ in range(2):
        text = refused(system, "rollback", "heart", "--actor", "bob", code=1)
        assert f"{candidate} (1.2.0) was rolled back by ann 0 s ago: strange" in text
        assert "heart 1.1.0 is stable; to go back from it to 1.0.0:" in text
        assert "echoray experts rollback heart --stable 1.1.0" in text
    again = done(system, "rollback", "heart", "--rollout", candidate, "--actor", "bob")
    assert "Nothing to do." in again
    assert "done already" in again
    assert system.store.head() == head
    assert system.store.policy().stable.bundle_digest("heart") == system.digests["heart", "1.1.0"]


def test_a_rollback_of_a_stable_version_names_it(system: System) -> None:
    done(system, "stage", "heart", "1.1.0", "--wait")
    done(system, "promote", "heart", "--wait")
    assert "1.0.0 is not the stable version" in refused(system, "rollback", "heart", "--stable", "1.0.0", code=1)
    assert "leave out" in refused(system, "rollback", "heart", "--stable", "1.1.0", "--rollout", "heart-2", code=2)
    assert "is verified and loaded" in done(system, "rollback", "heart", "--stable", "1.1.0", "--dry-run")
    system.fleet.proceed.clear()
    done(system, "rollback", "heart", "--stable", "1.1.0", "--actor", "ann")
    # To take that back, as what is in flight, would undo what ann has just asked for.
    text = refused(system, "rollback", "heart", "--rollout", "heart-2", code=1)
    assert "left as it is" in text
    system.fleet.proceed.set()


def test_a_rollback_of_a_candidate_waits_until_its_memory_is_free(system: System) -> None:
    key = system.digests["heart", "1.1.0"]
    done(system, "stage", "heart", "1.1.0", "--wait")
    assert "heart 1.1.0 is rolled back." in done(system, "rollback", "heart", "--wait")
    assert all(key not in held for held in system.fleet.held("heart").values())


def test_asking_for_what_is_so_already_is_no_error(system: System) -> None:
    done(system, "stage", "heart", "1.1.0", "--wait")
    for command in (("stage", "heart", "1.1.0"), ("canary", "heart", "--percent", 5), ("promote", "heart")):
        done(system, *command)
        assert "Nothing to do." in done(system, *command)


def test_a_whole_organ_and_a_version_are_retired(system: System) -> None:
    assert "can no longer be staged" in done(system, "retire", "heart", "--version", "1.1.0", "--reason", "labels")
    assert "was retired" in refused(system, "stage", "heart", "1.1.0", code=1)
    assert "new requests no longer find heart" in done(system, "retire", "heart", "--dry-run")
    done(system, "retire", "heart")
    assert [member.organ for member in system.store.policy().stable.members] == ["breast"]


def test_an_unknown_organ_or_version_names_those_that_there_are(system: System) -> None:
    assert "there are breast, heart" in refused(system, "promote", "spleen", code=2)
    assert "it has 1.0.0, 1.1.0" in refused(system, "stage", "heart", "3.0.0", code=2)


def test_a_wrong_state_says_what_is_possible(system: System) -> None:
    text = refused(system, "promote", "heart", code=1)
    assert "nothing is in flight for 'heart'" in text
    assert "possible: stage, retire" in text


@pytest.mark.parametrize("percent", ["0", "101", "nan", "-5"])
def test_a_percentage_out_of_bounds_is_told(system: System, percent: str) -> None:
    done(system, "stage", "heart", "1.1.0", "--wait")
    assert "percent" in refused(system, "canary", "heart", f"--percent={percent}", code=2)


def test_nothing_there_is_one_clear_line() -> None:
    done = subprocess.run(
        [ECHORAY, "experts", "promote", "heart", "--control", "127.0.0.1:1"],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "80"},
        timeout=30,
    )
    assert done.returncode == 3
    assert "nothing answers at 127.0.0.1:1" in done.stderr
    assert "--control" in done.stderr


def test_a_control_that_is_away_for_a_moment_is_told_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    with announced("checkpoint", "127.0.0.1:1", "gateway"):
        result = CliRunner().invoke(app, ["promote", "heart", "--control", "127.0.0.1:1"])
    assert result.exit_code == 3
    assert f"(process {os.getpid()}) does run" in result.stderr
    assert "start the system" not in result.stderr


def test_json_says_all_of_it(system: System) -> None:
    shown = done_json(system, "stage", "heart", "1.1.0", "--wait", "--actor", "ann")
    assert shown["changed"]
    assert shown["rollout"]["state"] == "warm"
    assert shown["rollout"]["actor"] == "ann"
    assert shown["rollout"]["version"] == "1.1.0"


ROLLOUT = """\
organ: heart
version: 1.1.0
reason: finer valves
steps:
  - {percent: 5, hold_s: 0}
  - mode: canary
    percent: 50
    hold_s: 0
thresholds:
  min_requests: 10
  min_successes: 0
"""


def test_a_rollout_file_is_applied_once(system: System, tmp_path: Path) -> None:
    file = tmp_path / "rollout.yaml"
    file.write_text(ROLLOUT)
    assert "it answers 5 % of the requests" in done(system, "apply", file, "--dry-run")
    assert system.store.head().count == 1
    assert "heart 1.1.0 is stable." in done(system, "apply", file, "--wait")
    moves = [(entry.action, entry.details.get("percent")) for entry in system.store.history("heart")]
    assert [move for move in moves if move[0] == "canary"] == [("canary", 5.0), ("canary", 50.0)]
    count = system.store.head().count
    again = done(system, "apply", file, "--wait")
    assert "Nothing to do." in again
    assert "this file was applied before" in again
    assert system.store.head().count == count


def test_waiting_for_a_file_that_does_not_promote_ends_at_its_last_step(system: System, tmp_path: Path) -> None:
    file = tmp_path / "rollout.yaml"
    file.write_text(ROLLOUT + "promote: false\n")
    assert "heart 1.1.0 is canary 50 %." in done(system, "apply", file, "--wait")


def test_a_candidate_that_its_thresholds_take_back_ends_the_waiting(system: System, tmp_path: Path) -> None:
    file = tmp_path / "rollout.yaml"
    file.write_text(ROLLOUT.replace("percent: 5, hold_s: 0", "percent: 5, hold_s: 600"))
    process = subprocess.Popen(
        [ECHORAY, "experts", "apply", file, "--wait", "--json", "--control", system.address],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    until(lambda: bool(system.store.rollouts("heart")))
    rollout = system.reach("canary")
    system.monitor.record(Observation("heart", rollout.digest, requests=20, errors=10))
    system.controller.wake()
    _, stderr = process.communicate(timeout=20)
    assert process.returncode == 1
    assert "heart 1.1.0 is rolled back: 10 of 20 requests failed" in stderr


@pytest.mark.parametrize(
    ("change", "line", "text"),
    [
        (("percent: 50", "percnt: 50"), 7, "steps.1.percnt is unknown; did you mean percent?"),
        (("percent: 5,", "percent: 500,"), 5, "steps.0.percent is 500; it must be less than or equal to 100"),
        (("percent: 50", "percent: 1"), 4, "the canary steps must not fall"),
        (("organ: heart", "organs: heart"), 1, "organs is unknown; did you mean organ?"),
        (("organ: heart", "organ: Heart"), 1, "organ is 'Heart'; it must be of the form ^[a-z]"),
        (("min_requests: 10", "min_requests: ten"), 10, "thresholds.min_requests is 'ten'"),
        (("version: 1.1.0\n", "version: 1.1.0\ndigest: " + "a" * 64 + "\n"), 2, "and not both"),
        (("reason: finer valves", "version: 1.1.0"), 3, "version occurs twice: keep one of them"),
        (("organ: heart", "organ: ["), 3, "is no YAML here"),
    ],
)
def test_a_wrong_rollout_file_is_refused_with_the_line(
    system: System, tmp_path: Path, change: tuple[str, str], line: int, text: str
) -> None:
    file = tmp_path / "rollout.yaml"
    file.write_text(ROLLOUT.replace(*change))
    result = invoke(system, "apply", file)
    assert result.exit_code == 2
    assert f"{file}:{line}: " in result.stderr
    assert text in result.stderr
    assert system.store.head().count == 1


def test_a_rollout_file_that_is_not_there_is_told(system: System, tmp_path: Path) -> None:
    assert "No such file" in refused(system, "apply", tmp_path / "none.yaml", code=2)


def test_a_bundle_is_sent_through_control(system: System, tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle", "lung", "0.1.0")
    (bundle / "model.sig").write_bytes(b"signed")
    text = done(system, "push", bundle)
    assert f"lung@0.1.0 is in the registry of {system.address}" in text
    assert "echoray experts stage lung 0.1.0" in text
    assert done(system, "push", bundle) == text
    found = system.registry.open(system.registry.find("lung", "0.1.0").digest)
    found.verify()
    assert found.signature == b"signed"

    # A new organ needs no more than its replicas.
    system.fleet.add_replica("lung", "lung-1")
    done(system, "stage", "lung", "0.1.0", "--wait")
    done(system, "promote", "lung", "--wait")
    assert system.store.policy().stable.organs == ("breast", "heart", "lung")


def test_what_is_no_bundle_is_not_sent(system: System, tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle", "lung", "0.1.0")
    weights = bundle / "experts.safetensors"
    content = weights.read_bytes()
    assert "--registry or --control" in refused(system, "push", bundle, "--registry", tmp_path, code=2)
    weights.write_bytes(content[:-1])
    assert "the manifest says" in refused(system, "push", bundle, code=2)
    weights.unlink()
    weights.symlink_to("/etc/passwd")
    assert "leads out of the bundle's folder" in refused(system, "push", bundle, code=2)
    weights.unlink()
    assert "is missing" in refused(system, "push", bundle, code=2)
    assert "cannot be read" in refused(system, "push", tmp_path / "none", code=2)
    (bundle / "manifest.json").write_text("[]")
    assert "is no manifest" in refused(system, "push", bundle, code=2)


def test_a_damaged_bundle_is_refused_by_control(system: System, tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle", "lung", "0.1.0")
    flip_last_byte(bundle)
    assert "experts.safetensors" in refused(system, "push", bundle, code=1)
    assert system.registry.list("lung") == []


def test_a_system_is_found_by_its_name(system: System, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv("ECHORAY_CONTROL", "127.0.0.1:1")
    bundle = tmp_path / "breast-7.0.0"
    make_bundle(bundle, "breast", "7.0.0")
    with announced("checkpoint", system.address, "127.0.0.1:1", name="team-a"):
        for arguments in (
            ["push", str(bundle)],
            ["stage", "breast", "7.0.0", "--dry-run"],
            ["list", "--organ", "breast"],
            ["history"],
        ):
            result = CliRunner().invoke(app, [*arguments, "--name", "team-a"])
            assert result.exit_code == 0, result.output
        result = CliRunner().invoke(app, ["promote", "heart", "--name", "team-b"])
    assert result.exit_code == 2
    assert "no system of yours on this machine has the name 'team-b' (team-a)" in result.stderr
