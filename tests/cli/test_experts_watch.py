import json
import os
import pty
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from rich.console import Console

from echovlm_ray.cli.rollout_changes import changes
from echovlm_ray.cli.rollout_format import state_as_dict
from echovlm_ray.cli.rollout_tables import state_view
from echovlm_ray.cli.rollout_wait import has_taken_over
from echovlm_ray.config import TLSSection
from echovlm_ray.serving.grpc.server import ServerOptions
from protos import control_pb2
from router.rollouts.shadow import ShadowRecord
from tests.certificates import write_certificates
from tests.cli.calls import done, done_json, invoke, refused
from tests.cli.control_server import System, running_control

ECHORAY = Path(sys.executable).with_name("echoray")


@contextmanager
def watching(system: System, *arguments: str) -> Iterator["subprocess.Popen[str]"]:
    process = subprocess.Popen(
        [ECHORAY, "experts", *arguments, "--control", system.address],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def read_until(process: "subprocess.Popen[str]", text: str) -> list[str]:
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if text in line:
            return lines
    raise AssertionError(f"{text!r} never came: {lines}")


@pytest.mark.parametrize("command", [("watch",), ("list", "--watch")])
def test_watch_tells_every_change_in_a_line_and_ends_with_ctrl_c(system: System, command: tuple[str, ...]) -> None:
    with watching(system, *command) as process:
        lines = read_until(process, "heart: 1.0.0")
        assert "breast: 1.0.0" in lines[0]
        done(system, "stage", "heart", "1.1.0", "--wait")
        lines = read_until(process, "is warm")
        assert "heart: 1.1.0 (heart-2) is warm" in lines[-1]
        done(system, "promote", "heart")
        read_until(process, "heart: replica heart-1 has unloaded 1.0.0")
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 0
        assert process.stderr is not None
        assert process.stderr.read() == ""


def test_watch_of_one_organ_says_nothing_of_others(system: System) -> None:
    with watching(system, "watch", "breast") as process:
        read_until(process, "breast: 1.0.0")
        done(system, "stage", "heart", "1.1.0", "--wait")
        system.add("breast", "2.0.0")
        done(system, "stage", "breast", "2.0.0")
        lines = read_until(process, "breast: 2.0.0")
        assert not any("heart" in line for line in lines)
    assert "there are breast, heart" in refused(system, "watch", "spleen", code=2)


def test_watch_in_json_is_one_object_a_line(system: System) -> None:
    with watching(system, "watch", "heart", "--json") as process:
        assert process.stdout is not None
        first = json.loads(process.stdout.readline())
        assert [replica["replica"] for replica in first["replicas"]] == ["heart-1", "heart-2"]
        assert first["replicas"][0]["bundles"][0]["version"] == "1.0.0"
        done(system, "stage", "heart", "1.1.0")
        later = json.loads(process.stdout.readline())
        assert later["version"] > first["version"]
        assert later["rollouts"][0]["version"] == "1.1.0"


def test_watch_on_a_terminal_is_a_table_that_is_drawn_again(system: System) -> None:
    system.fleet.proceed.clear()
    mine, theirs = pty.openpty()
    process = subprocess.Popen(
        [ECHORAY, "experts", "watch", "--control", system.address],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, "COLUMNS": "160", "LINES": "50", "TERM": "xterm"},
    )
    os.close(theirs)
    try:
        done(system, "stage", "heart", "1.1.0", "--reason", "finer valves")
        screen = b""
        deadline = time.monotonic() + 10
        while b"40%" not in screen:
            assert time.monotonic() < deadline, screen
            screen += os.read(mine, 65536)
        assert "━".encode() in screen
        assert b"verified" in screen
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 0
    finally:
        process.kill()
        process.wait()
        os.close(mine)


def test_watching_goes_on_when_control_was_restarted(tmp_path: Path) -> None:
    (tmp_path / "first").mkdir()
    (tmp_path / "second").mkdir()
    with running_control(tmp_path / "first") as system:
        port = int(system.address.rpartition(":")[2])
        process = subprocess.Popen(
            [ECHORAY, "experts", "watch", "--control", system.address],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
        read_until(process, "heart: 1.0.0")
    try:
        assert process.stderr is not None
        assert "trying again" in process.stderr.readline()
        with running_control(tmp_path / "second", ServerOptions(port=port)) as system:
            system.add("heart", "3.0.0")
            done(system, "stage", "heart", "3.0.0")
            read_until(process, "heart: 3.0.0")
    finally:
        process.kill()
        process.wait()


def test_watching_nothing_ends_at_once() -> None:
    called = subprocess.run(
        [ECHORAY, "experts", "watch", "--control", "127.0.0.1:1"], capture_output=True, text=True, timeout=30
    )
    assert called.returncode == 3
    assert "nothing answers at 127.0.0.1:1" in called.stderr


def test_list_shows_what_is_live_and_on_its_way_and_what_replicas_hold(system: System) -> None:
    done(system, "stage", "heart", "1.1.0", "--wait", "--actor", "ann")
    done(system, "shadow", "heart", "--percent", 20)
    system.store.record_shadow(system.rollout().id, [ShadowRecord(10, 9, 4, 1.5), ShadowRecord(10, 10, None, 1.5)])
    lines = invoke(system, "list").stdout.splitlines()
    (heart,) = [line for line in lines if line.startswith("heart") and "shadow" in line]
    assert all(text in heart for text in ("1.0.0", "1.1.0", "shadow 20 %", "ann"))
    (shadow,) = [line for line in lines if line.startswith("shadow of heart")]
    assert "2 compared, 1 identical, token overlap 0.95" in shadow
    assert "time per token x 1.5" in shadow
    assert any("heart-1" in line and "of 100 kB" in line for line in lines)
    assert any("heart-experts" in line and "live" in line for line in lines)

    shown = done_json(system, "list", "--organ", "heart")
    assert [bundle["version"] for bundle in shown["bundles"]] == ["1.0.0", "1.1.0"]
    assert [bundle["live"] for bundle in shown["bundles"]] == [True, False]
    assert shown["rollouts"][0]["shadow"]["latency_ratio"] == pytest.approx(1.5)
    assert {entry["organ"]: entry["version"] for entry in shown["live"]} == {"heart": "1.0.0"}
    assert "there are breast, heart" in refused(system, "list", "--organ", "spleen", code=2)


def test_list_of_a_failed_rollout_says_why(system: System) -> None:
    system.add("heart", "1.2.0", damaged=True)
    done(system, "stage", "heart", "1.2.0")
    system.reach("failed")
    assert "failed" in done(system, "list")
    assert "verification failed: " in done(system, "list")


def test_list_of_a_registry_needs_no_system(system: System, tmp_path: Path) -> None:
    assert "There are no bundles." in done(system, "list", "--registry", tmp_path / "empty")
    assert "leave --registry out" in refused(system, "list", "--registry", tmp_path, "--watch", code=2)


def test_history_shows_who_did_what_and_finds_tampering(system: System, tmp_path: Path) -> None:
    done(system, "stage", "heart", "1.1.0", "--reason", "finer valves", "--actor", "ann", "--wait")
    done(system, "canary", "heart", "--percent", 5, "--actor", "bob")
    text = done(system, "history", "heart")
    assert "ann" in text
    assert "finer valves" in text
    assert "warm → canary" in text
    assert "percent 5" in text
    assert "adopt" not in text
    assert "adopt" in done(system, "history")
    assert len(done_json(system, "history", "--last", 2)["entries"]) == 2

    head = system.store.head().hash
    assert "The history is intact : 5 entries." in done(system, "history", "--verify").replace("intact:", "intact :")
    done(system, "history", "--head", head)
    result = invoke(system, "history", "--head", "0" * 64)
    assert result.exit_code == 1

    with sqlite3.connect(tmp_path / "rollouts.db") as database:
        database.execute("UPDATE history SET actor = 'eve' WHERE actor = 'bob'")
    result = invoke(system, "history", "--verify")
    assert result.exit_code == 1
    assert "TAMPERED WITH: entry 5" in result.stdout
    shown = invoke(system, "history", "--verify", "--json")
    assert shown.exit_code == 1
    assert "entry 5" in json.loads(shown.stdout)["faults"][0]
    assert invoke(system, "history").exit_code == 0


def test_a_token_and_tls_are_spoken(tmp_path: Path) -> None:
    write_certificates(tmp_path)
    tokens = tmp_path / "tokens"
    tokens.touch(0o600)
    tokens.write_text("secret\n")
    tls = TLSSection(certificate=tmp_path / "server.pem", key=tmp_path / "server.key")
    with running_control(tmp_path, ServerOptions(tls=tls, token_file=tokens)) as system:
        known = ("--ca", tmp_path / "ca.pem", "--token-file", tokens)
        done(system, "stage", "heart", "1.1.0", "--wait", *known)
        assert "--token-file" in refused(system, "list", "--ca", tmp_path / "ca.pem", code=5)
        assert "nothing answers" in refused(system, "list", "--token-file", tokens, "--timeout", "2", code=3)
        assert "No such file" in refused(system, "list", "--token-file", tmp_path / "none", code=2)


def test_reasons_cannot_steer_the_table() -> None:
    rollout = control_pb2.Rollout(id="heart-2", organ="heart", state="failed", reason="[red]not markup[/red]")
    live = control_pb2.ExpertSet(id="a" * 64, backbone_digest="b" * 64, routing="organs")
    console = Console(width=160)
    with console.capture() as captured:
        console.print(state_view(live, [rollout], [], {}))
    assert "[red]not markup[/red]" in captured.get()


def test_nothing_is_told_twice() -> None:
    def state(progress: float) -> control_pb2.ControlState:
        share = control_pb2.ResidentShare(digest="d" * 64, resident_bytes=10, progress=progress)
        replica = control_pb2.ReplicaResidents(organ="heart", replica="r", bundles=[share])
        return control_pb2.ControlState(replicas=[replica])

    lines = [list(changes(state(before), state(after), {})) for before, after in ((0.1, 0.11), (0.1, 0.31), (0.9, 1))]
    assert lines == [[], ["heart: replica r loads dddddddddddd…: 31%"], ["heart: replica r holds dddddddddddd…, 10 B"]]
    assert list(changes(state(1), state(1), {})) == []


def test_what_a_rollout_waits_for_is_told_once_and_shown_always() -> None:
    def state(waits_for: str) -> control_pb2.ControlState:
        rollout = control_pb2.Rollout(
            id="heart-2", organ="heart", version="1.1.0", state="canary", percent=5, waits_for=waits_for
        )
        return control_pb2.ControlState(rollouts=[rollout])

    twelve, eleven = "12 more successful requests of 20", "11 more successful requests of 20"
    assert list(changes(state(""), state(twelve), {})) == [f"heart: 1.1.0 (heart-2) is canary 5 %; waits for {twelve}"]
    assert list(changes(state(twelve), state(eleven), {})) == []
    console = Console(width=160)
    with console.capture() as captured:
        console.print(state_view(control_pb2.ExpertSet(), state(eleven).rollouts, [], {}))
    assert f"heart 1.1.0 waits for {eleven}" in captured.get()
    assert state_as_dict(control_pb2.ExpertSet(), state(eleven).rollouts, [], {})["rollouts"][0]["waits_for"] == eleven


def test_a_promotion_is_done_when_no_request_uses_the_version_before() -> None:
    def state(*shares: control_pb2.ResidentShare) -> control_pb2.ControlState:
        replica = control_pb2.ReplicaResidents(organ="heart", replica="r", bundles=shares)
        return control_pb2.ControlState(replicas=[replica])

    rollout = control_pb2.Rollout(organ="heart", state="stable", digest="n", incumbent_digest="o")
    new, used = (control_pb2.ResidentShare(digest=digest, progress=1) for digest in "no")
    kept = control_pb2.ResidentShare(digest="o", progress=1, spare=True)
    assert not has_taken_over(rollout, state(new, used))
    assert has_taken_over(rollout, state(new, kept))
    assert has_taken_over(rollout, state(new))
    console = Console(width=160)
    with console.capture() as captured:
        console.print(state_view(control_pb2.ExpertSet(), [], state(new, kept).replicas, {}))
    assert captured.get().count("kept to go back to") == 1
