"""The rollouts' database is deleted while the system runs: nothing is acknowledged that would be lost."""

import sqlite3

import grpc
import pytest
from grpc_health.v1 import health_pb2

from echovlm_ray.client import EchoVLMError
from echovlm_ray.client.control import ExpertControlClient
from tests.live_rollouts import WHO, ask, bundle_of, until
from tests.running_system import RunningSystem

ORGAN = "thyroid"
CONTROL = "echovlm.v1.ExpertControl"


def test_commands_are_refused_until_a_backup_is_there(running_system: RunningSystem) -> None:
    system = running_system
    path = system.checkpoint / "rollouts" / "rollouts.db"
    backup = path.with_name("backup.db")
    digest = bundle_of(system, ORGAN).digest
    before, identity = ask(system, ORGAN), system.status()["identity"]
    with sqlite3.connect(path) as source, sqlite3.connect(backup) as target:
        source.backup(target)
    with ExpertControlClient(system.control_address, timeout_s=10) as control:
        live = control.list().live
        path.unlink()
        for command in (control.stage, control.promote, control.rollback):
            with pytest.raises(EchoVLMError, match="was deleted while it was in use") as raised:
                command(ORGAN, digest=digest, actor=WHO)
            assert raised.value.code == grpc.StatusCode.FAILED_PRECONDITION
        until(lambda: system.health(CONTROL) == health_pb2.HealthCheckResponse.NOT_SERVING, "Control is not well")
        status = system.status()
        assert "was deleted" in " ".join(status["notices"])
        assert status["identity"] == identity
        # What is served does not depend on it.
        assert ask(system, ORGAN) == before
        assert system.health("") == health_pb2.HealthCheckResponse.SERVING

        backup.replace(path)
        until(lambda: control.list().live == live, "a Control that has opened the backup")
        until(lambda: system.health(CONTROL) == health_pb2.HealthCheckResponse.SERVING, "Control is well")
        until(lambda: not system.status()["notices"], "every Router applies what the backup says")
        assert ask(system, ORGAN) == before
