"""The gateway's gRPC service, `echovlm.v1.EchoVLM`: messages to `serving.core`, and its events back."""

from collections.abc import AsyncGenerator, Iterator
from contextlib import AbstractContextManager, aclosing, nullcontext
from typing import Any

import grpc

from echovlm_ray.config import GatewaySection, RouterSection
from echovlm_ray.errors import InvalidRequestError
from echovlm_ray.serving.core.caller import current_caller
from echovlm_ray.serving.core.parts import GenerateParts
from echovlm_ray.serving.core.request import Accepted, Event, GenerateRequest, SamplingOptions, Summary, Text
from echovlm_ray.serving.core.session import GenerateSession
from echovlm_ray.serving.grpc.received_bytes import current_receipt
from echovlm_ray.serving.grpc.request_id import current_request_id, request_id_of
from echovlm_ray.serving.grpc.server import MESSAGE_SLACK_BYTES, ServerOptions
from echovlm_ray.tasks import TASKS, language_of, task_of
from protos import echovlm_pb2, echovlm_pb2_grpc

# The methods that take a place among `gateway.max_requests`.
GENERATING = ("Generate", "GenerateStream")


def server_options(gateway: GatewaySection, router: RouterSection) -> ServerOptions:
    """What the server listens on that clients call, and its limits. `router` says how long an answer may take."""
    return ServerOptions(
        gateway.host,
        gateway.port,
        gateway.tls,
        gateway.token_file,
        max_receive_bytes=gateway.max_request_bytes + MESSAGE_SLACK_BYTES,
        max_received_bytes=gateway.max_received_bytes,
        idle_s=gateway.default_deadline_s,
        call_limit_s=gateway.default_deadline_s,
        connection_s=gateway.max_connection_s,
        connection_grace_s=max(gateway.default_deadline_s, router.max_request_s),
        caller_names=frozenset(gateway.quotas),
    )


class GatewayService(echovlm_pb2_grpc.EchoVLMServicer):
    """Adapts the sessions of a gateway to gRPC."""

    def __init__(self, parts: GenerateParts) -> None:
        """Takes what the sessions share."""
        self._parts = parts

    def admit(self, method: str) -> AbstractContextManager[None]:
        """The place of a call of a method, to be taken before its message is read; see `serving.interceptor`."""
        return self._parts.place(current_caller()) if method.rpartition("/")[2] in GENERATING else nullcontext()

    async def Generate(
        self, request: echovlm_pb2.GenerateRequest, context: "grpc.aio.ServicerContext[Any, Any]"
    ) -> echovlm_pb2.GenerateResponse:
        """The whole answer at once."""
        response = echovlm_pb2.GenerateResponse()
        pieces = []
        session = self._session(request, context)
        del request
        async with aclosing(session.events()) as events:
            async for event in events:
                if isinstance(event, Text):
                    pieces.append(event.text)
                elif isinstance(event, Summary):
                    response.summary.CopyFrom(_summary_to_proto(event))
        response.text = "".join(pieces)
        return response

    async def GenerateStream(
        self, request: echovlm_pb2.GenerateRequest, context: "grpc.aio.ServicerContext[Any, Any]"
    ) -> AsyncGenerator[echovlm_pb2.GenerateEvent, None]:
        """The answer while it is written; a caller that leaves ends it everywhere."""
        session = self._session(request, context)
        del request
        async with aclosing(session.events()) as events:
            async for event in events:
                yield _event_to_proto(event)

    async def GetModelInfo(
        self, request: echovlm_pb2.GetModelInfoRequest, context: "grpc.aio.ServicerContext[Any, Any]"
    ) -> echovlm_pb2.ModelInfo:
        """What is served, and what a request may hold."""
        parts = self._parts
        model, gateway, router = parts.describe(), parts.gateway, parts.limits
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
                max_images=gateway.max_images,
                max_image_bytes=gateway.max_image_bytes,
                max_image_pixels=gateway.max_image_pixels,
                max_frames=gateway.max_frames,
                max_prompt_tokens=router.max_prompt_tokens,
                max_new_tokens=router.max_new_tokens,
            ),
            default_organ=model.default_organ,
            description=model.description,
        )

    def _session(
        self, message: echovlm_pb2.GenerateRequest, context: "grpc.aio.ServicerContext[Any, Any]"
    ) -> GenerateSession:
        return GenerateSession(
            self._parts,
            request_from_proto(message),
            caller=current_caller(),
            request_id=current_request_id() or request_id_of(context.invocation_metadata() or ()),
            deadline_s=context.time_remaining(),
        )


class _MessageImages:
    """The files of a message. It is freed with the last one: protobuf frees nothing of a message before all of it."""

    def __init__(self, message: echovlm_pb2.GenerateRequest) -> None:
        self._message = message

    def __len__(self) -> int:
        return len(self._message.images)

    def __iter__(self) -> Iterator[bytes]:
        for index in range(len(self)):
            yield self._message.images[index].content
        self._message = echovlm_pb2.GenerateRequest()
        current_receipt().release()


def request_from_proto(message: echovlm_pb2.GenerateRequest) -> GenerateRequest:
    """The request of a message; it keeps the message until its images are taken.

    Raises:
        InvalidRequestError: its task or its language is none.
    """
    task = task_of(message.task)
    if task is None:
        names = ", ".join(known.label for known in TASKS.values() if known.value != echovlm_pb2.TASK_UNSPECIFIED)
        raise InvalidRequestError("task", f"{message.task} is no task; use one of {names}, or a prompt alone")
    language = language_of(message.language)
    if language is None:
        raise InvalidRequestError(
            "language", f"{message.language} is no language; use LANGUAGE_ENGLISH or LANGUAGE_CHINESE"
        )
    sampling = message.sampling
    return GenerateRequest(
        task=task,
        language=language,
        prompt=message.prompt,
        images=_MessageImages(message),
        organs=tuple(message.organs),
        sampling=SamplingOptions(
            sampling.temperature,
            sampling.top_k,
            sampling.top_p,
            sampling.repetition_penalty,
            sampling.seed if sampling.HasField("seed") else None,
        ),
        max_new_tokens=message.max_new_tokens,
        stop=tuple(message.stop),
        session_key=message.session_key,
        expert_set_id=message.expert_set_id,
        for_replay=message.for_replay,
        prompt_digest=message.prompt_digest,
    )


def _event_to_proto(event: Event) -> echovlm_pb2.GenerateEvent:
    match event:
        case Accepted(prompt_tokens, visual_tokens, frames):
            accepted = echovlm_pb2.RequestAccepted(
                prompt_tokens=prompt_tokens, visual_tokens=visual_tokens, frames=frames
            )
            return echovlm_pb2.GenerateEvent(accepted=accepted)
        case Text(text):
            return echovlm_pb2.GenerateEvent(text=text)
        case Summary():
            return echovlm_pb2.GenerateEvent(summary=_summary_to_proto(event))


def _summary_to_proto(summary: Summary) -> echovlm_pb2.GenerateSummary:
    return echovlm_pb2.GenerateSummary(
        request_id=summary.request_id,
        finish_reason=summary.finish_reason,
        prompt_tokens=summary.prompt_tokens,
        completion_tokens=summary.completion_tokens,
        provenance=summary.provenance,
        notices=summary.notices,
        token_ids=summary.token_ids,
        prompt_digest=summary.prompt_digest,
    )
