import asyncio
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from echovlm_ray.checkpoint.layout import registry_root
from echovlm_ray.serving.cluster.known_policy import read_policy
from echovlm_ray.serving.cluster.replica_status import SERVICE_NAME, ReplicaIdentity, ReplicaStatusService
from echovlm_ray.serving.control import STATUS_SERVICE
from echovlm_ray.serving.control.status import ApplicationState, SystemStatusService
from echovlm_ray.serving.grpc.server import GrpcServer, ServerOptions
from experts.bundles.bundle import Bundle
from experts.bundles.manifest import MANIFEST_NAME, Manifest
from experts.registry.registry import Registry
from experts.transport.inner_channel import PLAIN_CHANNELS, InnerChannels
from experts.transport.secret import SystemSecret
from protos import control_pb2, control_pb2_grpc, expert_pb2, status_pb2, status_pb2_grpc
from tests.changed_bundles import changed_bundle, not_a_number
from tests.expert_servers import server_thread
from tests.random_checkpoint import make_random
from tests.serving.control_system import ORGANS, ControlSystem, control_system, live_set

WHO: dict[str, Any] = {"actor": "tests", "reason": "to see"}


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("control") / "demo"
    make_random(directory)
    return directory


@pytest.fixture(scope="module")
def candidates(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of bundles of the heart that were not pushed: a good one, and one whose weights are no numbers."""
    directory = tmp_path_factory.mktemp("candidates")
    source = heart_of(demo)
    changed_bundle(directory / "good", source, "1.1.0")
    changed_bundle(directory / "nan", source, "1.2.0", not_a_number)
    changed_bundle(directory / "other", source, "1.0.0")
    return {name: directory / name for name in ("good", "nan", "other")}


@pytest.fixture
def checkpoint(demo: Path, tmp_path: Path) -> Path:
    """The demo with a separate registry for a test's pushes."""
    copy = tmp_path / "demo"
    shutil.copytree(demo, copy, copy_function=_link)
    return copy


def _link(source: str, target: str) -> str:
    Path(target).hardlink_to(source)
    return target


def heart_of(checkpoint: Path) -> Bundle:
    return Registry(registry_root(checkpoint)).open(live_set(checkpoint).bundle_digest("heart"))


@pytest.fixture
async def system(checkpoint: Path, tmp_path: Path) -> AsyncIterator[ControlSystem]:
    with server_thread() as servers:
        async with control_system(checkpoint, tmp_path, servers) as found:
            yield found


def messages(folder: Path) -> list[control_pb2.PushRequest]:
    """What a client sends, in small pieces."""
    content = (folder / MANIFEST_NAME).read_bytes()
    parts = [control_pb2.PushRequest(manifest=content)]
    for entry in Manifest.from_json(content, "manifest").files:
        data = (folder / entry.path).read_bytes()
        parts.append(control_pb2.PushRequest(file=entry.path))
        parts += [control_pb2.PushRequest(data=data[at : at + 2**18]) for at in range(0, len(data), 2**18)]
    return parts


async def push(system: ControlSystem, folder: Path) -> control_pb2.BundleInfo:
    response = await system.stub.Push(iter(messages(folder)))
    bundle: control_pb2.BundleInfo = response.bundle
    return bundle


async def test_list_shows_the_live_set_every_bundle_and_what_replicas_hold(
    system: ControlSystem, checkpoint: Path
) -> None:
    response = await system.stub.List(control_pb2.ListRequest())
    expert_set = live_set(checkpoint)
    assert response.live.id == expert_set.id
    assert [member.organ for member in response.live.members] == list(ORGANS)
    assert {bundle.organ for bundle in response.bundles if bundle.live} == set(ORGANS)
    assert len(response.bundles) == 7
    assert all(bundle.num_experts == 4 and bundle.size_bytes > 100_000 for bundle in response.bundles)
    held = {replica.organ: [bundle.digest for bundle in replica.bundles] for replica in response.replicas}
    assert held == {member.organ: [member.bundle_digest] for member in expert_set.members}
    assert all(replica.limit_bytes == 1024**3 for replica in response.replicas)


async def test_list_of_one_organ_is_that_organ_and_of_an_unknown_one_an_error(system: ControlSystem) -> None:
    response = await system.stub.List(control_pb2.ListRequest(organ="heart"))
    assert {bundle.organ for bundle in response.bundles} == {"heart"}
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await system.stub.List(control_pb2.ListRequest(organ="spleen"))
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND
    assert "heart" in str(caught.value.details())


async def test_a_whole_rollout_and_back(system: ControlSystem, candidates: dict[str, Path]) -> None:
    pushed = await push(system, candidates["good"])
    assert (pushed.organ, pushed.version, pushed.live) == ("heart", "1.1.0", False)
    assert await push(system, candidates["good"]) == pushed
    before = (await system.stub.List(control_pb2.ListRequest())).live
    old = next(member.bundle_digest for member in before.members if member.organ == "heart")
    policies = system.feed.WatchPolicy(control_pb2.WatchPolicyRequest(router="r"))
    first = await policies.read()
    assert first.stable == before
    assert first.versions[old] == "1.0.0"
    watch = system.stub.Watch(control_pb2.WatchRequest())
    assert not (await watch.read()).rollouts

    answer = await system.stub.Stage(control_pb2.StageRequest(organ="heart", version="1.1.0", **WHO))
    assert answer.changed
    assert (answer.rollout.version, answer.rollout.incumbent_digest) == ("1.1.0", old)
    seen = set()
    while "warm" not in seen:
        seen |= {rollout.state for rollout in (await watch.read()).rollouts}
    assert seen <= {"staged", "verified", "warm"}
    watch.cancel()

    named: dict[str, Any] = {"organ": "heart", "digest": pushed.digest, **WHO}
    await system.stub.Canary(control_pb2.TrafficRequest(percent=50, **named))
    canary = await policies.read()
    assert canary.version > first.version
    (traffic,) = canary.candidates
    assert (traffic.digest, traffic.mode, traffic.percent) == (pushed.digest, "canary", 50)
    assert canary.versions[pushed.digest] == "1.1.0"
    assert read_policy(system.files.policy) == canary

    await system.stub.Promote(control_pb2.OrganRequest(**named))
    again = await system.stub.Promote(control_pb2.OrganRequest(**named))
    assert not again.changed
    promoted = await policies.read()
    assert not promoted.candidates
    assert {member.organ: member.bundle_digest for member in promoted.stable.members}["heart"] == pushed.digest
    await system.until("heart", "stable")
    # The one before stays to go back to.
    while await system.residents("heart") != [{old, pushed.digest}]:
        await asyncio.sleep(0.02)

    await system.stub.RollBackStable(control_pb2.RollBackStableRequest(**named))
    back = await policies.read()
    assert back.stable == before
    policies.cancel()
    history = await system.stub.History(control_pb2.HistoryRequest(organ="heart", verify=True))
    events = [entry.event for entry in history.entries]
    assert events[:5] == ["stage", "verify", "warm_up", "canary", "promote"]
    assert history.entries[0].actor == "tests"
    assert not history.faults
    last = await system.stub.History(control_pb2.HistoryRequest(last=2))
    assert [entry.sequence for entry in last.entries] == [last.length - 1, last.length]
    assert last.entries[-1].hash == last.head_hash
    noted = await system.stub.History(control_pb2.HistoryRequest(last=1, noted_hash=history.entries[0].hash))
    assert not noted.faults
    forged = await system.stub.History(control_pb2.HistoryRequest(last=1, noted_hash="0" * 64))
    assert "rewritten" in forged.faults[0]


async def test_a_dry_run_says_what_memory_it_takes_and_changes_nothing(
    system: ControlSystem, candidates: dict[str, Path]
) -> None:
    await push(system, candidates["good"])
    answer = await system.stub.Stage(control_pb2.StageRequest(organ="heart", version="1.1.0", dry_run=True, **WHO))
    assert not answer.changed
    assert answer.steps
    (memory,) = answer.memory
    assert memory.fits
    assert 0 < memory.needed_bytes == memory.resident_bytes < memory.limit_bytes
    assert not (await system.stub.List(control_pb2.ListRequest())).rollouts


async def test_weights_that_are_no_numbers_end_failed_and_the_incumbent_stays(
    system: ControlSystem, candidates: dict[str, Path]
) -> None:
    before = (await system.stub.List(control_pb2.ListRequest())).live
    pushed = await push(system, candidates["nan"])
    await system.stub.Stage(control_pb2.StageRequest(organ="heart", digest=pushed.digest, **WHO))
    while (rollout := await system.rollout("heart")).state == "staged":
        await asyncio.sleep(0.05)
    assert rollout.state == "failed"
    assert "not a number" in rollout.reason
    after = await system.stub.List(control_pb2.ListRequest())
    assert after.live == before
    assert await system.residents("heart") == [
        {heart.bundle_digest for heart in before.members if heart.organ == "heart"}
    ]


async def test_what_routers_report_takes_a_candidate_back_and_what_strangers_do_counts_nothing(
    system: ControlSystem, candidates: dict[str, Path]
) -> None:
    pushed = await push(system, candidates["good"])
    await system.stub.Stage(control_pb2.StageRequest(organ="heart", digest=pushed.digest, **WHO))
    await system.until("heart", "warm")
    shadow = await system.stub.Shadow(control_pb2.TrafficRequest(organ="heart", percent=100, **WHO))
    compared = control_pb2.ShadowObservation(
        rollout_id=shadow.rollout.id, tokens=4, shared_tokens=3, first_divergence=2, latency_ratio=2.0
    )
    unknown = control_pb2.ShadowObservation(rollout_id="heart-99", tokens=1, shared_tokens=1)
    await system.feed.Report(control_pb2.ReportRequest(router="r", shadows=[compared, unknown]))
    report = (await system.rollout("heart")).shadow
    assert (report.requests, report.identical, report.token_overlap) == (1, 0, 0.75)
    assert report.mean_first_divergence == 2
    assert report.latency_ratio == pytest.approx(2.0)
    await system.stub.Canary(control_pb2.TrafficRequest(organ="heart", percent=10, **WHO))
    bad = control_pb2.Observation(organ="heart", digest=pushed.digest, requests=1, errors=1, nonfinite=1)
    forged = control_pb2.ReportRequest(router="r", observations=[bad], shadows=[compared])
    for stranger in (PLAIN_CHANNELS, InnerChannels(SystemSecret.random())):
        async with stranger.asynchronous(system.feed_address) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await control_pb2_grpc.RolloutFeedStub(channel).Report(forged, timeout=10)
        assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED
    assert not system.monitor.slices("heart", pushed.digest)
    rollout = await system.rollout("heart")
    assert (rollout.state, rollout.shadow.requests) == ("canary", 1)
    await system.feed.Report(control_pb2.ReportRequest(router="r", observations=[bad]))
    while (rollout := await system.rollout("heart")).state == "canary":
        await asyncio.sleep(0.02)
    assert rollout.state == "rolled_back"
    assert "not a number" in rollout.reason


async def test_a_rollout_file_is_applied_once(system: ControlSystem, candidates: dict[str, Path]) -> None:
    await push(system, candidates["good"])
    file = '{"organ": "heart", "version": "1.1.0", "steps": [{"percent": 50, "hold_s": 0}]}'
    request = control_pb2.ApplyRequest(rollout_json=file, actor="tests")
    assert (await system.stub.Apply(request)).changed
    await system.until("heart", "stable")
    assert not (await system.stub.Apply(request)).changed
    wrong = control_pb2.ApplyRequest(rollout_json='{"organ": "heart"}', actor="tests")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await system.stub.Apply(wrong)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT


async def test_a_control_that_starts_again_goes_on_where_the_database_stands(
    checkpoint: Path, tmp_path: Path, candidates: dict[str, Path]
) -> None:
    with server_thread() as servers:
        async with control_system(checkpoint, tmp_path, servers) as system:
            pushed = await push(system, candidates["good"])
            await system.stub.Stage(control_pb2.StageRequest(organ="heart", digest=pushed.digest, **WHO))
        async with control_system(checkpoint, tmp_path, servers) as system:
            await system.until("heart", "warm")
            await system.stub.Promote(control_pb2.OrganRequest(organ="heart", **WHO))
        async with control_system(checkpoint, tmp_path, servers) as system:
            live = (await system.stub.List(control_pb2.ListRequest())).live
            assert {member.organ: member.bundle_digest for member in live.members}["heart"] == pushed.digest


@pytest.mark.parametrize(
    ("call", "code", "words"),
    [
        (("Stage", control_pb2.StageRequest(organ="heart", version="9.9.9", **WHO)), "NOT_FOUND", "1.0.0"),
        (("Stage", control_pb2.StageRequest(organ="heart", digest="0" * 64, **WHO)), "NOT_FOUND", "push"),
        (("Stage", control_pb2.StageRequest(organ="heart", **WHO)), "INVALID_ARGUMENT", "version"),
        (("Stage", control_pb2.StageRequest(organ="heart", version="1.0.0")), "INVALID_ARGUMENT", "actor"),
        (("Promote", control_pb2.OrganRequest(organ="heart", **WHO)), "FAILED_PRECONDITION", "nothing is in flight"),
        (("Promote", control_pb2.OrganRequest(organ="spleen", **WHO)), "NOT_FOUND", "heart"),
        (("Canary", control_pb2.TrafficRequest(organ="heart", percent=101, **WHO)), "INVALID_ARGUMENT", "percent"),
        (("Retire", control_pb2.RetireRequest(organ="breast", **WHO)), "FAILED_PRECONDITION", "default_organ"),
    ],
)
async def test_what_cannot_be_done_is_said(
    system: ControlSystem, call: tuple[str, object], code: str, words: str
) -> None:
    method, request = call
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await getattr(system.stub, method)(request)
    assert caught.value.code().name == code
    assert words in str(caught.value.details())


async def test_experts_in_the_routers_process_are_not_replaced(checkpoint: Path, tmp_path: Path) -> None:
    with server_thread() as servers:
        async with control_system(checkpoint, tmp_path, servers, replaceable=False) as system:
            assert (await system.stub.List(control_pb2.ListRequest())).live.members
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await system.stub.Stage(control_pb2.StageRequest(organ="heart", version="1.0.0", **WHO))
    assert caught.value.code() == grpc.StatusCode.FAILED_PRECONDITION
    assert "router.experts" in str(caught.value.details())


class TestPush:
    @pytest.mark.parametrize(
        ("name", "code", "words"),
        [
            ("no manifest", "INVALID_ARGUMENT", "manifest first"),
            ("two manifests", "INVALID_ARGUMENT", "manifest first"),
            ("unknown file", "INVALID_ARGUMENT", "no file of the manifest"),
            ("leaves the folder", "INVALID_ARGUMENT", "no file of the manifest"),
            ("data before a file", "INVALID_ARGUMENT", "belongs to no file"),
            ("too long", "INVALID_ARGUMENT", "more bytes"),
            ("too short", "INVALID_ARGUMENT", "ended after"),
            ("missing file", "INVALID_ARGUMENT", "did not come"),
            ("damaged", "FAILED_PRECONDITION", ""),
            ("large signature", "INVALID_ARGUMENT", "signature"),
            ("no json", "FAILED_PRECONDITION", "JSON"),
        ],
    )
    async def test_a_broken_push_leaves_nothing(
        self, system: ControlSystem, candidates: dict[str, Path], name: str, code: str, words: str
    ) -> None:
        before = files_of(Path(system.registry.root))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await system.stub.Push(iter(broken(name, messages(candidates["good"]))))
        assert caught.value.code().name == code
        assert words in str(caught.value.details())
        assert files_of(Path(system.registry.root)) == before
        assert not system.files.incoming.exists()

    async def test_another_bundle_of_a_version_is_refused(
        self, system: ControlSystem, candidates: dict[str, Path]
    ) -> None:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await push(system, candidates["other"])
        assert caught.value.code() == grpc.StatusCode.FAILED_PRECONDITION
        assert "immutable" in str(caught.value.details())

    async def test_a_client_that_leaves_leaves_nothing(
        self, system: ControlSystem, candidates: dict[str, Path]
    ) -> None:
        call = system.stub.Push()
        for part in messages(candidates["good"])[:4]:
            await call.write(part)
        while not files_of(system.files.incoming):
            await asyncio.sleep(0.01)
        call.cancel()
        while system.files.incoming.exists():
            await asyncio.sleep(0.01)


def files_of(directory: Path) -> set[Path]:
    return {path for path in directory.rglob("*") if path.is_file()}


def broken(name: str, parts: list[control_pb2.PushRequest]) -> list[control_pb2.PushRequest]:
    data = next(at for at, part in enumerate(parts) if part.data)
    last_file = max(at for at, part in enumerate(parts) if part.file)
    more = control_pb2.PushRequest(data=b"more")
    return {
        "no manifest": parts[1:],
        "two manifests": [parts[0], *parts],
        "unknown file": [parts[0], control_pb2.PushRequest(file="x.safetensors")],
        "leaves the folder": [parts[0], control_pb2.PushRequest(file="../x.safetensors")],
        "data before a file": [parts[0], more],
        "too long": [*parts, more],
        "too short": [*parts[:data], *parts[data + 1 :]],
        "missing file": parts[:last_file],
        "damaged": [*parts[:data], control_pb2.PushRequest(data=bytes(len(parts[data].data))), *parts[data + 1 :]],
        "large signature": [parts[0], control_pb2.PushRequest(signature=bytes(2**20 + 1))],
        "no json": [control_pb2.PushRequest(manifest=b"{")],
    }[name]


async def test_status_gathers_what_every_replica_says_of_itself() -> None:
    bundle = expert_pb2.ResidentBundle(digest="d", name="n", version="1.2.0", resident_bytes=2**40, kernel="reference")
    identity = ReplicaIdentity("expert-heart", "ExpertGroup", "r1", device="cpu", organ="heart")
    replica = GrpcServer(ServerOptions())
    refused = {("credentials", ""): 3, ("max_requests", "ward"): 1}
    described = ReplicaStatusService(
        identity, lambda: replica.address, lambda: 7, lambda: [bundle], refusals=lambda: refused
    )
    replica.add(status_pb2_grpc.add_ReplicaStatusServicer_to_server, described, SERVICE_NAME)
    await replica.start()
    silent = GrpcServer(ServerOptions())
    await silent.start()
    await silent.stop(0)

    server = GrpcServer(ServerOptions())
    service = SystemStatusService(
        lambda: ["expert-heart", "vision"],
        lambda name: [replica.address, silent.address] if name == "expert-heart" else [],
        lambda: {"expert-heart": ApplicationState("RUNNING"), "vision": ApplicationState("DEPLOY_FAILED", "no GPU")},
        lambda: "the live set",
    )
    server.add(status_pb2_grpc.add_SystemStatusServicer_to_server, service, STATUS_SERVICE)
    await server.start()
    async with grpc.aio.insecure_channel(server.address) as channel:
        found = await status_pb2_grpc.SystemStatusStub(channel).GetStatus(status_pb2.GetStatusRequest())
    await server.stop(0)
    await replica.stop(0)

    assert found.expert_set_id == "the live set"
    heart, vision = found.applications
    assert (heart.name, heart.status) == ("expert-heart", "RUNNING")
    assert (vision.name, vision.status, vision.message) == ("vision", "DEPLOY_FAILED", "no GPU")
    answering, not_answering = heart.replicas
    assert {(each.reason, each.caller): each.count for each in answering.refusals} == refused
    assert answering.endpoint == replica.address
    assert answering.organ == "heart"
    assert answering.queue_length == 7
    assert answering.pid > 0
    assert answering.resident_bytes > 10 * 2**20
    assert list(answering.bundles) == [bundle]
    assert (not_answering.endpoint, not_answering.pid) == (silent.address, 0)


async def test_the_history_of_what_is_served_needs_no_registry(
    system: ControlSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: object, **__: object) -> None:
        raise OSError(5, "away")

    monkeypatch.setattr(type(system.registry), "list", away)
    history = await system.stub.History(control_pb2.HistoryRequest(organ="heart"))
    assert not history.faults
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await system.stub.History(control_pb2.HistoryRequest(organ="spleen"))
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND
    assert "there are breast, heart" in str(caught.value.details())


async def test_what_is_served_is_named_and_taken_back_while_the_registry_is_gone(
    system: ControlSystem, candidates: dict[str, Path]
) -> None:
    pushed = await push(system, candidates["good"])
    await system.stub.Stage(control_pb2.StageRequest(organ="heart", version="1.1.0", **WHO))
    await system.until("heart", "warm")
    await system.stub.Promote(control_pb2.OrganRequest(organ="heart", **WHO))
    await system.until("heart", "stable")
    root = Path(system.registry.root)
    root.rename(root.with_name("elsewhere"))
    found = await system.stub.List(control_pb2.ListRequest())
    assert "the folder does not exist" in found.registry_problem
    assert {(bundle.organ, bundle.version, bundle.live) for bundle in found.bundles} == {
        ("breast", "1.0.0", True),
        ("heart", "1.0.0", False),
        ("heart", "1.1.0", True),
    }
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await system.stub.Stage(control_pb2.StageRequest(organ="heart", version="9.9.9", **WHO))
    assert "cannot be read: the folder does not exist" in str(caught.value.details())
    back = await system.stub.RollBackStable(control_pb2.RollBackStableRequest(organ="heart", version="1.1.0", **WHO))
    assert back.changed
    while (stable := (await system.stub.List(control_pb2.ListRequest(organ="heart"))).live).id == found.live.id:
        await asyncio.sleep(0.02)
    assert pushed.digest not in {member.bundle_digest for member in stable.members}
