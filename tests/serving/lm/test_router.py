"""The router's gRPC service over a real engine and a real vision encoder, without Ray."""

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch

from echovlm_ray.config import RouterSection
from echovlm_ray.engine.engine import Engine
from echovlm_ray.engine.vision_encoder import VisionEncoder
from echovlm_ray.model.checkpoint import load_vision_tower
from echovlm_ray.serving.grpc.interceptor import CallInterceptor
from echovlm_ray.serving.lm.service import RouterService
from echovlm_ray.serving.vision.client import EncodedPicture, VisionClient
from echovlm_ray.serving.vision.service import VisionEncoderService
from experts.transport.codec import tensor_from_proto
from experts.transport.inner_channel import PLAIN_CHANNELS
from protos import router_pb2, router_pb2_grpc, vision_pb2, vision_pb2_grpc
from tests.engines import local_experts, running_engine
from tests.golden_cases import GoldenRow, golden_rows, router_request
from tests.serving.router_system import router_parts
from tests.split_golden import SplitGolden, split_golden

ALL = (0, 1, 2, 3)


@dataclass
class Served:
    """A router and its vision encoder, both listening."""

    router: Any
    engine: Engine
    split: SplitGolden
    service: RouterService
    vision_servers: dict[str, grpc.aio.Server]
    live_vision: list[str]


@pytest.fixture(scope="module")
def split(golden_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> SplitGolden:
    groups = {"breast": ALL, "liver": ALL, "heart": ALL}
    return split_golden(
        golden_dir / "base" / "checkpoint",
        tmp_path_factory.mktemp("split"),
        groups,
        "organs",
        synonyms={"liver": ("hepatic",)},
        prototypes={"heart": torch.ones(64)},
    )


@pytest.fixture(scope="module")
def rows(golden_dir: Path) -> list[GoldenRow]:
    return list(golden_rows(golden_dir, "base"))


async def vision_server(encoder: VisionEncoder) -> tuple[grpc.aio.Server, str]:
    server = grpc.aio.server(interceptors=[CallInterceptor()])
    vision_pb2_grpc.add_VisionEncoderServicer_to_server(VisionEncoderService(encoder), server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    return server, address


@asynccontextmanager
async def serving(split: SplitGolden, checkpoint: Path, limits: RouterSection) -> AsyncIterator[Served]:
    encoder = VisionEncoder(
        load_vision_tower(checkpoint), "digest", cache_bytes=0, max_batch_patches=4096, max_queue=16
    )
    vision_servers = dict([(await vision_server(encoder))[::-1] for _ in range(2)])
    live_vision = list(vision_servers)
    with running_engine(split, local_experts(split), max_batch_size=limits.max_batch_size) as engine:
        vision = VisionClient(lambda: live_vision, PLAIN_CHANNELS)
        parts = router_parts(engine, split, vision, limits, end_token_ids=frozenset({995}))
        service = parts.service
        server = grpc.aio.server(interceptors=[CallInterceptor()])
        router_pb2_grpc.add_RouterServicer_to_server(service, server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub = router_pb2_grpc.RouterStub(channel)
            yield Served(stub, engine, split, service, vision_servers, live_vision)
        await server.stop(None)
        await vision.close()
        for each in vision_servers.values():
            await each.stop(None)


@pytest.fixture
async def served(split: SplitGolden, golden_dir: Path) -> AsyncIterator[Served]:
    limits = RouterSection(max_prompt_tokens=64, max_new_tokens=2000, max_logits_bytes=64 * 1000 * 4)
    async with serving(split, golden_dir / "base" / "checkpoint", limits) as running:
        yield running


async def generate(
    served: Served, request: router_pb2.RouterGenerateRequest, timeout: float = 30
) -> tuple[list[int], list[torch.Tensor], router_pb2.RouterSummary]:
    token_ids: list[int] = []
    logits = []
    summary = None
    async for response in served.router.Generate(request, timeout=timeout):
        assert summary is None, "something came after the summary"
        token_ids += response.token_ids
        if response.HasField("logits"):
            logits.append(tensor_from_proto(response.logits))
        if response.HasField("summary"):
            summary = response.summary
    assert summary is not None
    return token_ids, logits, summary


async def test_golden_cases_with_logits_and_provenance(served: Served, rows: list[GoldenRow]) -> None:
    answers = await asyncio.gather(
        *[
            generate(served, router_request(row, organs=("liver", "heart") if i % 2 else ("liver",)))
            for i, row in enumerate(rows)
        ]
    )
    for index, (row, (token_ids, logits, summary)) in enumerate(zip(rows, answers, strict=True)):
        prompt = len(row.input_ids)
        assert [len(each) for each in logits] == [prompt] + [1] * (len(token_ids) - 1)
        row.check_logits(logits[0])
        row.check_tokens(token_ids)
        assert (summary.prompt_tokens, summary.completion_tokens) == (prompt, len(token_ids))
        stopped = token_ids[-1] == row.end_token_id
        assert summary.finish_reason == (router_pb2.FINISH_REASON_STOP if stopped else router_pb2.FINISH_REASON_LENGTH)
        provenance = summary.provenance
        assert provenance.expert_set_id == served.split.expert_set.id
        assert provenance.backbone_digest == served.split.expert_set.backbone_digest
        assert provenance.organ_source == router_pb2.ORGAN_SOURCE_CALLER
        shares = {organ.organ: organ.routed_share for organ in provenance.organs}
        assert shares == (pytest.approx({"liver": 0.5, "heart": 0.5}) if index % 2 else {"liver": 1.0})
        assert all(
            organ.bundle_digest == served.split.expert_set.bundle_digest(organ.organ)
            and organ.bundle_version == "1.0.0"
            for organ in provenance.organs
        )


async def test_route_is_a_dry_run(served: Served, rows: list[GoldenRow]) -> None:
    with_image = next(row for row in rows if row.vision)
    for hints, vision, organ, source in (
        (router_pb2.OrganHints(organs=["Liver"]), [], "liver", router_pb2.ORGAN_SOURCE_CALLER),
        (router_pb2.OrganHints(anatomy_terms=["Hepatic vein"]), [], "liver", router_pb2.ORGAN_SOURCE_DICOM),
        (router_pb2.OrganHints(), router_request(with_image).vision_inputs, "heart", router_pb2.ORGAN_SOURCE_PROTOTYPE),
        (router_pb2.OrganHints(), [], "breast", router_pb2.ORGAN_SOURCE_DEFAULT),
    ):
        route = await served.router.Route(router_pb2.RouteRequest(organ_hints=hints, vision_inputs=vision))
        assert route.expert_set_id == served.split.expert_set.id
        assert route.organ_source == source
        assert [(share.organ, share.share) for share in route.organs] == [(organ, 1.0)]


async def code_of(served: Served, request: router_pb2.RouterGenerateRequest, timeout: float = 30) -> tuple[Any, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await generate(served, request, timeout)
    return caught.value.code(), str(caught.value.details())


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"input_ids": []}, "input_ids: is empty"),
        ({"input_ids": [1] * 65}, r"65 tokens.*the limit is 64 \(router.max_prompt_tokens\)"),
        ({"input_ids": [1, 1000]}, "input_ids: holds 1000, but the vocabulary ends at 999"),
        ({"max_new_tokens": 0}, "max_new_tokens: is 0; it must be from 1 to 2000"),
        ({"max_new_tokens": 2001}, "max_new_tokens: is 2001"),
        ({"input_ids": [1, 990, 990]}, r"2 image placeholder tokens \(id 990\).*0 image\(s\) given fill 0"),
        ({"sampling": router_pb2.Sampling(temperature=-1)}, "sampling.temperature"),
        ({"sampling": router_pb2.Sampling(temperature=float("nan"))}, "sampling.temperature"),
        ({"sampling": router_pb2.Sampling(top_p=1.5)}, "sampling.top_p"),
        ({"sampling": router_pb2.Sampling(repetition_penalty=-2)}, "sampling.repetition_penalty"),
        ({"sampling": router_pb2.Sampling(repetition_penalty=1e-38)}, "sampling.repetition_penalty.*from 0.01 to 100"),
        ({"organ_hints": router_pb2.OrganHints(organs=["breast", "liver", "heart"])}, "organs: 3 organs are named"),
    ],
)
async def test_bad_requests_name_the_field(served: Served, change: dict[str, Any], text: str) -> None:
    fields: dict[str, Any] = {"input_ids": [1, 2], "max_new_tokens": 2} | change
    request = router_pb2.RouterGenerateRequest(**fields)
    code, details = await code_of(served, request)
    assert code == grpc.StatusCode.INVALID_ARGUMENT
    assert re.search(text, details), details
    assert served.engine.queue_length == 0


async def test_vision_inputs_that_do_not_fit_are_refused(served: Served, rows: list[GoldenRow]) -> None:
    row = next(row for row in rows if row.vision)
    missing = router_request(row)
    del missing.vision_inputs[:]
    unknown = router_request(row)
    unknown.vision_inputs[0].kind = vision_pb2.VISION_KIND_UNSPECIFIED
    odd = router_request(row)
    odd.vision_inputs[0].grid_h = 3
    short = router_request(row)
    short.vision_inputs[0].patches.shape[0] -= 1
    for request in (missing, unknown, odd, short):
        code, details = await code_of(served, request)
        assert code == grpc.StatusCode.INVALID_ARGUMENT, details
    await generate(served, router_request(row))


async def test_an_unknown_organ_is_not_found(served: Served) -> None:
    request = router_pb2.RouterGenerateRequest(
        input_ids=[1], max_new_tokens=1, organ_hints=router_pb2.OrganHints(organs=["spleen"])
    )
    code, details = await code_of(served, request)
    assert code == grpc.StatusCode.NOT_FOUND
    assert "breast, liver, heart" in details


async def test_logits_have_a_limit(split: SplitGolden, golden_dir: Path) -> None:
    limits = RouterSection(max_logits_bytes=4 * 1000 * 4)
    async with serving(split, golden_dir / "base" / "checkpoint", limits) as served:
        request = router_pb2.RouterGenerateRequest(input_ids=[1] * 5, max_new_tokens=1, return_logits=True)
        code, details = await code_of(served, request)
        assert code == grpc.StatusCode.INVALID_ARGUMENT
        assert "20000 bytes and the limit is 16000 (router.max_logits_bytes)" in details
        del request.input_ids[4:]
        assert (await generate(served, request))[1][0].shape == (4, 1000)


async def test_leaving_the_stream_frees_the_engine(served: Served) -> None:
    request = router_pb2.RouterGenerateRequest(input_ids=[1, 2, 3], max_new_tokens=2000, ignore_eos=True)
    free = served.engine.free_blocks
    call = served.router.Generate(request)
    await call.read()
    assert served.service.queue_length == 1
    call.cancel()
    for _ in range(500):
        if served.engine.free_blocks == free:
            break
        await asyncio.sleep(0.01)
    assert served.engine.free_blocks == free
    assert served.service.queue_length == 0


async def test_a_deadline_reaches_the_engine(served: Served) -> None:
    request = router_pb2.RouterGenerateRequest(input_ids=[1, 2, 3], max_new_tokens=2000, ignore_eos=True)
    code, _ = await code_of(served, request, timeout=0.5)
    assert code == grpc.StatusCode.DEADLINE_EXCEEDED
    await asyncio.sleep(0.1)
    assert served.engine.queue_length == 0


async def test_sampling_with_a_seed_repeats_itself(served: Served) -> None:
    request = router_pb2.RouterGenerateRequest(
        input_ids=[5, 6, 7],
        max_new_tokens=12,
        ignore_eos=True,
        sampling=router_pb2.Sampling(temperature=5.0, seed=2**63 + 1),
    )
    first, second = (await generate(served, request))[0], (await generate(served, request))[0]
    assert first == second
    request.sampling.seed = 4
    assert (await generate(served, request))[0] != first


async def test_a_lost_vision_encoder_is_replaced_by_another(served: Served, rows: list[GoldenRow]) -> None:
    row = next(row for row in rows if row.vision)
    token_ids, _, _ = await generate(served, router_request(row))
    first, second = served.live_vision
    await served.vision_servers[first].stop(None)
    assert (await generate(served, router_request(row)))[0] == token_ids
    await served.vision_servers[second].stop(None)
    code, details = await code_of(served, router_request(row), timeout=2)
    assert code == grpc.StatusCode.UNAVAILABLE
    assert "vision encoder" in details
    served.live_vision.clear()
    text_only = next(row for row in rows if not row.vision)
    assert (await generate(served, router_request(text_only)))[0]


def cut_short(row: GoldenRow, organ: str = "liver") -> router_pb2.RouterGenerateRequest:
    """The row without a wish for logits, which would have everything computed."""
    request = router_request(row, organs=(organ,))
    request.return_logits = False
    return request


async def test_the_same_prompt_and_pictures_are_computed_once(served: Served, rows: list[GoldenRow]) -> None:
    row = next(row for row in rows if len(row.vision) == 2)
    first, _, summary = await generate(served, cut_short(row))
    assert served.engine.prefix_hits == 0
    again, _, same_summary = await generate(served, cut_short(row))
    reused = (len(row.input_ids) - 1) // 16 * 16
    assert served.engine.prefix_hits == reused > int(row.input_ids.index(990))
    assert again == first
    assert same_summary == summary
    # The same tokens with another picture in them, or other experts, are another prompt.
    other = cut_short(row)
    patches = other.vision_inputs[0].patches
    patches.data = bytes(len(patches.data))
    before_picture = row.input_ids.index(990) // 16 * 16
    await generate(served, other)
    assert served.engine.prefix_hits == reused + before_picture
    await generate(served, cut_short(row, "heart"))
    assert served.engine.prefix_hits == reused + before_picture


async def test_a_request_that_cannot_be_laid_out_keeps_no_experts(served: Served, rows: list[GoldenRow]) -> None:
    row = max(rows, key=lambda row: row.input_ids.count(990))
    request = router_request(row, organs=("liver",))
    second = row.input_ids.index(990) + 1
    # As many placeholders as before, and no picture fits where they stand.
    request.input_ids[second], request.input_ids[-1] = request.input_ids[-1], request.input_ids[second]
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await generate(served, request)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "in the order of the prompt" in caught.value.details()
    assert [known.runs for known in served.service._expert_sets._sets.values()] == [0]


async def test_images_and_videos_go_where_their_placeholders_are(served: Served, rows: list[GoldenRow]) -> None:
    row = next(row for row in rows if {item.kind for item in row.vision} == {1, 2})
    request = router_request(row)
    pictures = [
        EncodedPicture(f"{index}", torch.full((served.service._reader.visual_tokens(item), 64), float(index)))
        for index, item in enumerate(request.vision_inputs)
    ]
    input_ids = torch.tensor(row.input_ids)
    rows_V, embeddings_VD, digests = served.service._reader.place_vision(input_ids, request.vision_inputs, pictures)
    assert rows_V is not None
    assert embeddings_VD is not None
    assert rows_V.tolist() == [index for index, token in enumerate(row.input_ids) if token in (990, 991)]
    assert [digest.content_digest for digest in digests] == ["0", "1"]
    for digest in digests:
        own = embeddings_VD[digest.start : digest.end]
        assert own.unique().tolist() == [float(digest.content_digest)]
        kinds = {row.input_ids[index] for index in rows_V[digest.start : digest.end].tolist()}
        assert kinds == {990 if request.vision_inputs[int(digest.content_digest)].kind == 1 else 991}
