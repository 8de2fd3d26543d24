"""Discovery, versions and the end of a local Ray, on a real Ray Serve with one real application, Control."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator

import grpc
import psutil
import pytest
import ray
from ray import serve

from echovlm_ray.checkpoint.layout import ORGANS
from echovlm_ray.config import Config
from echovlm_ray.serving.cluster import ray_internals
from echovlm_ray.serving.cluster.endpoints import Endpoints, addresses_now
from echovlm_ray.serving.cluster.ray_session import local_ray
from echovlm_ray.serving.cluster.settings import CONTROL, DEPLOYMENTS
from echovlm_ray.serving.cluster.system_id import SystemId
from echovlm_ray.serving.cluster.system_secret import delete_secrets, keep_secret, secret_of
from echovlm_ray.serving.deploy import preflight
from echovlm_ray.serving.deploy.applications import build_applications
from experts.transport.inner_channel import InnerChannels
from protos import status_pb2, status_pb2_grpc
from tests.random_checkpoint import make_random
from tests.waiting import until

# For a replica to start on a machine that does much else at the same time.
START_S = 60.0


def deploy(config: Config) -> None:
    # This makes the database, and says whose it is.
    system = SystemId("", preflight.check(config, local=False).identity)
    keep_secret(system)
    application = build_applications(config, ORGANS, "loopback", system)[CONTROL]
    serve.run_many([serve.RunTarget(application, name=CONTROL, route_prefix=None)])


def channels() -> InnerChannels:
    (key,) = [key for key in ray_internals.record_keys() if key.startswith("secret/")]
    return InnerChannels(secret_of(SystemId("", key.rpartition("/")[2])))


def describe(address: str) -> status_pb2.ReplicaDescription:
    with channels().blocking(address) as channel:
        stub = status_pb2_grpc.ReplicaStatusStub(channel)
        described: status_pb2.ReplicaDescription = stub.Describe(status_pb2.DescribeRequest(), timeout=10)
        return described


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    directory = tmp_path_factory.mktemp("endpoints") / "demo"
    make_random(directory)
    return Config.model_validate({"model": {"checkpoint": directory}, "control": {"port": 0}})


@pytest.fixture(scope="module")
def family() -> list[psutil.Process]:
    """All processes of the Ray under test, filled while it runs."""
    return []


@pytest.fixture(scope="module")
def endpoints(config: Config, family: list[psutil.Process]) -> Iterator[Endpoints]:
    before = set(psutil.Process().children(recursive=True))
    with local_ray(config):
        found = Endpoints({CONTROL: DEPLOYMENTS[CONTROL], "vision": DEPLOYMENTS["vision"]})
        # Before there is anything to find.
        found.start()
        assert found.of(CONTROL) == ()
        deploy(config)
        until(lambda: bool(found.of(CONTROL)), timeout_s=START_S)
        yield found
        family += set(psutil.Process().children(recursive=True)) - before
        found.stop()
        delete_secrets("")
    assert family
    assert not [process for process in family if process.is_running()], "a local Ray left processes behind"


def test_a_replica_is_found_at_both_of_its_addresses(endpoints: Endpoints) -> None:
    (replica,) = endpoints.replicas(CONTROL)
    assert endpoints.of(CONTROL) == endpoints.source(CONTROL)() == (replica.address,)
    assert endpoints.of("vision") == ()
    described = describe(replica.address)
    assert described.application == CONTROL
    assert described.deployment == "Control"
    assert described.endpoint == replica.public_address != replica.address
    assert psutil.pid_exists(described.pid)
    # Operators reach the public one, which says nothing about replicas.
    with pytest.raises(grpc.RpcError) as caught:
        describe(replica.public_address)
    assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED
    with grpc.insecure_channel(replica.public_address) as channel:
        stub = status_pb2_grpc.SystemStatusStub(channel)
        status = stub.GetStatus(status_pb2.GetStatusRequest(), timeout=10)
    found = {application.name: application for application in status.applications}
    assert found[CONTROL].status == "RUNNING"
    assert [replica.pid for replica in found[CONTROL].replicas] == [described.pid]
    assert found["router"].status == "NOT_STARTED"


def test_an_application_that_is_watched_later_is_found(endpoints: Endpoints) -> None:
    later = Endpoints({})
    later.start()
    later.watch({"vision": DEPLOYMENTS["vision"]})
    later.watch({CONTROL: DEPLOYMENTS[CONTROL]})
    until(lambda: later.of(CONTROL) == endpoints.of(CONTROL), timeout_s=5)
    later.watch({CONTROL: DEPLOYMENTS[CONTROL]})
    (replica,) = later.all()[CONTROL]
    assert replica.replica
    later.stop()
    assert addresses_now(CONTROL, DEPLOYMENTS[CONTROL], 5) == endpoints.of(CONTROL)
    assert addresses_now("expert-spleen", "ExpertGroup", 0.1) == ()


def test_a_local_ray_is_guarded_by_a_token(endpoints: Endpoints) -> None:
    assert os.environ["RAY_AUTH_MODE"] == "token"
    code = f"import ray; ray.init(address={ray.get_runtime_context().gcs_address!r})"
    stranger = os.environ | {"RAY_AUTH_TOKEN": "0" * 64}
    with subprocess.Popen([sys.executable, "-c", code], env=stranger, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        # Ray would go on trying for a minute; its first answer says enough.
        said = ""
        while "InvalidAuthToken" not in said and (line := process.stderr.readline()):
            said += line
        process.kill()
    assert "InvalidAuthToken" in said


def test_a_killed_replica_is_gone_soon_and_its_successor_found(endpoints: Endpoints) -> None:
    changed = threading.Event()
    endpoints.on_change(changed.set)
    (old,) = endpoints.of(CONTROL)
    pid = describe(old).pid
    os.kill(pid, signal.SIGKILL)
    until(lambda: old not in endpoints.of(CONTROL), timeout_s=5)
    assert changed.is_set()
    until(lambda: bool(endpoints.of(CONTROL)), timeout_s=START_S)
    (new,) = endpoints.of(CONTROL)
    assert describe(new).pid != pid


def test_deploying_again_leaves_the_replica_alone_unless_it_changes(endpoints: Endpoints, config: Config) -> None:
    (first,) = endpoints.of(CONTROL)
    pid = describe(first).pid
    deploy(config)
    deploy(config.model_copy(update={"router": config.router.model_copy(update={"max_queue": 7})}))
    assert describe(endpoints.of(CONTROL)[0]).pid == pid
    deploy(config.model_copy(update={"model": config.model.model_copy(update={"default_organ": "heart"})}))
    until(lambda: bool(endpoints.of(CONTROL)) and endpoints.of(CONTROL) != (first,), timeout_s=START_S)
    assert describe(endpoints.of(CONTROL)[0]).pid != pid


def test_a_removed_application_is_gone(endpoints: Endpoints) -> None:
    ray_internals.delete_applications([CONTROL])
    until(lambda: not endpoints.of(CONTROL), timeout_s=START_S)
    until(lambda: CONTROL not in serve.status().applications, timeout_s=START_S)
