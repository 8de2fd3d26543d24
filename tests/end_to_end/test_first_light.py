"""The main job: real ultrasound files in, tokens streamed back, computed by one process per organ."""

import io
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import psutil
import pytest
from google.protobuf import descriptor_pool, message_factory
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from PIL import Image
from pydicom.data import get_testdata_file

from echovlm_ray.client import EchoVLMClient, InvalidRequestError
from tests.running_system import RunningSystem, title_of

ORGANS = ("breast", "gynaecology", "heart", "kidney", "liver", "thyroid", "vessel")
SERVING = health_pb2.HealthCheckResponse.SERVING
SERVICES = ("", "echovlm.v1.EchoVLM", "echovlm.v1.VisionEncoder", "echovlm.v1.Router", "echovlm.v1.ExpertControl")


@pytest.fixture
def client(running_system: RunningSystem) -> EchoVLMClient:
    return EchoVLMClient(running_system.gateway_address)


def test_a_cine_loop_streams_a_report(client: EchoVLMClient) -> None:
    cine = Path(str(get_testdata_file("examples_ybr_color.dcm")))
    stream = client.stream(cine, task="report", language="en", organs=["heart"], max_new_tokens=24)
    pieces = list(stream.text())
    assert stream.accepted is not None
    assert stream.accepted.frames == (8,)
    assert stream.accepted.visual_tokens > 0
    assert len(pieces) > 1, "the answer came in one piece"
    assert stream.summary is not None
    assert stream.summary.completion_tokens <= 24
    (heart,) = stream.summary.provenance.organs
    assert (heart.organ, heart.routed_share) == ("heart", 1.0)
    again = client.generate(cine, task="report", language="en", organs=["heart"], max_new_tokens=24)
    assert again.text == "".join(pieces)


def test_only_parts_that_compute_have_torch_in_memory(client: EchoVLMClient, running_system: RunningSystem) -> None:
    """It takes 120 MB of each process. Looked at after an answer, when what is imported late is there too."""
    cine = Path(str(get_testdata_file("examples_ybr_color.dcm")))
    client.generate(cine, task="report", max_new_tokens=4)
    parts = ("gateway", "control", "router", "vision", "expert-heart")
    with_torch = {
        part
        for process in psutil.Process(running_system.process.pid).children(recursive=True)
        for part in parts
        if f"ServeReplica:{part}:" in title_of(process)
        and any("libtorch_cpu" in mapped.path for mapped in process.memory_maps())
    }
    assert with_torch == {"router", "vision", "expert-heart"}


def test_the_picture_matters(client: EchoVLMClient) -> None:
    black = io.BytesIO()
    Image.new("RGB", (200, 160)).save(black, "PNG")
    real = Path(str(get_testdata_file("examples_rgb_color.dcm"))).read_bytes()
    answers = {client.generate(image, task="caption", max_new_tokens=16).text for image in (black.getvalue(), real)}
    assert len(answers) == 2


def test_every_organ_answers_from_a_process_of_its_own(client: EchoVLMClient, running_system: RunningSystem) -> None:
    texts = set()
    for organ in ORGANS:
        answer = client.generate(prompt="What is shown?", task="free", organs=[organ], max_new_tokens=8)
        assert [part.organ for part in answer.summary.provenance.organs] == [organ]
        texts.add(answer.text)
    assert len(texts) == 1, "identical copies of the experts give one answer"
    applications = running_system.status()["applications"]
    assert {application["name"] for application in applications} >= {f"expert-{organ}" for organ in ORGANS}
    replicas = [replica for application in applications for replica in application["replicas"]]
    assert len({replica["pid"] for replica in replicas}) == len(replicas) >= 10
    assert len({replica["endpoint"] for replica in replicas}) == len(replicas)


def test_many_at_once_give_the_same_answers_as_alone(client: EchoVLMClient) -> None:
    work = [(f"Question {index}?", ORGANS[index % len(ORGANS)]) for index in range(12)]

    def ask(item: tuple[str, str]) -> str:
        return client.generate(prompt=item[0], task="free", organs=[item[1]], max_new_tokens=12).text

    alone = [ask(item) for item in work]
    with ThreadPoolExecutor(len(work)) as pool:
        assert list(pool.map(ask, work)) == alone


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b"not an image at all", "PNG"),
        (Path(str(get_testdata_file("examples_rgb_color.dcm"))).read_bytes()[:5000], "cut off"),
        (Path(str(get_testdata_file("rtplan.dcm"))).read_bytes(), "image"),
    ],
    ids=["empty", "text", "truncated", "plan"],
)
def test_bad_images_are_refused_and_nothing_else_is_disturbed(
    client: EchoVLMClient, content: bytes, reason: str
) -> None:
    started, answers = threading.Event(), []

    def other() -> None:
        stream = client.stream(prompt="What is shown?", task="free", organs=["liver"], max_new_tokens=48)
        for _ in stream.text():
            started.set()
        answers.append(stream.summary)

    thread = threading.Thread(target=other)
    thread.start()
    assert started.wait(30)
    good = io.BytesIO()
    Image.new("RGB", (64, 64), "white").save(good, "PNG")
    with pytest.raises(InvalidRequestError) as caught:
        client.generate([good.getvalue(), content], task="report")
    thread.join(60)
    assert answers[0] is not None
    (violation,) = caught.value.violations
    assert violation.field == "images[1].content"
    assert reason in violation.description


def test_health_of_every_service_and_organ(running_system: RunningSystem) -> None:
    with grpc.insecure_channel(running_system.gateway_address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for name in (*SERVICES, *(f"echovlm.v1.ExpertGroup/{organ}" for organ in ORGANS)):
            assert stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=5).status == SERVING, name
            first = next(iter(stub.Watch(health_pb2.HealthCheckRequest(service=name), timeout=5)))
            assert first.status == SERVING
        with pytest.raises(grpc.RpcError) as caught:
            stub.Check(health_pb2.HealthCheckRequest(service="echovlm.v1.ExpertGroup/lung"), timeout=5)
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND


def test_a_caller_that_knows_only_the_address_finds_out_the_rest(running_system: RunningSystem) -> None:
    with grpc.insecure_channel(running_system.gateway_address) as channel:
        reflection = ProtoReflectionDescriptorDatabase(channel)
        assert "echovlm.v1.EchoVLM" in reflection.get_services()
        pool = descriptor_pool.DescriptorPool(reflection)
        method = pool.FindServiceByName("echovlm.v1.EchoVLM").FindMethodByName("GetModelInfo")
        request = message_factory.GetMessageClass(method.input_type)()
        call = channel.unary_unary(
            "/echovlm.v1.EchoVLM/GetModelInfo",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=message_factory.GetMessageClass(method.output_type).FromString,
        )
        information = call(request, timeout=10)
    assert [organ.organ for organ in information.organs] == list(ORGANS)
    assert "means nothing" in information.description
    assert next(organ for organ in information.organs if organ.organ == "breast").bundle_version == "1.1.0"


def test_without_a_hint_the_default_organ_is_used_and_said(client: EchoVLMClient) -> None:
    answer = client.generate(prompt="What is shown?", task="free", max_new_tokens=2)
    assert answer.summary.provenance.organ_source == "default"
    assert any("breast" in notice for notice in answer.summary.notices)


def test_replicas_answer_for_themselves(running_system: RunningSystem) -> None:
    for application in ("vision", "router", "expert-liver"):
        (replica,) = running_system.replicas(application)
        with running_system.inner_channel(replica["endpoint"]) as channel:
            status = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5).status
        assert status == SERVING, application
