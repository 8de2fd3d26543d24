"""`Replay` of Control over a real store, controller and registry, and the command that uses it."""

import json
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import grpc
import pytest
import typer
from typer.testing import CliRunner, Result

from echovlm_ray.cli.experts import app as experts_app
from echovlm_ray.cli.generate import generate
from echovlm_ray.client.control import ExpertControlClient
from echovlm_ray.client.errors import (
    DeadlineExceededError,
    EchoVLMError,
    FailedPreconditionError,
    InvalidRequestError,
    NotFoundError,
    OverloadedError,
)
from echovlm_ray.serving.control.replay_check import ReplayCheck
from experts.bundles.signing import SignaturePolicy
from experts.errors import InvalidBundleError
from protos import echovlm_pb2
from router.errors import ReplayRefusedError
from tests.cli.control_server import System, running_control
from tests.client.scripted_server import ScriptedEchoVLM, serving
from tests.router.rollouts.support import QUICK
from tests.waiting import until


@pytest.fixture
def control(system: System) -> Iterator[ExpertControlClient]:
    with ExpertControlClient(system.address) as client:
        yield client


def promoted(system: System, control: ExpertControlClient, *versions: str) -> list[str]:
    """The ids of the sets before each promotion of the heart, and of the last one."""
    sets = [system.store.policy().stable.id]
    for version in versions:
        if ("heart", version) not in system.digests:
            system.add("heart", version)
        control.stage("heart", version=version, actor="ann")
        system.reach("warm")
        control.promote("heart", actor="ann")
        sets.append(system.store.policy().stable.id)
    holds(system, versions[-1])
    return sets


def holds(system: System, *versions: str) -> None:
    wanted = {system.digests["heart", version] for version in versions}
    until(lambda: all(found == wanted for found in system.fleet.held("heart").values()))


def refused(control: ExpertControlClient, kind: type[EchoVLMError], expert_set_id: str, **options: object) -> str:
    with control.replay(expert_set_id, **options) as held, pytest.raises(kind) as caught:  # type: ignore[arg-type]
        held.wait()
    return str(caught.value)


def test_a_past_set_is_held_until_its_caller_lets_go(system: System, control: ExpertControlClient) -> None:
    first, second, live = promoted(system, control, "1.1.0", "1.2.0")
    policy = system.store.policy()
    with control.replay(first, organs=["heart"]) as held:
        held.wait()
        holds(system, "1.0.0", "1.2.0")
        assert system.leases.ready_set(first) is not None
        assert system.leases.ready_set(second) is None
        with control.replay(second, organs=["heart"]) as other:
            other.wait()
            holds(system, "1.0.0", "1.1.0", "1.2.0")
        holds(system, "1.0.0", "1.2.0")
    holds(system, "1.2.0")
    assert system.leases.ready_set(first) is None
    assert system.store.policy() == policy
    assert system.store.policy().stable.id == live


def test_the_live_set_needs_no_load(system: System, control: ExpertControlClient) -> None:
    loads = len(system.fleet.loads)
    with control.replay(system.store.policy().stable.id) as held:
        held.wait()
    assert len(system.fleet.loads) == loads


def test_a_caller_that_goes_away_while_it_loads_leaves_nothing(system: System, control: ExpertControlClient) -> None:
    first, _ = promoted(system, control, "1.1.0")
    system.fleet.proceed.clear()
    with ExpertControlClient(system.address) as gone:
        held = gone.replay(first, organs=["heart"])
        next(held)
        until(lambda: len(system.fleet.loading) == 2)
    until(lambda: not system.leases.digests("heart"))
    system.fleet.proceed.set()
    until(lambda: not system.fleet.loading)
    holds(system, "1.1.0")


def test_an_id_that_names_no_set_of_this_deployment(system: System, control: ExpertControlClient) -> None:
    for malformed in ("", "x", "F" * 64, "f" * 65, "../" * 21 + "f", "\u2028" * 64):
        assert "expert_set_id" in refused(control, InvalidRequestError, malformed)
    assert "never served" in refused(control, NotFoundError, "f" * 64)
    live = system.store.policy().stable.id
    assert "backbone" in refused(control, FailedPreconditionError, live, backbone_digest="c" * 64)
    assert "breast, heart" in refused(control, InvalidRequestError, live, organs=["spleen"])
    holds(system, "1.0.0")


def test_a_bundle_that_is_gone_is_named(system: System, control: ExpertControlClient) -> None:
    first, _ = promoted(system, control, "1.1.0")
    digest = system.digests["heart", "1.0.0"]
    manifest = next((system.directory / "registry").rglob("heart/1.0.0*"))
    moved = manifest.rename(system.directory / "moved")
    text = refused(control, FailedPreconditionError, first, organs=["heart"], versions={digest: "1.0.0"})
    assert "heart 1.0.0" in text
    assert "not in the registry" in text
    # Also where only its gates are needed.
    assert "heart" in refused(control, FailedPreconditionError, first, organs=["breast"])
    moved.rename(manifest)
    with control.replay(first, organs=["heart"]) as held:
        held.wait()


def test_a_damaged_bundle_is_named(system: System, control: ExpertControlClient) -> None:
    first, _ = promoted(system, control, "1.1.0")
    weights = system.registry.open(system.digests["heart", "1.0.0"]).locations["experts.safetensors"]
    weights.chmod(0o600)
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    text = refused(control, FailedPreconditionError, first, organs=["heart"])
    assert "heart 1.0.0" in text
    assert "SHA-256" in text
    holds(system, "1.1.0")


def test_a_signature_that_does_not_hold_any_more_is_named(system: System) -> None:
    admit = SignaturePolicy(signatures="required").admit
    check = ReplayCheck(system.registry, admit, lambda digest: "1.0.0")
    live = system.store.policy().stable
    with pytest.raises(ReplayRefusedError, match=r"breast 1\.0\.0 .*signatures are required"):
        check.check(live, ["breast"], serving=[], versions={})
    check.check(live, ["breast"], serving=[member.bundle_digest for member in live.members], versions={})


def test_a_load_that_fails_leaves_nothing(
    system: System, control: ExpertControlClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, _ = promoted(system, control, "1.1.0")

    def load(replica: str, organ: str, digest: str, timeout_s: float) -> None:
        raise InvalidBundleError("its signature is not accepted")

    monkeypatch.setattr(system.fleet, "load", load)
    text = refused(control, FailedPreconditionError, first, organs=["heart"])
    assert "signature is not accepted" in text
    assert not system.leases.digests("heart")
    holds(system, "1.1.0")


def size_of(system: System, version: str) -> int:
    return system.fleet.load_bytes("heart", system.digests["heart", version])


def test_two_replays_at_the_memory_limit_take_turns(system: System, control: ExpertControlClient) -> None:
    first, second, _ = promoted(system, control, "1.1.0", "1.2.0")
    system.fleet.limit_bytes = 2 * size_of(system, "1.2.0") + 100
    with control.replay(first, organs=["heart"]) as held:
        held.wait()
        waiting = control.replay(second, organs=["heart"])
        next(waiting)
        time.sleep(0.5)
        assert system.leases.ready_set(second) is None
        # Live bundles are never unloaded for it.
        holds(system, "1.0.0", "1.2.0")
    with waiting:
        waiting.wait()
        holds(system, "1.1.0", "1.2.0")
    holds(system, "1.2.0")


def test_without_any_room_the_limit_is_named(system: System, control: ExpertControlClient) -> None:
    first, _ = promoted(system, control, "1.1.0")
    system.fleet.limit_bytes = size_of(system, "1.1.0") + 100
    text = refused(control, OverloadedError, first, organs=["heart"])
    assert "experts.max_resident_bytes" in text
    assert str(system.fleet.limit_bytes) in text
    holds(system, "1.1.0")


def test_replays_are_bounded_in_number_and_time(tmp_path: Path) -> None:
    settings = QUICK.model_copy(update={"max_replays": 1, "max_replay_s": 1.5})
    with running_control(tmp_path, replay_settings=settings) as system, ExpertControlClient(system.address) as control:
        first, _ = promoted(system, control, "1.1.0")
        with control.replay(first, organs=["heart"]) as held:
            held.wait()
            assert "rollouts.max_replays" in refused(control, OverloadedError, first)
            with pytest.raises(DeadlineExceededError, match=r"rollouts\.max_replay_s"):
                next(held)
        holds(system, "1.1.0")
        assert not system.leases.digests("heart")


class Repeating(ScriptedEchoVLM):
    """Answers with these tokens."""

    token_ids = (5, 6, 7)
    expert_set_id = ""

    async def GenerateStream(
        self, request: echovlm_pb2.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[echovlm_pb2.GenerateEvent]:
        async for event in super().GenerateStream(request, context):
            if event.HasField("summary"):
                event.summary.token_ids.extend(self.token_ids)
                event.summary.prompt_digest = "a" * 64
                event.summary.provenance.expert_set_id = self.expert_set_id
                del event.summary.provenance.organs[1:]
            yield event


def replayed(path: Path, server: str, system: System, *more: str) -> Result:
    return CliRunner().invoke(
        experts_app, ["replay", str(path), "--server", server, "--control", system.address, *more]
    )


def test_the_command_says_equal_or_where_it_differs(
    system: System, control: ExpertControlClient, tmp_path: Path
) -> None:
    servicer = Repeating()
    servicer.expert_set_id = system.store.policy().stable.id
    path = tmp_path / "request.json"
    with serving(servicer) as server:
        ask = typer.Typer()
        ask.command()(generate)
        arguments = ["--task", "free", "--prompt", "What?", "--temperature", "1", "--server", server]
        result = CliRunner().invoke(ask, [*arguments, "--save-request", str(path)])
        assert result.exit_code == 0, result.output
        assert servicer.requests[-1].for_replay
        assert servicer.requests[-1].sampling.HasField("seed")
        again = CliRunner().invoke(ask, [*arguments, "--save-request", str(path)])
        assert again.exit_code == 2
        assert "not replaced" in again.stderr
        promoted(system, control, "1.1.0")

        result = replayed(path, server, system)
        assert result.exit_code == 0, result.output
        assert "equal: all 3 tokens" in result.stdout
        sent, first = servicer.requests[-1], servicer.requests[0]
        assert sent.expert_set_id == servicer.expert_set_id
        assert sent.prompt_digest == "a" * 64
        assert sent.sampling == first.sampling

        servicer.token_ids = (5, 9, 7)
        result = replayed(path, server, system, "--json")
        assert result.exit_code == 6
        found = json.loads(result.stdout)
        assert (found["equal"], found["first_difference"]) == (False, 1)
        assert (found["expected_token"], found["found_token"]) == (6, 9)
        assert "place 2 of 3 had token 6 and has token 9 now" in replayed(path, server, system).stdout

        content = json.loads(path.read_text())
        content["answer"]["expert_set_id"] = "f" * 64
        path.write_text(json.dumps(content))
        result = replayed(path, server, system)
        assert result.exit_code == 2
        assert "never served" in result.stderr
        path.write_text("")
        assert replayed(path, server, system).exit_code == 2
    holds(system, "1.1.0")
