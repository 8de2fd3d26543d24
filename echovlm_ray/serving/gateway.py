"""The gateway's gRPC service: image files and a task in, text out. The only part that callers see."""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, aclosing, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import grpc

from echovlm_ray.config import GatewaySection, RouterSection
from echovlm_ray.errors import DeadlineError, InvalidRequestError, OverloadedError, TextUnavailableError
from echovlm_ray.fair_queue import FairThreads
from echovlm_ray.model.processing import EchoVLMProcessor, VisionPatches
from echovlm_ray.prompts import Medium, build_messages
from echovlm_ray.serving.caller import current_caller
from echovlm_ray.serving.prompt_identity import check_prompt, prompt_digest
from echovlm_ray.serving.quotas import Quotas
from echovlm_ray.serving.received_bytes import current_receipt
from echovlm_ray.serving.request_checks import CheckedRequest, check_request
from echovlm_ray.serving.request_id import current_request_id, request_id_of
from echovlm_ray.serving.router_client import RouterClient
from echovlm_ray.serving.server import MESSAGE_SLACK_BYTES, ServerOptions
from echovlm_ray.serving.text_stream import Detokenizer, StopStrings
from echovlm_ray.vision.decoding.pool import DecoderPool
from echovlm_ray.vision.decoding.settings import DecoderSettings
from echovlm_ray.vision.images import DecodedImage, ImageLimits
from protos import echovlm_pb2, echovlm_pb2_grpc, router_pb2, tensor_pb2, vision_pb2

# Text and pictures have threads of their own, so that no text waits for a picture. The longest prompt takes seconds to
# cut into tokens, so no caller gets all of those for text.
TEXT_THREADS = 3
# The methods that take a place among `gateway.max_requests`.
GENERATING = ("Generate", "GenerateStream")
NOT_A_DEVICE = "EchoVLM-Ray is not a medical device: nothing it writes is a diagnosis."


@dataclass(frozen=True, slots=True)
class OrganDescription:
    """An organ that is served, and the live version of its experts."""

    organ: str
    bundle_version: str
    bundle_digest: str
    num_experts: int


@dataclass(frozen=True, slots=True)
class ModelDescription:
    """What the gateway says about the model.

    Attributes:
        description: what it is for and what it is not for.
        notices: sent with every answer, for example that the demo's text means nothing.
        policy_version: of Control's policy that it describes; 0 before the first one.
    """

    name: str
    version: str
    description: str
    backbone_digest: str
    expert_set_id: str
    organs: tuple[OrganDescription, ...]
    default_organ: str
    notices: tuple[str, ...] = ()
    policy_version: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class _Prepared:
    """A request as the router takes it, and what the caller is told about it."""

    router_request: router_pb2.RouterGenerateRequest
    accepted: echovlm_pb2.RequestAccepted
    notices: tuple[str, ...]


def server_options(gateway: GatewaySection) -> ServerOptions:
    """What the server listens on that clients call, and its limits."""
    return ServerOptions(
        gateway.host,
        gateway.port,
        gateway.tls,
        gateway.token_file,
        max_receive_bytes=gateway.max_request_bytes + MESSAGE_SLACK_BYTES,
        max_received_bytes=gateway.max_received_bytes,
        idle_s=gateway.default_deadline_s,
        call_limit_s=gateway.default_deadline_s,
    )


class GatewayService(echovlm_pb2_grpc.EchoVLMServicer):
    """Serves `echovlm.v1.EchoVLM`."""

    def __init__(
        self,
        processor: EchoVLMProcessor | None,
        router: RouterClient,
        describe: Callable[[], ModelDescription],
        *,
        gateway: GatewaySection,
        limits: RouterSection,
    ) -> None:
        """Takes its parts.

        Args:
            processor: of the served checkpoint; None where it has no tokenizer, and then every request is refused.
            router: where tokens come from.
            describe: what is served at this moment.
            gateway: the limits of images and of requests under way.
            limits: the limits of tokens.
        """
        self._processor = processor
        self._router = router
        self._describe = describe
        self._gateway = gateway
        self._limits = limits
        self._decoders = None if processor is None else _decoder_pool(processor, gateway)
        self._quotas = Quotas(gateway.quota, gateway.quotas, gateway.max_requests)
        self._under_way = 0
        self._text_threads = _threads("text", TEXT_THREADS, TEXT_THREADS - 1)
        self._picture_threads = _threads("picture", gateway.decoders.processes)

    @property
    def queue_length(self) -> int:
        """Requests under way, for status."""
        return self._under_way

    @property
    def decoders(self) -> DecoderPool | None:
        """The processes that decode; None where every request is refused."""
        return self._decoders

    async def start(self) -> None:
        """Starts the decoders. To be called once, before the first request.

        Raises:
            PartUnavailableError: they cannot be started.
        """
        if self._decoders is not None:
            await self._decoders.start()

    async def close(self) -> None:
        """Ends the decoders and the threads."""
        if self._decoders is not None:
            await self._decoders.close()
        for threads in (self._text_threads, self._picture_threads):
            threads.shutdown()

    async def Generate(
        self, request: echovlm_pb2.GenerateRequest, context: "grpc.aio.ServicerContext[Any, Any]"
    ) -> echovlm_pb2.GenerateResponse:
        """The whole answer at once."""
        response = echovlm_pb2.GenerateResponse()
        pieces = []
        answer = self._answer(_Files(request), context)
        del request
        async with aclosing(answer) as events:
            async for event in events:
                if event.WhichOneof("event") == "text":
                    pieces.append(event.text)
                elif event.WhichOneof("event") == "summary":
                    response.summary.CopyFrom(event.summary)
        response.text = "".join(pieces)
        return response

    async def GenerateStream(
        self, request: echovlm_pb2.GenerateRequest, context: "grpc.aio.ServicerContext[Any, Any]"
    ) -> AsyncGenerator[echovlm_pb2.GenerateEvent, None]:
        """The answer while it is written; a caller that leaves ends it everywhere."""
        answer = self._answer(_Files(request), context)
        del request
        async with aclosing(answer) as events:
            async for event in events:
                yield event

    async def GetModelInfo(
        self, request: echovlm_pb2.GetModelInfoRequest, context: "grpc.aio.ServicerContext[Any, Any]"
    ) -> echovlm_pb2.ModelInfo:
        """What is served, and what a request may hold."""
        model = self._describe()
        return echovlm_pb2.ModelInfo(
            name=model.name,
            version=model.version,
            backbone_digest=model.backbone_digest,
            expert_set_id=model.expert_set_id,
            organs=[
                echovlm_pb2.OrganInfo(
                    organ=organ.organ,
                    bundle_version=organ.bundle_version,
                    bundle_digest=organ.bundle_digest,
                    num_experts=organ.num_experts,
                )
                for organ in model.organs
            ],
            limits=echovlm_pb2.Limits(
                max_images=self._gateway.max_images,
                max_image_bytes=self._gateway.max_image_bytes,
                max_image_pixels=self._gateway.max_image_pixels,
                max_frames=self._gateway.max_frames,
                max_prompt_tokens=self._limits.max_prompt_tokens,
                max_new_tokens=self._limits.max_new_tokens,
            ),
            default_organ=model.default_organ,
            description=model.description,
        )

    async def _answer(
        self, files: "_Files", context: "grpc.aio.ServicerContext[Any, Any]"
    ) -> AsyncGenerator[echovlm_pb2.GenerateEvent, None]:
        self._text_processor()
        deadline = time.monotonic() + self._seconds_left(context)
        request_id = current_request_id() or request_id_of(context.invocation_metadata() or ())
        checked = check_request(files.request, self._gateway, self._limits)
        prepared = await self._prepare(files, checked, deadline, request_id)
        self._quotas.charge(current_caller(), prepared.accepted.prompt_tokens)
        yield echovlm_pb2.GenerateEvent(accepted=prepared.accepted)
        async with aclosing(self._write(prepared, checked, deadline, request_id)) as events:
            async for event in events:
                yield event

    def _text_processor(self) -> EchoVLMProcessor:
        if self._processor is None:
            raise TextUnavailableError(
                "the served checkpoint has no tokenizer or no image processor, so it can only be called with token "
                "ids, at the router: copy those files into its backbone/ folder and serve again"
            )
        return self._processor

    def admit(self, method: str) -> AbstractContextManager[None]:
        """The place of a call of a method, to be taken before its message is read; see `serving.interceptor`."""
        return self._place() if method.rpartition("/")[2] in GENERATING else nullcontext()

    @contextmanager
    def _place(self) -> Iterator[None]:
        if self._under_way >= self._gateway.max_requests:
            raise OverloadedError(
                f"{self._under_way} requests are under way and that is the limit (gateway.max_requests): "
                "send the request again a little later"
            )
        with self._quotas.place(current_caller()):
            self._under_way += 1
            try:
                yield
            finally:
                self._under_way -= 1

    def _seconds_left(self, context: "grpc.aio.ServicerContext[Any, Any]") -> float:
        remaining: float | None = context.time_remaining()
        return self._gateway.default_deadline_s if remaining is None else remaining

    async def _prepare(self, files: "_Files", checked: CheckedRequest, deadline: float, request_id: str) -> _Prepared:
        """Decodes and cuts up the images one after the other, so that no caller takes all decoders; then the prompt.

        Then nothing needs the request any more.
        """
        try:
            async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                images = []
                for index in range(len(files.request.images)):
                    field = f"images[{index}].content"
                    images.append(await self._load_image(files.request.images[index].content, field, request_id))
                sampling = router_pb2.Sampling()
                sampling.CopyFrom(files.request.sampling)
                files.forget()
                caller = current_caller().id
                return await self._text_threads.run(caller, self._build, checked, sampling, images, caller)
        except TimeoutError:
            raise DeadlineError("the deadline passed while the images were decoded") from None

    async def _load_image(self, content: bytes, field: str, request_id: str) -> "_LoadedImage":
        assert self._decoders is not None
        caller = current_caller().id
        decoded = await self._decoders.decode(content, field=field, request_id=request_id, caller=caller)
        return await self._picture_threads.run(caller, self._cut, decoded)

    def _cut(self, decoded: DecodedImage) -> "_LoadedImage":
        frames = decoded.frames if decoded.is_video else decoded.frames[:1]
        patches = self._text_processor().scaled_patches(frames, is_video=decoded.is_video)
        return _LoadedImage(_ImageNote.of(decoded), patches, _to_proto(patches))

    def _build(
        self,
        checked: CheckedRequest,
        sampling: router_pb2.Sampling,
        images: Sequence["_LoadedImage"],
        caller: bytes,
    ) -> _Prepared:
        vision = [image.patches for image in images]
        media: list[Medium] = ["video" if item.is_video else "image" for item in vision]
        messages = build_messages(checked.task, checked.language, checked.prompt, media)
        input_ids = self._text_processor().encode_chat(messages, vision)
        check_prompt(input_ids, checked.prompt_digest)
        visual_tokens = sum(item.num_tokens for item in vision)
        if len(input_ids) > self._limits.max_prompt_tokens:
            raise InvalidRequestError(
                "images" if visual_tokens > len(input_ids) - visual_tokens else "prompt",
                f"the request takes {len(input_ids)} tokens, {visual_tokens} for the images and "
                f"{len(input_ids) - visual_tokens} for text, and the limit is {self._limits.max_prompt_tokens} "
                "(router.max_prompt_tokens): send fewer images or a shorter prompt",
            )
        terms = dict.fromkeys(term for image in images for term in image.note.anatomy_terms)
        router_request = router_pb2.RouterGenerateRequest(
            input_ids=input_ids,
            vision_inputs=[image.vision_input for image in images],
            organ_hints=router_pb2.OrganHints(organs=checked.organs, anatomy_terms=terms),
            sampling=sampling,
            max_new_tokens=checked.max_new_tokens,
            session_key=checked.session_key,
            policy_version=self._describe().policy_version,
            expert_set_id=checked.expert_set_id,
            cache_salt=caller if self._gateway.share_caches == "token" else b"",
            caller=caller,
        )
        accepted = echovlm_pb2.RequestAccepted(
            prompt_tokens=len(input_ids),
            visual_tokens=visual_tokens,
            frames=[image.note.frames_taken for image in images],
        )
        notices = tuple(
            f"images[{index}]: {notice}" for index, image in enumerate(images) for notice in image.note.notices
        )
        return _Prepared(router_request, accepted, notices)

    async def _write(
        self, prepared: _Prepared, checked: CheckedRequest, deadline: float, request_id: str
    ) -> AsyncGenerator[echovlm_pb2.GenerateEvent, None]:
        """Turns the router's tokens into text events, then sends the summary."""
        summary = echovlm_pb2.GenerateSummary(request_id=request_id, prompt_tokens=prepared.accepted.prompt_tokens)
        if checked.for_replay:
            summary.prompt_digest = prompt_digest(prepared.router_request.input_ids)
        characters, stop = Detokenizer(self._text_processor().decode), StopStrings(checked.stop)
        messages = self._router.generate(prepared.router_request, deadline=deadline, request_id=request_id)
        async with aclosing(messages):
            async for message in messages:
                summary.completion_tokens += len(message.token_ids)
                self._quotas.charge(current_caller(), len(message.token_ids))
                if checked.for_replay:
                    summary.token_ids.extend(message.token_ids)
                if message.HasField("provenance"):
                    summary.provenance.CopyFrom(message.provenance)
                if message.HasField("summary"):
                    summary.provenance.CopyFrom(message.summary.provenance)
                    summary.finish_reason = message.summary.finish_reason
                if piece := stop.push(characters.push(message.token_ids)):
                    yield echovlm_pb2.GenerateEvent(text=piece)
                if stop.stopped:
                    break
        if not stop.stopped and (piece := stop.push(characters.finish()) + stop.finish()):
            yield echovlm_pb2.GenerateEvent(text=piece)
        if stop.stopped:
            summary.finish_reason = router_pb2.FINISH_REASON_STOP
        summary.notices.extend(self._notices(prepared, summary.provenance.organ_source))
        yield echovlm_pb2.GenerateEvent(summary=summary)

    def _notices(self, prepared: _Prepared, organ_source: router_pb2.OrganSource) -> list[str]:
        model = self._describe()
        notices = list(prepared.notices)
        if organ_source == router_pb2.ORGAN_SOURCE_DEFAULT:
            notices.append(
                f"Which organ the images show was not known, so the experts of {model.default_organ!r} answered; "
                "name it in `organs`."
            )
        return [*notices, *model.notices, NOT_A_DEVICE]


class _Files:
    """A caller's request, for as long as its files are needed: protobuf frees nothing of a message before all of it."""

    def __init__(self, request: echovlm_pb2.GenerateRequest) -> None:
        self.request = request

    def forget(self) -> None:
        """Frees it, where nothing else holds it."""
        self.request = echovlm_pb2.GenerateRequest()
        current_receipt().release()


@dataclass(frozen=True, slots=True)
class _ImageNote:
    """What is still needed of a decoded image once its pixels are cut into patches and gone."""

    frames_taken: int
    anatomy_terms: tuple[str, ...]
    notices: tuple[str, ...]

    @classmethod
    def of(cls, image: DecodedImage) -> "_ImageNote":
        notices = image.notices
        if image.frames_taken < image.source_frames:
            spread = f"{image.frames_taken} of its {image.source_frames} frames were looked at, evenly spread."
            notices = (spread, *notices)
        return cls(image.frames_taken, image.anatomy_terms, notices)


@dataclass(frozen=True, slots=True, eq=False)
class _LoadedImage:
    """An image that is decoded and cut into patches."""

    note: _ImageNote
    patches: VisionPatches
    vision_input: vision_pb2.VisionInput


def _threads(name: str, count: int, most_of_one: int | None = None) -> FairThreads:
    return FairThreads(ThreadPoolExecutor(count, thread_name_prefix=name), count, most_of_one)


def _decoder_pool(processor: EchoVLMProcessor, gateway: GatewaySection) -> DecoderPool:
    limits = ImageLimits(
        max_image_bytes=gateway.max_image_bytes,
        max_image_pixels=gateway.max_image_pixels,
        max_frames=gateway.max_frames,
        crop_to_regions=gateway.crop_to_regions,
    )
    scaling = processor.scaling(gateway.max_visual_tokens)
    settings = DecoderSettings(limits, scaling, gateway.decoders.max_memory_bytes)
    return DecoderPool(settings, processes=gateway.decoders.processes, max_cpu_s=gateway.decoders.max_cpu_s)


def _to_proto(item: VisionPatches) -> vision_pb2.VisionInput:
    kind = vision_pb2.VISION_KIND_VIDEO if item.is_video else vision_pb2.VISION_KIND_IMAGE
    grid_t, grid_h, grid_w = item.grid
    patches = tensor_pb2.Tensor(
        dtype=tensor_pb2.DATA_TYPE_FLOAT32,
        shape=item.patches.shape,
        data=item.patches.astype("<f4", copy=False).tobytes(),
    )
    return vision_pb2.VisionInput(kind=kind, grid_t=grid_t, grid_h=grid_h, grid_w=grid_w, patches=patches)
