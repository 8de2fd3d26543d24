from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest

from echovlm_ray.checkpoint.demo import make_demo
from echovlm_ray.checkpoint.layout import read_index, registry_root
from echovlm_ray.serving.control import (
    CONTROL_SERVICE,
    STATUS_SERVICE,
    ApplicationState,
    ExpertControlService,
    LiveExpertSet,
    SystemStatusService,
)
from echovlm_ray.serving.replica_status import SERVICE_NAME, ReplicaIdentity, ReplicaStatusService
from echovlm_ray.serving.server import GrpcServer, ServerOptions
from experts.registry import Registry
from protos import control_pb2, control_pb2_grpc, expert_pb2, status_pb2, status_pb2_grpc
from router.expert_set import ExpertSet


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("control") / "demo"
    make_demo(directory)
    return directory


@pytest.fixture
def expert_set(checkpoint: Path) -> ExpertSet:
    return read_index(checkpoint).expert_set()


@asynccontextmanager
async def control_stub(checkpoint: Path, live: LiveExpertSet) -> AsyncIterator[control_pb2_grpc.ExpertControlStub]:
    server = GrpcServer(ServerOptions())
    service = ExpertControlService(Registry(registry_root(checkpoint)), live)
    server.add(control_pb2_grpc.add_ExpertControlServicer_to_server, service, CONTROL_SERVICE)
    await server.start()
    async with grpc.aio.insecure_channel(server.address) as channel:
        yield control_pb2_grpc.ExpertControlStub(channel)
    await server.stop(0)


async def test_list_shows_the_live_set_and_every_bundle(checkpoint: Path, expert_set: ExpertSet) -> None:
    async with control_stub(checkpoint, LiveExpertSet(expert_set)) as stub:
        response = await stub.List(control_pb2.ListRequest())
    assert response.live.id == expert_set.id
    assert response.live.routing == "organs"
    assert [member.organ for member in response.live.members] == list(expert_set.organs)
    assert {bundle.digest for bundle in response.bundles} == {member.bundle_digest for member in expert_set.members}
    for bundle in response.bundles:
        assert bundle.live
        assert bundle.version == "1.0.0"
        assert bundle.num_experts == 4
        # Four layers of four experts with three float32 matrices of 256 × 192, and some more for gates and headers.
        assert bundle.size_bytes > 4 * 4 * 3 * 256 * 64 * 4


async def test_list_of_one_organ_is_that_organ_and_of_an_unknown_one_an_error(
    checkpoint: Path, expert_set: ExpertSet
) -> None:
    async with control_stub(checkpoint, LiveExpertSet(expert_set)) as stub:
        response = await stub.List(control_pb2.ListRequest(organ="heart"))
        assert [bundle.organ for bundle in response.bundles] == ["heart"]
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.List(control_pb2.ListRequest(organ="spleen"))
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND
    assert "heart" in str(caught.value.details())


async def test_a_bundle_that_is_not_in_the_set_is_not_live(checkpoint: Path, expert_set: ExpertSet) -> None:
    only_heart = expert_set.model_copy(update={"members": expert_set.members[2:3]})
    async with control_stub(checkpoint, LiveExpertSet(only_heart)) as stub:
        response = await stub.List(control_pb2.ListRequest())
    assert [bundle.organ for bundle in response.bundles if bundle.live] == ["heart"]


async def test_watch_tells_the_set_now_and_every_change_to_all(checkpoint: Path, expert_set: ExpertSet) -> None:
    live = LiveExpertSet(expert_set)
    fewer = ExpertSet(backbone_digest=expert_set.backbone_digest, routing="organs", members=expert_set.members[:2])
    async with control_stub(checkpoint, live) as stub:
        watches = [stub.Watch(control_pb2.WatchRequest()) for _ in range(2)]
        assert [(await watch.read()).id for watch in watches] == [expert_set.id] * 2
        await live.replace(fewer)
        assert [(await watch.read()).id for watch in watches] == [fewer.id] * 2
        # The same set again is no news; the next message is the change after it.
        await live.replace(fewer)
        await live.replace(expert_set)
        assert (await watches[0].read()).id == expert_set.id
        for watch in watches:
            watch.cancel()


async def test_status_gathers_what_every_replica_says_of_itself(expert_set: ExpertSet) -> None:
    bundle = expert_pb2.ResidentBundle(digest="d", name="n", version="1.2.0", resident_bytes=2**40, kernel="reference")
    identity = ReplicaIdentity("expert-heart", "ExpertGroup", "r1", device="cpu", organ="heart")
    replica = GrpcServer(ServerOptions())
    described = ReplicaStatusService(identity, lambda: replica.address, lambda: 7, lambda: [bundle])
    replica.add(status_pb2_grpc.add_ReplicaStatusServicer_to_server, described, SERVICE_NAME)
    await replica.start()
    silent = GrpcServer(ServerOptions())
    await silent.start()
    await silent.stop(0)

    server = GrpcServer(ServerOptions())
    service = SystemStatusService(
        {"expert-heart": lambda: [replica.address, silent.address], "vision": list},
        lambda: {"expert-heart": ApplicationState("RUNNING"), "vision": ApplicationState("DEPLOY_FAILED", "no GPU")},
        LiveExpertSet(expert_set),
    )
    server.add(status_pb2_grpc.add_SystemStatusServicer_to_server, service, STATUS_SERVICE)
    await server.start()
    async with grpc.aio.insecure_channel(server.address) as channel:
        found = await status_pb2_grpc.SystemStatusStub(channel).GetStatus(status_pb2.GetStatusRequest())
    await server.stop(0)
    await replica.stop(0)

    assert found.expert_set_id == expert_set.id
    heart, vision = found.applications
    assert (heart.name, heart.status) == ("expert-heart", "RUNNING")
    assert (vision.name, vision.status, vision.message) == ("vision", "DEPLOY_FAILED", "no GPU")
    answering, not_answering = heart.replicas
    assert answering.endpoint == replica.address
    assert answering.organ == "heart"
    assert answering.queue_length == 7
    assert answering.pid > 0
    assert answering.resident_bytes > 10 * 2**20
    assert list(answering.bundles) == [bundle]
    assert (not_answering.endpoint, not_answering.pid) == (silent.address, 0)
