"""The vision encoder: the reference's embeddings in every batch, each picture once."""

import asyncio
import dataclasses
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from google.rpc import error_details_pb2
from safetensors.torch import load_file

from echovlm_ray.engine.vision_encoder import EmbeddingCache, EncodedInput, EncoderInput, VisionEncoder, content_digest
from echovlm_ray.errors import InvalidRequestError, OverloadedError
from echovlm_ray.model.checkpoint import load_vision_tower
from echovlm_ray.model.vision_tower import EchoVLMVisionTower
from echovlm_ray.serving.grpc.errors import to_status
from echovlm_ray.serving.vision.service import VisionEncoderService
from experts.transport.codec import tensor_from_proto, tensor_to_proto
from protos import tensor_pb2, vision_pb2, vision_pb2_grpc
from tests.serving.gateway_system import served

IMAGE, VIDEO = vision_pb2.VISION_KIND_IMAGE, vision_pb2.VISION_KIND_VIDEO
HIDDEN_BYTES = 64 * 4


@pytest.fixture(scope="module")
def tower(golden_dir: Path) -> EchoVLMVisionTower:
    return load_vision_tower(golden_dir / "base" / "checkpoint")


def encoder(tower: EchoVLMVisionTower, **options: Any) -> VisionEncoder:
    return VisionEncoder(
        tower, "d" * 64, **{"cache_bytes": 10**6, "max_batch_patches": 4096, "max_queue": 16, **options}
    )


def item(seed: int, grid: tuple[int, int, int] = (1, 4, 6)) -> EncoderInput:
    patches = torch.randn(grid[0] * grid[1] * grid[2], 1176, generator=torch.Generator().manual_seed(seed))
    return EncoderInput(grid, patches)


@asynccontextmanager
async def closing(each: VisionEncoder) -> AsyncIterator[VisionEncoder]:
    try:
        yield each
    finally:
        await each.close()


def of(caller: bytes, seed: int) -> EncoderInput:
    return dataclasses.replace(item(seed), caller=caller)


class Gate:
    """Holds an encoder's thread before its forward pass, and counts the passes and their inputs."""

    def __init__(self, each: VisionEncoder) -> None:
        self.batches: list[int] = []
        self.open = threading.Event()
        self.entered = threading.Event()
        self._forward: Callable[[Any], Any] = each._forward
        each._forward = self._held  # type: ignore[method-assign]

    def _held(self, items: Any) -> Any:
        self.batches.append(len(items))
        self.entered.set()
        assert self.open.wait(10)
        return self._forward(items)

    async def until_entered(self) -> None:
        assert await asyncio.to_thread(self.entered.wait, 10)


async def test_embeddings_are_those_of_the_reference(tower: EchoVLMVisionTower, golden_dir: Path) -> None:
    golden = load_file(golden_dir / "base" / "video_and_image.safetensors")
    image = EncoderInput(tuple(golden["in.image_grid_thw"][0].tolist()), golden["in.pixel_values"])
    single = load_file(golden_dir / "base" / "one_image.safetensors")
    other = EncoderInput(tuple(single["in.image_grid_thw"][0].tolist()), single["in.pixel_values"])
    video = EncoderInput(tuple(golden["in.video_grid_thw"][0].tolist()), golden["in.pixel_values_videos"])
    async with closing(encoder(tower)) as each:
        encoded = await each.encode([other, image, video])
    torch.testing.assert_close(encoded[0].embedding, single["mid.vis.merger"], rtol=0, atol=2e-5)
    assert encoded[1].embedding.shape == (len(image.patches) // 4, 64)
    # The inputs of the language model hold both embeddings, in the places of their tokens.
    embeddings = golden["mid.inputs_embeds"][0]
    for encoded_item in encoded[1:]:
        for row in encoded_item.embedding:
            assert (embeddings - row).abs().amax(-1).min() < 2e-5


async def test_neighbours_in_a_batch_change_nothing(tower: EchoVLMVisionTower) -> None:
    items = [item(0), item(1, (1, 10, 4)), item(2, (2, 4, 6)), item(3, (1, 2, 2))]
    async with closing(encoder(tower, cache_bytes=0)) as each:
        together = await each.encode(items)
        for one, expected in zip(items, together, strict=True):
            (alone,) = await each.encode([one])
            assert alone.content_digest == expected.content_digest
            assert torch.equal(alone.embedding, expected.embedding)


async def test_the_cache_answers_the_second_time(tower: EchoVLMVisionTower) -> None:
    async with closing(encoder(tower)) as each:
        first, twin = await each.encode([item(0), item(0)])
        again, new = await each.encode([item(0), item(1)])
    assert (first.cached, twin.cached, again.cached, new.cached) == (False, False, True, False)
    assert torch.equal(first.embedding, again.embedding)


def test_digests_tell_encoder_grid_and_content_apart() -> None:
    same = item(0)
    changed = EncoderInput(same.grid, same.patches.clone())
    changed.patches[-1, -1] += 1e-6
    digests = {
        content_digest("a", same),
        content_digest("b", same),
        content_digest("a", EncoderInput((1, 6, 4), same.patches)),
        content_digest("a", changed),
        content_digest("a", EncoderInput(same.grid, same.patches, b"another caller")),
    }
    assert len(digests) == 5
    assert content_digest("a", same) == content_digest("a", EncoderInput(same.grid, same.patches.clone()))


def test_the_cache_is_bounded_and_drops_what_was_not_used() -> None:
    cache = EmbeddingCache(3 * HIDDEN_BYTES)
    for name in "abc":
        cache.put(name, torch.zeros(1, 64))
    assert cache.get("a") is not None
    cache.put("d", torch.zeros(1, 64))
    assert [name for name in "abcd" if cache.get(name) is not None] == ["a", "c", "d"]
    cache.put("large", torch.zeros(4, 64))
    assert cache.get("large") is None
    cache.put("two", torch.zeros(2, 64))
    assert cache.num_bytes == 3 * HIDDEN_BYTES
    cache.put("two", torch.zeros(2, 64))
    assert cache.num_bytes == 3 * HIDDEN_BYTES


async def test_what_arrives_meanwhile_is_one_batch_and_the_same_picture_once(tower: EchoVLMVisionTower) -> None:
    async with closing(encoder(tower)) as each:
        gate = Gate(each)
        first = asyncio.create_task(each.encode([item(0)]))
        await gate.until_entered()
        others = [asyncio.create_task(each.encode([item(seed % 3)])) for seed in range(6)]
        while each.queue_length < 3:
            await asyncio.sleep(0.001)
        gate.open.set()
        results = await asyncio.gather(first, *others)
    assert gate.batches == [1, 2]
    assert len({result[0].content_digest for result in results}) == 3


async def test_batches_stay_within_their_limit(tower: EchoVLMVisionTower) -> None:
    async with closing(encoder(tower, max_batch_patches=50)) as each:
        gate = Gate(each)
        gate.open.set()
        assert len(await each.encode([item(seed) for seed in range(5)])) == 5
        assert gate.batches == [2, 2, 1]
        with pytest.raises(InvalidRequestError, match=r"inputs\[1\]\.patches: has 96 patches and the limit is 50"):
            await each.encode([item(0), item(1, (1, 8, 12))])


async def test_a_full_queue_refuses_and_those_who_leave_make_room(tower: EchoVLMVisionTower) -> None:
    async with closing(encoder(tower, max_queue=2)) as each:
        gate = Gate(each)
        running = asyncio.create_task(each.encode([item(0)]))
        await gate.until_entered()
        leaving = asyncio.create_task(each.encode([item(1), item(2)]))
        staying = asyncio.create_task(each.encode([item(2)]))
        while each.queue_length < 3:
            await asyncio.sleep(0.001)
        with pytest.raises(OverloadedError, match=r"vision\.max_queue"):
            await each.encode([item(3)])
        leaving.cancel()
        await asyncio.wait([leaving])
        assert each.queue_length == 2
        waiting = asyncio.create_task(each.encode([item(3)]))
        while each.queue_length < 3:
            await asyncio.sleep(0.001)
        gate.open.set()
        results: tuple[list[EncodedInput], ...] = await asyncio.gather(running, staying, waiting)
        assert all(result[0].embedding.isfinite().all() for result in results)
        assert each.queue_length == 0
    assert sum(gate.batches) == 3


async def test_a_failed_pass_fails_its_own_callers_only(tower: EchoVLMVisionTower) -> None:
    async with closing(encoder(tower)) as each:
        with pytest.raises(RuntimeError):
            await each.encode([EncoderInput((1, 4, 6), torch.zeros(24, 5))])
        assert each.queue_length == 0
        assert len(await each.encode([item(0)])) == 1


def message(kind: Any = IMAGE, grid: tuple[int, int, int] = (1, 4, 6), **fields: Any) -> vision_pb2.VisionInput:
    patches = fields.pop("patches", None)
    if patches is None:
        patches = tensor_to_proto(item(0, grid).patches if all(grid) else torch.zeros(0, 1176))
    grid_t, grid_h, grid_w = grid
    return vision_pb2.VisionInput(kind=kind, grid_t=grid_t, grid_h=grid_h, grid_w=grid_w, patches=patches)


@asynccontextmanager
async def service(each: VisionEncoder) -> AsyncIterator[Any]:
    register = vision_pb2_grpc.add_VisionEncoderServicer_to_server
    async with (
        served(register, VisionEncoderService(each), "echovlm.v1.VisionEncoder") as address,
        grpc.aio.insecure_channel(address) as channel,
    ):
        yield vision_pb2_grpc.VisionEncoderStub(channel)
    await each.close()


async def test_the_service_answers_in_order(tower: EchoVLMVisionTower) -> None:
    each = encoder(tower)
    async with service(each) as stub:
        request = vision_pb2.EncodeRequest(inputs=[message(), message(VIDEO, (2, 4, 6)), message()])
        response = await stub.Encode(request, timeout=10)
        again = await stub.Encode(request, timeout=10)
    assert response.encoder_digest == "d" * 64
    assert [list(found.embedding.shape) for found in response.embeddings] == [[6, 64], [12, 64], [6, 64]]
    assert [found.cached for found in again.embeddings] == [True, True, True]
    (expected,) = await encoder(tower).encode([item(0)])
    assert response.embeddings[0].content_digest == expected.content_digest
    assert torch.equal(tensor_from_proto(response.embeddings[2].embedding), expected.embedding)


SHORT = tensor_pb2.Tensor(dtype=tensor_pb2.DATA_TYPE_FLOAT32, shape=[24, 1176], data=b"\0" * 8)
BAD = [
    ([], "inputs"),
    ([message(vision_pb2.VISION_KIND_UNSPECIFIED)], "inputs[0].kind"),
    ([message(99)], "inputs[0].kind"),
    ([message(), message(IMAGE, (2, 4, 6))], "inputs[1].grid_t"),
    ([message(IMAGE, (1, 0, 6))], "inputs[0]"),
    ([message(IMAGE, (1, 3, 6))], "inputs[0]"),
    ([message(VIDEO, (0, 4, 6))], "inputs[0]"),
    ([message(patches=tensor_to_proto(torch.zeros(23, 1176)))], "inputs[0].patches"),
    ([message(patches=tensor_to_proto(torch.zeros(24, 1175)))], "inputs[0].patches"),
    ([message(patches=tensor_to_proto(torch.zeros(24, 1176, dtype=torch.float16)))], "inputs[0].patches"),
    ([message(patches=tensor_to_proto(torch.full((24, 1176), torch.nan)))], "inputs[0].patches"),
    ([message(patches=SHORT)], "inputs[0].patches"),
    ([message(IMAGE, (1, 8, 12))], "inputs[0].patches"),
]


async def test_bad_inputs_are_named(tower: EchoVLMVisionTower) -> None:
    async with service(encoder(tower, max_batch_patches=50)) as stub:
        for inputs, field in BAD:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.Encode(vision_pb2.EncodeRequest(inputs=inputs), timeout=10)
            assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT, (field, caught.value.details())
            bad = error_details_pb2.BadRequest()
            assert to_status(caught.value).details[0].Unpack(bad)
            assert bad.field_violations[0].field == field


async def test_callers_whose_time_is_up_leave_the_queue(tower: EchoVLMVisionTower) -> None:
    each = encoder(tower)
    async with service(each) as stub:
        gate = Gate(each)
        running = stub.Encode(vision_pb2.EncodeRequest(inputs=[message()]), timeout=10)
        await gate.until_entered()
        late = vision_pb2.EncodeRequest(inputs=[message(VIDEO, (2, 4, 6))])
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Encode(late, timeout=0.3)
        assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        async with asyncio.timeout(5):
            while each.queue_length > 1:
                await asyncio.sleep(0.01)
        gate.open.set()
        await running
    assert gate.batches == [1]


async def test_an_input_is_not_computed_beside_many_of_another_caller(tower: EchoVLMVisionTower) -> None:
    async with closing(encoder(tower, max_batch_patches=24 * 16)) as each:
        gate = Gate(each)
        flood = [asyncio.create_task(each.encode([of(b"flood", 0)]))]
        await gate.until_entered()
        flood += [asyncio.create_task(each.encode([of(b"flood", seed)])) for seed in range(1, 8)]
        while each.queue_length < 8:
            await asyncio.sleep(0)
        other = asyncio.create_task(each.encode([of(b"other", 100)]))
        while each.queue_length < 9:
            await asyncio.sleep(0)
        gate.open.set()
        await other
        assert len(gate.batches) <= 4
        await asyncio.gather(*flood)
        assert set(gate.batches) == {1}
        # The other one may come back.
        await asyncio.gather(*[each.encode([of(b"flood", seed)]) for seed in range(20, 24)])
        assert set(gate.batches) == {1}


async def test_callers_with_many_inputs_leave_places_in_the_queue(tower: EchoVLMVisionTower) -> None:
    async with closing(encoder(tower, max_queue=8)) as each:
        gate = Gate(each)
        first = asyncio.create_task(each.encode([of(b"a", 0)]))
        await gate.until_entered()
        waiting = [asyncio.create_task(each.encode([of(b"ab"[seed % 2 :][:1], seed)])) for seed in range(1, 7)]
        while each.queue_length < 7:
            await asyncio.sleep(0)
        for caller in (b"a", b"b"):
            with pytest.raises(OverloadedError, match="the last 2 places are for callers of which none waits"):
                await each.encode([of(caller, 50)])
        other = asyncio.create_task(each.encode([of(b"c", 60), of(b"c", 61)]))
        gate.open.set()
        assert len(await other) == 2
        await asyncio.gather(first, *waiting)
