"""Who has a name on a cluster: on a real Ray's key-value store."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace

import psutil
import pytest

from echovlm_ray.config import Config
from echovlm_ray.serving.cluster.ownership import (
    OwnedByAnotherError,
    SystemRecord,
    all_records,
    check_database,
    claim,
    is_ours,
    record_of,
    release,
    release_name,
)
from echovlm_ray.serving.cluster.ray_session import local_ray
from echovlm_ray.serving.cluster.system_id import SystemId, check_name

OURS, THEIRS = "a" * 32, "b" * 32


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    with local_ray(Config()):
        yield


@pytest.fixture(autouse=True)
def no_records() -> Iterator[None]:
    yield
    for name in all_records():
        release_name(name)


def record(name: str = "", identity: str = OURS, *, attached: bool = True, port: int = 0) -> SystemRecord:
    config = Config.model_validate({"gateway": {"port": port}, "control": {"port": 0}})
    return SystemRecord.of_this_process(SystemId(name, identity), config, attached=attached)


def ended(found: SystemRecord) -> SystemRecord:
    """The same, started by a process that is not there any more."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        created = psutil.Process(process.pid).create_time()
        process.communicate(b"\n")
    return replace(found, pid=process.pid, created=created)


def test_a_name_belongs_to_one_run() -> None:
    first, second = record(), record()
    assert claim(first, deployed=False, take_over=False) is None
    assert record_of("") == first
    for deployed in (False, True):
        with pytest.raises(OwnedByAnotherError, match=rf"process {os.getpid()} on {socket.gethostname()}, started 20"):
            claim(second, deployed=deployed, take_over=False)
    assert is_ours(first)
    assert not is_ours(second)


def test_what_was_taken_over_is_left_alone_by_who_had_it() -> None:
    first, second = record(identity=THEIRS), record()
    claim(first, deployed=False, take_over=False)
    assert claim(second, deployed=True, take_over=True) == first
    release(first)
    assert record_of("") == second
    release(second)
    assert record_of("") is None


def test_systems_run_side_by_side_by_name_but_not_on_one_port() -> None:
    claim(record("", port=50051), deployed=False, take_over=False)
    with pytest.raises(OwnedByAnotherError, match=r"port 50051 .*the system without a name.*gateway\.port"):
        claim(record("team-a", THEIRS, port=50051), deployed=False, take_over=False)
    claim(record("team-a", THEIRS, port=50061), deployed=False, take_over=False)
    assert set(all_records()) == {"", "team-a"}


def test_one_database_is_not_served_by_two_names() -> None:
    claim(record("team-a"), deployed=False, take_over=False)
    with pytest.raises(OwnedByAnotherError, match=r"system 'team-a' .*rollouts\.database .*--name team-a"):
        check_database(record("team-b"), lambda other: False)
    check_database(record("team-b", THEIRS), lambda other: True)
    check_database(record("team-a"), lambda other: True)
    # Its process was killed: what counts is whether its applications are still there.
    release_name("team-a")
    claim(ended(record("team-a")), deployed=False, take_over=False)
    check_database(record("team-b"), lambda other: False)
    with pytest.raises(OwnedByAnotherError, match="team-a"):
        check_database(record("team-b"), lambda other: other.name == "team-a")


def test_what_was_left_running_is_updated_by_the_same_deployment_only() -> None:
    claim(record(attached=False), deployed=False, take_over=False)
    assert claim(record(attached=False), deployed=True, take_over=False) is None
    with pytest.raises(OwnedByAnotherError, match=r"another deployment, aaaa.*--take-over"):
        claim(record(identity=THEIRS), deployed=True, take_over=False)


def test_what_a_killed_process_left_behind_is_found_again() -> None:
    left = ended(record())
    claim(left, deployed=False, take_over=False)
    with pytest.raises(OwnedByAnotherError, match="another deployment"):
        claim(record(identity=THEIRS), deployed=True, take_over=False)
    again = record()
    assert claim(again, deployed=True, take_over=False) is None
    assert is_ours(again)


def test_of_another_machines_process_nothing_is_known() -> None:
    claim(replace(ended(record()), host="elsewhere"), deployed=False, take_over=False)
    with pytest.raises(OwnedByAnotherError, match="on elsewhere"):
        claim(record(), deployed=True, take_over=False)


def test_applications_that_nothing_is_known_of_are_not_replaced_by_mistake() -> None:
    with pytest.raises(OwnedByAnotherError, match="nothing says who started it"):
        claim(record(), deployed=True, take_over=False)
    assert claim(record(), deployed=True, take_over=True) is not None


def test_a_name_is_the_first_part_of_an_applications() -> None:
    default, named = SystemId(), SystemId("team-a")
    assert [default.application("gateway"), named.application("expert-heart")] == ["gateway", "team-a.expert-heart"]
    assert [named.part("team-a.expert-heart"), default.part("gateway")] == ["expert-heart", "gateway"]
    for system, other in ((default, "team-a.gateway"), (named, "gateway"), (named, "team-b.gateway")):
        assert system.part(other) is None
    assert check_name("team-a") == "team-a"
    for name in ("Team", "team.a", "a/b", "-", "a" * 41):
        with pytest.raises(ValueError, match="lower-case"):
            check_name(name)
