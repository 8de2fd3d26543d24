"""P15 on the running system: without the registry what was served stays served, and what cannot be is said."""

import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2

from echovlm_ray.checkpoint.layout import registry_root
from echovlm_ray.client.control import ExpertControlClient
from echovlm_ray.client.errors import FailedPreconditionError
from echovlm_ray.serving.health import organ_service
from tests.changed_bundles import changed_bundle
from tests.live_rollouts import WHO, ask, bundle_of, in_state, kill, until
from tests.random_checkpoint import make_random
from tests.running_system import ECHORAY, RunningSystem, running

ORGAN, VERSION = "kidney", "2.1.0"
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
# Long before the request's own 90 s.
AT_ONCE_S = 20.0


@contextmanager
def away(folder: Path) -> Iterator[None]:
    hidden = folder.with_name(f"{folder.name}.hidden")
    folder.rename(hidden)
    try:
        yield
    finally:
        hidden.rename(folder)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of its own: what it came with is taken away."""
    directory = tmp_path_factory.mktemp("registry-away") / "random"
    make_random(directory)
    return directory


def promote(system: RunningSystem, folder: Path) -> str:
    digest = changed_bundle(folder, bundle_of(system, ORGAN), VERSION).digest
    with ExpertControlClient(system.control_address, timeout_s=10) as control:
        control.push(folder)
        control.stage(ORGAN, digest=digest, actor=WHO)
        in_state(control, ORGAN, "warm")
        control.promote(ORGAN, digest=digest, actor=WHO)
        until(lambda: ask(system, ORGAN)[1] == VERSION, "answers of the promoted version")
    return digest


def test_what_is_stable_is_served_through_restarts_without_the_registry(checkpoint: Path, tmp_path: Path) -> None:
    registry = registry_root(checkpoint)
    with running(checkpoint, tmp_path) as system:
        promote(system, tmp_path / "next")
        expected = ask(system, ORGAN)
        with away(registry):
            (old,) = kill(system, f"expert-{ORGAN}")
            until(lambda: [each for each in system.replicas(f"expert-{ORGAN}") if each["pid"] not in (0, old)], "back")
            assert until(lambda: ask(system, ORGAN), "an answer") == expected
            kill(system, "router")
            assert until(lambda: ask(system, ORGAN), "an answer through the next router") == expected
    with away(registry), running(checkpoint, tmp_path) as system:
        assert f"{ORGAN} {VERSION}" in system.log.read_text()
        assert ask(system, ORGAN) == expected
        # Without its copy too nothing is left to serve; the other organs go on.
        digest = next(each["digest"] for each in system.replicas(f"expert-{ORGAN}")[0]["bundles"])
        shutil.rmtree(checkpoint / "rollouts" / "rollouts.db.bundles" / digest)
        kill(system, f"expert-{ORGAN}")
        until(lambda: system.health(organ_service(ORGAN)) == NOT_SERVING, "NOT_SERVING")
        check_unanswered(system, digest)
    with running(checkpoint, tmp_path) as system:
        assert ask(system, ORGAN) == expected


def check_unanswered(system: RunningSystem, digest: str) -> None:
    reason = "the registry does not have the bundle"

    def refused() -> FailedPreconditionError | None:
        started = time.monotonic()
        with pytest.raises(FailedPreconditionError) as caught:
            ask(system, ORGAN)
        assert time.monotonic() - started < AT_ONCE_S
        return caught.value

    # While the replica starts, requests wait for it.
    error = until(refused, "a typed error")
    assert error.code == grpc.StatusCode.FAILED_PRECONDITION
    assert all(text in str(error) for text in (ORGAN, VERSION, reason))
    assert system.health(organ_service("breast")) == SERVING
    assert system.health("") == SERVING
    assert ask(system, "breast")[0] == "breast"

    def problem() -> dict[str, object] | None:
        found = [each for each in system.status()["problems"] if "no bundle" in str(each["reasons"])]
        return found[0] if found else None

    told = until(problem, "the reason in status")
    assert (told["organ"], told["version"], told["digest"], told["answers"]) == (ORGAN, VERSION, digest, False)
    status = subprocess.run([ECHORAY, "status", "--control", system.control_address], capture_output=True, text=True)
    assert status.returncode == 1
    assert "NOT SERVING" in status.stdout
    assert f"{ORGAN} cannot be answered: no replica holds {VERSION}" in " ".join(status.stdout.split())
    listing = subprocess.run(
        [ECHORAY, "experts", "list", "--json", "--control", system.control_address], capture_output=True, text=True
    )
    assert [each["organ"] for each in json.loads(listing.stdout)["problems"]] == [ORGAN]
