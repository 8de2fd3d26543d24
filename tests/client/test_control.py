import os
from pathlib import Path

import grpc
import pytest

from echovlm_ray.client.control import ExpertControlClient
from echovlm_ray.client.errors import (
    EchoVLMError,
    FailedPreconditionError,
    InvalidRequestError,
    NotFoundError,
    UnavailableError,
)
from protos.control_pb2 import Expected
from tests.cli.control_server import make_bundle, running_control
from tests.client.scripted_server import ScriptedEchoVLM, serving


def test_a_version_goes_all_the_way(tmp_path: Path) -> None:
    with running_control(tmp_path) as system, ExpertControlClient(system.address) as control:
        staged = control.stage("heart", version="1.1.0", actor="ann", reason="finer valves")
        assert staged.changed
        for state in control.watch():
            if state.rollouts and state.rollouts[0].state == "warm":
                break
        digest = staged.rollout.digest
        assert control.canary("heart", 5, digest=digest, actor="ann").rollout.percent == 5
        assert control.shadow("heart", 7, actor="ann").rollout.state == "shadow"
        assert control.promote("heart", digest=digest, actor="ann", dry_run=True).rollout.state == "shadow"
        assert control.promote("heart", digest=digest, actor="ann").rollout.state == "stable"
        assert not control.promote("heart", digest=digest, actor="ann").changed
        assert {bundle.version: bundle.live for bundle in control.list("heart").bundles} == {
            "1.0.0": False,
            "1.1.0": True,
        }
        history = control.history("heart", verify=True)
        assert not history.faults
        assert [entry.actor for entry in history.entries if entry.event == "stage"] == ["ann"]


def test_an_operation_is_made_only_if_it_is_still_as_its_caller_saw_it(tmp_path: Path) -> None:
    with running_control(tmp_path) as system, ExpertControlClient(system.address) as control:
        rollout = control.stage("heart", version="1.1.0", actor="ann").rollout
        system.reach("warm")
        seen = Expected(rollout_id=rollout.id, state="warm", percent=0)
        assert control.canary("heart", 5, actor="ann", expected=seen).changed
        with pytest.raises(FailedPreconditionError, match=r"it is canary 5 %: .* by ann 0 s ago"):
            control.canary("heart", 50, actor="bob", expected=seen)
        # What a client of the version before sends: with nothing in flight it named the stable version.
        control.promote("heart", actor="ann")
        for digest in ("", rollout.digest):
            with pytest.raises(FailedPreconditionError, match="was promoted by ann 0 s ago"):
                control.rollback("heart", actor="bob", digest=digest)
        with pytest.raises(InvalidRequestError, match="version"):
            control.roll_back_stable("heart", actor="bob")
        restoring = control.roll_back_stable("heart", version="1.1.0", actor="bob").rollout
        assert restoring.restores
        with pytest.raises(InvalidRequestError, match="expected"):
            control.rollback("heart", actor="bob", expected="heart-2")  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="there is no option sure"):
            control.rollback("heart", actor="bob", sure=True)  # type: ignore[call-arg]


def test_refusals_have_types(tmp_path: Path) -> None:
    with running_control(tmp_path) as system, ExpertControlClient(system.address) as control:
        with pytest.raises(NotFoundError, match="breast, heart"):
            control.promote("spleen", actor="ann")
        with pytest.raises(FailedPreconditionError, match="possible: stage"):
            control.promote("heart", actor="ann")
        with pytest.raises(InvalidRequestError) as caught:
            control.canary("heart", 300, actor="ann")
        assert [violation.field for violation in caught.value.violations] == ["percent"]
        with pytest.raises(InvalidRequestError, match="actor"):
            control.stage("heart", version="1.1.0", actor="")


def test_no_server_there_and_another_server_there() -> None:
    with ExpertControlClient("127.0.0.1:1", timeout_s=2) as control, pytest.raises(UnavailableError) as lost:
        control.list()
    assert not lost.value.reached
    with (
        serving(ScriptedEchoVLM()) as address,
        ExpertControlClient(address) as control,
        pytest.raises(EchoVLMError, match="is not Control") as other,
    ):
        control.list()
    assert other.value.code == grpc.StatusCode.UNIMPLEMENTED


def test_a_large_bundle_is_sent_in_pieces_with_progress(tmp_path: Path) -> None:
    with running_control(tmp_path) as system, ExpertControlClient(system.address) as control:
        bundle = make_bundle(tmp_path / "bundle", "lung", "0.1.0")
        totals: list[int] = []
        sent: list[int] = []
        info = control.push(bundle, start=totals.append, progress=sent.append)
        assert (info.organ, info.version) == ("lung", "0.1.0")
        assert totals == [sum(sent)]
        assert not info.live


def test_a_manifest_cannot_make_the_client_send_other_files(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"12345")
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    for path in ("../secret", str(secret), "link"):
        (bundle / "manifest.json").write_text(f'{{"files": [{{"path": "{path}", "size": 5}}]}}')
        if path == "link":
            os.symlink(secret, bundle / "link")
        with ExpertControlClient("127.0.0.1:1") as control, pytest.raises(InvalidRequestError, match="leads out"):
            control.push(bundle)


def test_a_token_never_leaves_in_the_clear() -> None:
    with pytest.raises(ValueError, match="in the clear"):
        ExpertControlClient("control.example.org:50052", token="secret")
