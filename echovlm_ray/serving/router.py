"""The router's gRPC service: checks a request, has its images encoded, pins it, and streams the engine's tokens."""

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass

import grpc
import torch

from echovlm_ray.config import RouterSection
from echovlm_ray.engine.engine import Engine
from echovlm_ray.engine.sequence import Finish, SamplingParams, SequenceRequest, StepOutput
from echovlm_ray.errors import InvalidRequestError
from echovlm_ray.model.configuration import EchoVLMConfig
from echovlm_ray.model.positions import mrope_positions
from echovlm_ray.serving.vision_client import VisionClient
from experts.transport.codec import tensor_to_proto
from protos import router_pb2, router_pb2_grpc, vision_pb2
from router.expert_set import ExpertSet
from router.organ_gate import OrganChoice, OrganGate

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

    async def Route(  # noqa: N802 - the contract's name
        self, request: router_pb2.RouteRequest, context: grpc.aio.ServicerContext
    ) -> router_pb2.RouteResponse:
        """Says which organs and which expert set a request would use; computes nothing but the vision features."""
        embeddings = await self._encode(request.vision_inputs, _deadline(context))
        choice = self._choose(request.organ_hints, embeddings)
        shares = [router_pb2.OrganShare(organ=organ, share=share) for organ, share in choice.shares]
        return router_pb2.RouteResponse(
            expert_set_id=self._served.expert_set.id, organ_source=choice.source, organs=shares
        )

    async def Generate(  # noqa: N802 - the contract's name
        self, request: router_pb2.RouterGenerateRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[router_pb2.RouterGenerateResponse]:
        """Streams the tokens of one request; leaving the stream cancels it at the engine's next step."""
        self._check(request)
        deadline = _deadline(context)
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

    async def _encode(
        self, inputs: "vision_pb2.RepeatedVisionInput", deadline: float | None
    ) -> list[torch.Tensor]:
        return await self._vision.encode(list(inputs), deadline) if inputs else []

    def _choose(self, hints: router_pb2.OrganHints, embeddings: list[torch.Tensor]) -> OrganChoice:
        pooled = torch.cat(embeddings).float().mean(0) if embeddings else None
        return self._organ_gate.choose(hints, pooled, self._served.expert_set)

    def _sequence_request(
        self,
        request: router_pb2.RouterGenerateRequest,
        embeddings: list[torch.Tensor],
        choice: OrganChoice,
        deadline: float | None,
    ) -> SequenceRequest:
        config = self._served.config
        input_ids = torch.tensor(list(request.input_ids))
        rows, visual = _place_vision(input_ids, request.vision_inputs, embeddings, config)
        grids = {
            kind: [(item.grid_t, item.grid_h, item.grid_w) for item in request.vision_inputs if item.kind == kind]
            for kind in (vision_pb2.VISION_KIND_IMAGE, vision_pb2.VISION_KIND_VIDEO)
        }
        position_ids, delta = mrope_positions(
            input_ids, grids[vision_pb2.VISION_KIND_IMAGE], grids[vision_pb2.VISION_KIND_VIDEO], config
        )
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

    def _summary(
        self, request: router_pb2.RouterGenerateRequest, output: StepOutput, completed: int, choice: OrganChoice
    ) -> router_pb2.RouterSummary:
        assert output.finish is not None
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
        return router_pb2.RouterSummary(
            finish_reason=FINISH_REASONS[output.finish],
            prompt_tokens=len(request.input_ids),
            completion_tokens=completed,
            provenance=router_pb2.Provenance(
                expert_set_id=expert_set.id,
                backbone_digest=expert_set.backbone_digest,
                organ_source=choice.source,
                organs=organs,
            ),
        )


def _deadline(context: grpc.aio.ServicerContext) -> float | None:
    remaining = context.time_remaining()
    return None if remaining is None else time.monotonic() + remaining


def _sampling(sampling: router_pb2.Sampling) -> SamplingParams:
    # Zero is proto3's "not set": for top_p and the penalty that means no change.
    return SamplingParams(
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p or 1.0,
        repetition_penalty=sampling.repetition_penalty or 1.0,
        seed=sampling.seed if sampling.HasField("seed") else None,
    )
