"""The router's gRPC service: checks a request, has its images encoded, pins it, and streams the engine's tokens."""

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass

import grpc
import torch

from echovlm_ray.config import RouterSection
from echovlm_ray.engine.engine import Engine
from echovlm_ray.engine.sequence import Finish, SamplingParams, SequenceRequest, StepOutput
from echovlm_ray.errors import InvalidRequestError
from echovlm_ray.model.configuration import EchoVLMConfig
from echovlm_ray.model.positions import PlaceholderMismatchError, mrope_positions
from echovlm_ray.serving.request_checks import check_sampling
from echovlm_ray.serving.vision_client import VisionClient
from experts.transport.codec import tensor_to_proto
from protos import router_pb2, router_pb2_grpc, vision_pb2
from router.errors import TooManyOrgansError
from router.expert_set import ExpertSet
from router.organ_gate import OrganChoice, OrganGate

# A request that waits for a lost organ ends so much before its deadline that the reason still reaches the caller.
DEADLINE_MARGIN = 0.1
LONGEST_MARGIN_S = 0.2

FINISH_REASONS = {Finish.STOP: router_pb2.FINISH_REASON_STOP, Finish.LENGTH: router_pb2.FINISH_REASON_LENGTH}


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What the router serves: the model's shape, its end tokens, and the live expert set.

    Attributes:
        versions: organ → version of the bundle in the set.
        end_token_ids: the tokens at which the model ends an answer.
    """

    config: EchoVLMConfig
    expert_set: ExpertSet
    versions: Mapping[str, str]
    end_token_ids: frozenset[int]


class RouterService(router_pb2_grpc.RouterServicer):
    """Serves `echovlm.v1.Router` over an engine."""

    def __init__(
        self, engine: Engine, served: ServedModel, organ_gate: OrganGate, vision: VisionClient, limits: RouterSection
    ) -> None:
        self._engine = engine
        self._served = served
        self._organ_gate = organ_gate
        self._vision = vision
        self._limits = limits
        organ_gate.check(served.expert_set)

    @property
    def queue_length(self) -> int:
        """Requests that wait or run, for status."""
        return self._engine.queue_length

    async def Route(
        self, request: router_pb2.RouteRequest, context: grpc.aio.ServicerContext
    ) -> router_pb2.RouteResponse:
        """Says which organs and which expert set a request would use; computes nothing but the vision features."""
        self._check_vision(request.vision_inputs)
        embeddings = await self._encode(request.vision_inputs, self._deadline(context))
        choice = self._choose(request.organ_hints, embeddings)
        shares = [router_pb2.OrganShare(organ=organ, share=share) for organ, share in choice.shares]
        return router_pb2.RouteResponse(
            expert_set_id=self._served.expert_set.id, organ_source=choice.source, organs=shares
        )

    async def Generate(
        self, request: router_pb2.RouterGenerateRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[router_pb2.RouterGenerateResponse]:
        """Streams the tokens of one request; leaving the stream cancels it at the engine's next step."""
        self._check(request)
        deadline = self._deadline(context)
        embeddings = await self._encode(request.vision_inputs, deadline)
        choice = self._choose(request.organ_hints, embeddings)
        sequence_request = self._sequence_request(request, embeddings, choice, deadline)

        loop = asyncio.get_running_loop()
        outputs: asyncio.Queue[StepOutput | Exception] = asyncio.Queue()

        def sink(output: StepOutput | Exception) -> None:
            # A closed loop means that nobody is left to read.
            if not loop.is_closed():
                loop.call_soon_threadsafe(outputs.put_nowait, output)

        sequence = self._engine.submit(sequence_request, sink)
        completed = 0
        try:
            while True:
                output = await outputs.get()
                if isinstance(output, Exception):
                    raise output
                completed += 1
                response = router_pb2.RouterGenerateResponse(token_ids=[output.token_id])
                if output.logits_TV is not None:
                    response.logits.CopyFrom(tensor_to_proto(output.logits_TV))
                if completed == 1:
                    response.provenance.CopyFrom(self._provenance(output, choice))
                if output.finish is not None:
                    response.summary.CopyFrom(self._summary(request, output, completed, choice))
                yield response
                if output.finish is not None:
                    return
        finally:
            self._engine.cancel(sequence)

    def _check(self, request: router_pb2.RouterGenerateRequest) -> None:
        limits = self._limits
        vocabulary = self._served.config.text_config.vocab_size
        prompt_tokens = len(request.input_ids)
        if not prompt_tokens:
            raise InvalidRequestError("input_ids", "is empty; send at least one token")
        if prompt_tokens > limits.max_prompt_tokens:
            raise InvalidRequestError(
                "input_ids",
                f"the prompt has {prompt_tokens} tokens, images included, and the limit is {limits.max_prompt_tokens} "
                "(router.max_prompt_tokens): shorten it or send fewer or smaller images",
            )
        if (largest := max(request.input_ids)) >= vocabulary:
            raise InvalidRequestError("input_ids", f"holds {largest}, but the vocabulary ends at {vocabulary - 1}")
        if not 1 <= request.max_new_tokens <= limits.max_new_tokens:
            raise InvalidRequestError(
                "max_new_tokens",
                f"is {request.max_new_tokens}; it must be from 1 to {limits.max_new_tokens} (router.max_new_tokens)",
            )
        if request.return_logits and prompt_tokens * vocabulary * 4 > limits.max_logits_bytes:
            raise InvalidRequestError(
                "return_logits",
                f"the prompt's logits take {prompt_tokens * vocabulary * 4} bytes and the limit is "
                f"{limits.max_logits_bytes} (router.max_logits_bytes): send a shorter prompt",
            )

        check_sampling(request.sampling)
        self._check_vision(request.vision_inputs)
        for kind, (name, token_id) in self._placeholders().items():
            found = sum(1 for token in request.input_ids if token == token_id)
            given = [item for item in request.vision_inputs if item.kind == kind]
            needed = sum(self._visual_tokens(item) for item in given)
            if found != needed:
                raise InvalidRequestError(
                    "vision_inputs",
                    f"the prompt has {found} {name} placeholder tokens (id {token_id}), but the {len(given)} {name}(s) "
                    f"given fill {needed}: send what the processor made of prompt and images together",
                )

    def _check_vision(self, inputs: Sequence[vision_pb2.VisionInput]) -> None:
        merge = self._served.config.vision_config.spatial_merge_size
        for index, item in enumerate(inputs):
            if item.kind not in self._placeholders():
                raise InvalidRequestError(f"vision_inputs[{index}].kind", "must be an image or a video")
            if not item.grid_t or not item.grid_h or not item.grid_w or item.grid_h % merge or item.grid_w % merge:
                raise InvalidRequestError(
                    f"vision_inputs[{index}]",
                    f"has the grid {item.grid_t} × {item.grid_h} × {item.grid_w}: no side may be 0, and height and "
                    f"width must be multiples of {merge} (spatial_merge_size)",
                )

    def _placeholders(self) -> dict[int, tuple[str, int]]:
        config = self._served.config
        return {
            vision_pb2.VISION_KIND_IMAGE: ("image", config.image_token_id),
            vision_pb2.VISION_KIND_VIDEO: ("video", config.video_token_id),
        }

    def _visual_tokens(self, item: vision_pb2.VisionInput) -> int:
        merge = self._served.config.vision_config.spatial_merge_size
        return int(item.grid_t * (item.grid_h // merge) * (item.grid_w // merge))

    def _deadline(self, context: grpc.aio.ServicerContext) -> float:
        remaining = context.time_remaining()
        seconds = self._limits.max_request_s if remaining is None else min(remaining, self._limits.max_request_s)
        return time.monotonic() + seconds - min(seconds * DEADLINE_MARGIN, LONGEST_MARGIN_S)

    async def _encode(self, inputs: Sequence[vision_pb2.VisionInput], deadline: float) -> list[torch.Tensor]:
        if not inputs:
            return []
        embeddings = await self._vision.encode(inputs, deadline)
        hidden_size = self._served.config.text_config.hidden_size
        expected = [(self._visual_tokens(item), hidden_size) for item in inputs]
        found = [tuple(embedding.shape) for embedding in embeddings]
        if found != expected:
            raise RuntimeError(f"the vision encoder returned embeddings of {found} instead of {expected}")
        return embeddings

    def _choose(self, hints: router_pb2.OrganHints, embeddings: list[torch.Tensor]) -> OrganChoice:
        pooled = torch.cat(embeddings).float().mean(0) if embeddings else None
        try:
            return self._organ_gate.choose(hints.organs, hints.anatomy_terms, pooled, self._served.expert_set)
        except TooManyOrgansError as error:
            raise InvalidRequestError("organs", str(error)) from error

    def _sequence_request(
        self,
        request: router_pb2.RouterGenerateRequest,
        embeddings: list[torch.Tensor],
        choice: OrganChoice,
        deadline: float,
    ) -> SequenceRequest:
        config = self._served.config
        input_ids = torch.tensor(list(request.input_ids))
        rows, visual = self._place_vision(input_ids, request.vision_inputs, embeddings)
        grids = {
            kind: [(item.grid_t, item.grid_h, item.grid_w) for item in request.vision_inputs if item.kind == kind]
            for kind in (vision_pb2.VISION_KIND_IMAGE, vision_pb2.VISION_KIND_VIDEO)
        }
        try:
            position_ids, delta = mrope_positions(
                input_ids, grids[vision_pb2.VISION_KIND_IMAGE], grids[vision_pb2.VISION_KIND_VIDEO], config
            )
        except PlaceholderMismatchError as error:
            raise InvalidRequestError("vision_inputs", str(error)) from error
        stop_token_ids = frozenset(request.stop_token_ids)
        if not stop_token_ids and not request.ignore_eos:
            stop_token_ids = self._served.end_token_ids
        return SequenceRequest(
            input_ids=tuple(request.input_ids),
            position_ids_3T=position_ids,
            position_delta=delta,
            expert_set_id=self._served.expert_set.id,
            shares=choice.shares,
            max_new_tokens=request.max_new_tokens,
            vision_rows_V=rows,
            vision_embeddings_VD=visual,
            sampling=_sampling(request.sampling),
            stop_token_ids=stop_token_ids,
            return_logits=request.return_logits,
            deadline=deadline,
        )

    def _place_vision(
        self, input_ids: torch.Tensor, inputs: Sequence[vision_pb2.VisionInput], embeddings: list[torch.Tensor]
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The prompt positions of all placeholders, ascending, and the embeddings that replace them."""
        if not embeddings:
            return None, None
        visual = embeddings[0].new_empty(len(input_ids), embeddings[0].shape[1])
        is_visual = torch.zeros(len(input_ids), dtype=torch.bool)
        for kind, (_, token_id) in self._placeholders().items():
            own = [embedding for item, embedding in zip(inputs, embeddings, strict=True) if item.kind == kind]
            if own:
                placeholders = input_ids == token_id
                visual[placeholders] = torch.cat(own)
                is_visual |= placeholders
        return is_visual.nonzero()[:, 0], visual[is_visual]

    def _summary(
        self, request: router_pb2.RouterGenerateRequest, output: StepOutput, completed: int, choice: OrganChoice
    ) -> router_pb2.RouterSummary:
        assert output.finish is not None
        return router_pb2.RouterSummary(
            finish_reason=FINISH_REASONS[output.finish],
            prompt_tokens=len(request.input_ids),
            completion_tokens=completed,
            provenance=self._provenance(output, choice),
        )

    def _provenance(self, output: StepOutput, choice: OrganChoice) -> router_pb2.Provenance:
        assert output.routed_pairs is not None
        expert_set = self._served.expert_set
        total = sum(output.routed_pairs.values())
        organs = [
            router_pb2.OrganProvenance(
                organ=organ,
                bundle_version=self._served.versions[organ],
                bundle_digest=expert_set.bundle_digest(organ),
                routed_share=pairs / total,
            )
            for organ, pairs in output.routed_pairs.items()
            if pairs
        ]
        return router_pb2.Provenance(
            expert_set_id=expert_set.id,
            backbone_digest=expert_set.backbone_digest,
            organ_source=choice.source,
            organs=organs,
        )


def _sampling(sampling: router_pb2.Sampling) -> SamplingParams:
    # Zero is proto3's "not set": for top_p and the penalty that means no change.
    return SamplingParams(
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p or 1.0,
        repetition_penalty=sampling.repetition_penalty or 1.0,
        seed=sampling.seed if sampling.HasField("seed") else None,
    )
