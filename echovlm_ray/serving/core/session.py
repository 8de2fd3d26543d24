"""One request from its images and its task to the text of the answer, for any transport."""

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from google.rpc import code_pb2

from echovlm_ray.errors import DeadlineError, InvalidRequestError, MessageTooLargeError, PartUnavailableError
from echovlm_ray.events import Accepted, Text
from echovlm_ray.prompts import Medium, build_messages
from echovlm_ray.serving.core.caller import Caller
from echovlm_ray.serving.core.failures import PartRefusedError, failure_of
from echovlm_ray.serving.core.images import LoadedImage
from echovlm_ray.serving.core.parts import GenerateParts
from echovlm_ray.serving.core.prompt_identity import check_prompt, prompt_digest
from echovlm_ray.serving.core.request import Event, GenerateRequest, Summary
from echovlm_ray.serving.core.request_checks import check_request
from echovlm_ray.serving.core.text_stream import Detokenizer, StopStrings
from protos import router_pb2

# The system had no room, or a part of it was away: the caller is not charged for a prompt that was not answered.
NOT_SERVED = frozenset({code_pb2.RESOURCE_EXHAUSTED, code_pb2.UNAVAILABLE})
NOT_A_DEVICE = "EchoVLM-Ray is not a medical device: nothing it writes is a diagnosis."


@dataclass(frozen=True, slots=True, eq=False)
class _Prepared:
    """A request in the router's format, with the first event and the notices for its caller."""

    router_request: router_pb2.RouterGenerateRequest
    accepted: Accepted
    notices: tuple[str, ...]


class GenerateSession:
    """Answers one request. The transport must have admitted it with `GenerateParts.place`."""

    def __init__(
        self,
        parts: GenerateParts,
        request: GenerateRequest,
        *,
        caller: Caller,
        request_id: str,
        deadline_s: float | None = None,
    ) -> None:
        """Starts only the deadline.

        Args:
            parts: the gateway's shared parts.
            request: the unchecked request.
            caller: the identity of the caller.
            request_id: the id in the logs of all parts.
            deadline_s: the caller's timeout in seconds; None for `gateway.default_deadline_s`.
        """
        self._parts = parts
        self._request = request
        self._caller = caller
        self._request_id = request_id
        self._deadline = time.monotonic() + (parts.gateway.default_deadline_s if deadline_s is None else deadline_s)

    async def events(self) -> AsyncGenerator[Event, None]:
        """Yields `Accepted`, then text, then `Summary`. Closing the generator cancels the request in all parts.

        Raises:
            TextUnavailableError: the checkpoint has no tokenizer.
            InvalidRequestError: names the first invalid field, the problem and the allowed values.
            MessageTooLargeError: the files are too long together.
            PromptChangedError: the prompt differs from the given digest.
            DeadlineError: the deadline passed.
            PartUnavailableError: no router or no decoder answers now.
            PartRefusedError: the router refused the request or failed.
            ShuttingDownError: the gateway is shutting down.
        """
        parts = self._parts
        processor = parts.processor
        check_request(self._request, parts.gateway, parts.limits)
        prepared = await self._prepare()
        self._charge(prepared.accepted.prompt_tokens)
        yield prepared.accepted
        begun = False
        try:
            async with aclosing(self._write(prepared, Detokenizer(processor.decode))) as events:
                async for event in events:
                    begun = True
                    yield event
        except (PartRefusedError, PartUnavailableError) as error:
            if not begun and failure_of(error).code in NOT_SERVED:
                self._charge(-prepared.accepted.prompt_tokens)
            raise

    def _charge(self, num_tokens: int) -> None:
        self._parts.quotas.charge(self._caller, num_tokens)

    async def _prepare(self) -> _Prepared:
        try:
            async with asyncio.timeout(max(0.0, self._deadline - time.monotonic())):
                images = await self._load_images()
                return await self._parts.text_threads.run(self._caller.id, self._build, images)
        except TimeoutError:
            raise DeadlineError("the deadline passed while the images were decoded") from None

    async def _load_images(self) -> list[LoadedImage]:
        """Loads images one after the other, so that no caller occupies all decoders."""
        images, nbytes, limit = [], 0, self._parts.gateway.max_request_bytes
        for index, content in enumerate(self._request.images):
            nbytes += len(content)
            if nbytes > limit:
                # A transport refuses what is much longer before it reads it.
                raise MessageTooLargeError(
                    f"the files of the request have more than {limit} bytes together (gateway.max_request_bytes): send "
                    "fewer or smaller ones"
                )
            field = f"images[{index}].content"
            load = self._parts.images.load(content, field=field, request_id=self._request_id, caller=self._caller.id)
            images.append(await load)
        return images

    def _build(self, images: Sequence[LoadedImage]) -> _Prepared:
        request, parts = self._request, self._parts
        vision = [image.patches for image in images]
        media: list[Medium] = ["video" if item.is_video else "image" for item in vision]
        messages = build_messages(request.task.name, request.language, request.prompt, media)
        input_ids = parts.processor.encode_chat(messages, vision)
        check_prompt(input_ids, request.prompt_digest)
        visual_tokens = sum(item.num_tokens for item in vision)
        limit = parts.limits.max_prompt_tokens
        if len(input_ids) > limit:
            raise InvalidRequestError(
                "images" if visual_tokens > len(input_ids) - visual_tokens else "prompt",
                f"the request takes {len(input_ids)} tokens, {visual_tokens} for the images and "
                f"{len(input_ids) - visual_tokens} for text, and the limit is {limit} "
                "(router.max_prompt_tokens): send fewer images or a shorter prompt",
            )
        terms = dict.fromkeys(term for image in images for term in image.anatomy_terms)
        sampling = request.sampling
        router_request = router_pb2.RouterGenerateRequest(
            input_ids=input_ids,
            vision_inputs=[image.vision_input for image in images],
            organ_hints=router_pb2.OrganHints(organs=request.organs, anatomy_terms=terms),
            sampling=router_pb2.Sampling(
                temperature=sampling.temperature,
                top_k=sampling.top_k,
                top_p=sampling.top_p,
                repetition_penalty=sampling.repetition_penalty,
                seed=sampling.seed,
            ),
            max_new_tokens=request.max_new_tokens or parts.gateway.default_new_tokens,
            session_key=request.session_key,
            policy_version=parts.describe().policy_version,
            expert_set_id=request.expert_set_id,
            cache_salt=self._caller.id if parts.gateway.share_caches == "token" else b"",
            caller=self._caller.id,
        )
        accepted = Accepted(len(input_ids), visual_tokens, tuple(image.frames_taken for image in images))
        notices = tuple(f"images[{index}]: {notice}" for index, image in enumerate(images) for notice in image.notices)
        return _Prepared(router_request, accepted, notices)

    async def _write(self, prepared: _Prepared, characters: Detokenizer) -> AsyncGenerator[Event, None]:
        """Converts the router's tokens to text events, followed by the summary."""
        stop = StopStrings(self._request.stop)
        for_replay = self._request.for_replay
        num_tokens = 0
        token_ids: list[int] = []
        provenance, finish_reason = router_pb2.Provenance(), router_pb2.FINISH_REASON_UNSPECIFIED
        messages = self._parts.router.generate(
            prepared.router_request, deadline=self._deadline, request_id=self._request_id
        )
        async with aclosing(messages):
            async for message in messages:
                num_tokens += len(message.token_ids)
                self._charge(len(message.token_ids))
                if for_replay:
                    token_ids.extend(message.token_ids)
                if message.HasField("provenance"):
                    provenance = message.provenance
                if message.HasField("summary"):
                    provenance, finish_reason = message.summary.provenance, message.summary.finish_reason
                if piece := stop.push(characters.push(message.token_ids)):
                    yield Text(piece)
                if stop.stopped:
                    break
        if not stop.stopped and (piece := stop.push(characters.finish()) + stop.finish()):
            yield Text(piece)
        yield Summary(
            request_id=self._request_id,
            finish_reason=router_pb2.FINISH_REASON_STOP if stop.stopped else finish_reason,
            prompt_tokens=prepared.accepted.prompt_tokens,
            completion_tokens=num_tokens,
            provenance=provenance,
            notices=self._notices(prepared, provenance.organ_source),
            token_ids=tuple(token_ids),
            prompt_digest=prompt_digest(prepared.router_request.input_ids) if for_replay else "",
        )

    def _notices(self, prepared: _Prepared, organ_source: router_pb2.OrganSource) -> tuple[str, ...]:
        model = self._parts.describe()
        notices = prepared.notices
        if organ_source == router_pb2.ORGAN_SOURCE_DEFAULT:
            unknown = (
                f"Which organ the images show was not known, so the experts of {model.default_organ!r} answered; "
                "name it in `organs`."
            )
            notices = (*notices, unknown)
        return (*notices, *model.notices, NOT_A_DEVICE)
