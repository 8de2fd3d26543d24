"""P15 on the running system: without the registry what was served stays served, and what cannot be is said."""

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2

from echovlm_ray.checkpoint.layout import read_index, registry_root
from echovlm_ray.client.errors import FailedPreconditionError
from echovlm_ray.config import RolloutsSection
from echovlm_ray.serving.cluster.rollout_files import RolloutFiles
from echovlm_ray.serving.grpc.health import organ_service
from experts.registry.registry import Registry
from router.rollouts.database import Database
from router.rollouts.store import RolloutStore
from tests.changed_bundles import changed_bundle
from tests.live_rollouts import ask, kill, until
from tests.random_checkpoint import make_random
from tests.running_system import ECHORAY, RunningSystem, running

ORGAN, VERSION = "kidney", "2.1.0"
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


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
    """One of its own, because it is taken apart; a later version of one organ was promoted in an earlier life of it."""
    directory = tmp_path_factory.mktemp("registry-away") / "random"
    make_random(directory)
    registry = Registry(registry_root(directory))
    own = read_index(directory)
    changed_bundle(directory / "next", registry.open(own.entry(ORGAN).bundle_digest), VERSION)
    promoted = registry.push(directory / "next").digest
    members = tuple(
        member.model_copy(update={"bundle_digest": promoted}) if member.organ == ORGAN else member
        for member in own.expert_set().members
    )
    database = Database(RolloutFiles.of(RolloutsSection(), directory).database)
    RolloutStore(database).adopt(own.expert_set().model_copy(update={"members": members}), actor="the tests")
    database.close()
    return directory


def replaced(system: RunningSystem, application: str) -> None:
    (old,) = kill(system, application)
    until(lambda: [each for each in system.replicas(application) if each["pid"] not in (0, old)], "a successor", 0.5)


def test_what_is_stable_survives_its_replicas_without_the_registry_and_without_its_copy_it_is_told(
    checkpoint: Path, tmp_path: Path
) -> None:
    registry = registry_root(checkpoint)
    with running(checkpoint, tmp_path) as system:
        expected = ask(system, ORGAN)
        assert expected[1] == VERSION
        with away(registry):
            replaced(system, f"expert-{ORGAN}")
            kill(system, "router")
            assert until(lambda: ask(system, ORGAN), "an answer through the next ones") == expected
            # Without its copy nothing is left of it; the other organs go on.
            (share,) = system.replicas(f"expert-{ORGAN}")[0]["bundles"]
            copy = checkpoint / "rollouts" / "rollouts.db.bundles" / share["digest"]
            copy.rename(tmp_path / "copy")
            replaced(system, f"expert-{ORGAN}")
            check_unanswered(system, share["digest"])
        # Control tries again by itself.
        until(lambda: ask(system, ORGAN) == expected, "an answer with the registry back")
        system.wait_until_healthy(organ_service(ORGAN), 60)
        assert not system.status()["problems"]


def test_a_system_starts_without_its_registry(checkpoint: Path, tmp_path: Path) -> None:
    """After the test before, in which copies were made."""
    with away(registry_root(checkpoint)), running(checkpoint, tmp_path) as system:
        until(lambda: f"{ORGAN} {VERSION}" in system.log.read_text(), "the version in the log")
        assert ask(system, ORGAN)[1] == VERSION
        assert ask(system, "breast")[1] == "1.0.0"


def check_unanswered(system: RunningSystem, digest: str) -> None:
    reason = "the registry does not have the bundle"

    with pytest.raises(FailedPreconditionError) as caught:
        ask(system, ORGAN)
    error = caught.value
    assert error.code == grpc.StatusCode.FAILED_PRECONDITION
    assert all(text in str(error) for text in (ORGAN, VERSION, reason))
    until(lambda: system.health(organ_service(ORGAN)) == NOT_SERVING, "NOT_SERVING")
    assert system.health(organ_service("breast")) == SERVING
    assert system.health("") == SERVING
    assert ask(system, "breast")[0] == "breast"

    def problem() -> dict[str, object] | None:
        found = [each for each in system.status()["problems"] if "no bundle" in str(each["reasons"])]
        return found[0] if found else None

    found = until(problem, "the reason in status")
    assert (found["organ"], found["version"], found["digest"], found["answers"]) == (ORGAN, VERSION, digest, False)
    status = subprocess.run([ECHORAY, "status", "--control", system.control_address], capture_output=True, text=True)
    assert status.returncode == 1
    assert "NOT SERVING" in status.stdout
    assert f"{ORGAN} cannot be answered: no replica holds {VERSION}" in " ".join(status.stdout.split())
    listing = subprocess.run(
        [ECHORAY, "experts", "list", "--json", "--control", system.control_address], capture_output=True, text=True
    )
    assert [each["organ"] for each in json.loads(listing.stdout)["problems"]] == [ORGAN]
