"""The router's gRPC service: checks a request, encodes its images, pins it, and streams the engine's tokens."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

import grpc
import torch

from echovlm_ray.config import RouterSection
from echovlm_ray.engine.engine import Engine
from echovlm_ray.engine.sequence import Finish, SequenceRequest, StepOutput
from echovlm_ray.engine.sequence import Sequence as EngineSequence
from echovlm_ray.errors import InvalidRequestError, OverloadedError
from echovlm_ray.serving.core.request_checks import check_session_key
from echovlm_ray.serving.grpc.request_id import current_request_id, request_id_of
from echovlm_ray.serving.lm.admission import Admission, PinnedExperts, RequestTraits, UsedBundle
from echovlm_ray.serving.lm.mailbox import Mailbox
from echovlm_ray.serving.lm.outcomes import Outcomes
from echovlm_ray.serving.lm.pinning import ExpertSets
from echovlm_ray.serving.lm.provenance import provenance_of
from echovlm_ray.serving.lm.request import RequestReader, ServedModel
from echovlm_ray.serving.lm.runs import Run
from echovlm_ray.serving.lm.shadow import Shadow, Shadows
from echovlm_ray.serving.vision.client import EncodedPicture, VisionClient
from experts.transport.codec import tensor_to_proto
from protos import router_pb2, router_pb2_grpc, vision_pb2
from router.errors import ExpertSetNotServedError, ExpertsUnusableError, TooManyOrgansError
from router.gating.expert_set import ExpertSet

# A request that waits for a lost organ ends so much before its deadline that the reason still reaches the caller.
DEADLINE_MARGIN = 0.1
LONGEST_MARGIN_S = 0.2

NO_ROOM = "requests of callers need the room: an evaluation asks again later"

FINISH_REASONS = {Finish.STOP: router_pb2.FINISH_REASON_STOP, Finish.LENGTH: router_pb2.FINISH_REASON_LENGTH}


async def _nothing_replayed(expert_set_id: str) -> None:
    return None


class RouterService(router_pb2_grpc.RouterServicer):
    """Serves `echovlm.v1.Router` over an engine."""

    def __init__(
        self,
        engine: Engine,
        model: ServedModel,
        expert_sets: ExpertSets,
        vision: VisionClient,
        limits: RouterSection,
        outcomes: Outcomes,
        replayed: Callable[[str], Awaitable[ExpertSet | None]] = _nothing_replayed,
    ) -> None:
        """Takes its parts.

        Args:
            engine: runs the requests.
            model: the served model.
            expert_sets: pins requests, and registers sets with the engine's dispatcher.
            vision: encodes their images.
            limits: of a request.
            outcomes: collects their statistics.
            replayed: id → the expert set, if it is resident for a replay.
        """
        self._engine = engine
        self._reader = RequestReader(model, limits)
        self._expert_sets = expert_sets
        self._vision = vision
        self._limits = limits
        self._outcomes = outcomes
        self._replayed = replayed
        self._shadows = Shadows(engine, outcomes, limits.max_batch_size)
        self._mailbox: Mailbox[StepOutput | Exception] | None = None

    @property
    def queue_length(self) -> int:
        """Requests that wait or run, for status; shadows are not answered and do not count."""
        return max(0, self._engine.queue_length - len(self._shadows))

    async def Route(
        self, request: router_pb2.RouteRequest, context: grpc.aio.ServicerContext
    ) -> router_pb2.RouteResponse:
        """Returns the organs and the expert set that a request would use. Computes only the vision features."""
        check_session_key(request.session_key)
        self._reader.check_vision(request.vision_inputs)
        pictures = await self._encode(request.vision_inputs, self._deadline(context))
        traits = _traits(request.organ_hints, pictures, request.session_key, context)
        try:
            expert_set, choice = self._expert_sets.route(traits)
        except TooManyOrgansError as error:
            raise InvalidRequestError("organs", str(error)) from error
        shares = [router_pb2.OrganShare(organ=organ, share=share) for organ, share in choice.shares]
        return router_pb2.RouteResponse(expert_set_id=expert_set.id, organ_source=choice.source, organs=shares)

    async def Pins(self, request: router_pb2.PinsRequest, context: grpc.aio.ServicerContext) -> router_pb2.PinsResponse:
        """Returns the bundles that must stay loaded for this router."""
        version, digests = self._expert_sets.pins()
        return router_pb2.PinsResponse(policy_version=version, digests=sorted(digests))

    async def Generate(
        self, request: router_pb2.RouterGenerateRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[router_pb2.RouterGenerateResponse]:
        """Streams the tokens of one request. Closing the stream cancels it at the engine's next step."""
        self._reader.check(request)
        evaluated = request.evaluated_bundle
        # Before its pictures are encoded too.
        if evaluated and not self._shadows.has_room(0):
            raise OverloadedError(NO_ROOM)
        deadline = self._deadline(context)
        pictures = await self._encode(request.vision_inputs, deadline, request.cache_salt, request.caller)
        traits = _traits(request.organ_hints, pictures, request.session_key, context, request.policy_version)
        admission = await self._admit(traits, request.expert_set_id, evaluated)
        experts = admission.experts
        try:
            pinned = self._reader.sequence_request(request, pictures, deadline, admission)
        except BaseException:
            admission.release()
            raise
        shadow = None if admission.shadow is None else self._shadows.prepare(admission.shadow, pinned)
        completed, complete = 0, False
        try:
            outputs: asyncio.Queue[StepOutput | Exception] = asyncio.Queue()
            if evaluated:
                sequence = self._submit_evaluation(pinned, experts, outputs)
            else:
                # A set that the caller chose does not count in a version's statistics.
                judged = () if request.expert_set_id else experts.used
                sequence = await self._submit(pinned, experts, judged, outputs, shadow)
            try:
                while not complete:
                    output = await outputs.get()
                    if isinstance(output, Exception):
                        raise _with_version(output, experts)
                    completed += 1
                    complete = output.finish is not None
                    if evaluated and not complete and self._shadows.is_in_the_way():
                        raise OverloadedError(NO_ROOM)
                    if completed == 1 and shadow is not None:
                        shadow.begin()
                    yield _response(request, output, completed, experts)
            finally:
                self._engine.cancel(sequence)
        finally:
            if shadow is not None:
                shadow.leave(complete)

    def _submit_evaluation(
        self, request: SequenceRequest, experts: PinnedExperts, outputs: "asyncio.Queue[StepOutput | Exception]"
    ) -> EngineSequence:
        """Runs a request that answers no caller, where callers leave room; says nothing of its experts' traffic."""
        mailbox = self._opened_mailbox()
        run = Run(experts, (), self._outcomes, sink=mailbox.sink(outputs))
        try:
            if not self._shadows.has_room(len(request.input_ids) + request.max_new_tokens):
                raise OverloadedError(NO_ROOM)
            return self._engine.submit(request, run.sink, run.gone, mailbox.wake)
        except BaseException:
            run.drop()
            raise

    def _opened_mailbox(self) -> "Mailbox[StepOutput | Exception]":
        if self._mailbox is None:
            self._mailbox = Mailbox(asyncio.get_running_loop())
        return self._mailbox

    async def _submit(
        self,
        request: SequenceRequest,
        experts: PinnedExperts,
        judged: tuple[UsedBundle, ...],
        outputs: "asyncio.Queue[StepOutput | Exception]",
        shadow: Shadow | None,
    ) -> EngineSequence:
        mailbox = self._opened_mailbox()

        def ended() -> None:
            if shadow is not None:
                shadow.incumbent_ended(run)

        run = Run(experts, judged, self._outcomes, sink=mailbox.sink(outputs), ended=ended)
        try:
            self._shadows.make_way(len(request.input_ids) + request.max_new_tokens)
            try:
                return self._engine.submit(request, run.sink, run.gone, mailbox.wake)
            except OverloadedError:
                if not await self._shadows.step_aside():
                    raise
                return self._engine.submit(request, run.sink, run.gone, mailbox.wake)
        except BaseException:
            run.drop()
            raise

    async def _admit(self, traits: RequestTraits, expert_set_id: str, evaluated: str = "") -> Admission:
        try:
            if evaluated:
                return Admission(self._expert_sets.admit_evaluation(traits, evaluated))
            if not expert_set_id:
                return self._expert_sets.admit(traits)
            if (admission := self._expert_sets.admit_to(traits, expert_set_id)) is not None:
                return admission
            expert_set = await self._replayed(expert_set_id)
            if expert_set is None:
                raise ExpertSetNotServedError(expert_set_id)
            return await self._expert_sets.admit_replayed(traits, expert_set)
        except TooManyOrgansError as error:
            raise InvalidRequestError("organs", str(error)) from error

    def _deadline(self, context: grpc.aio.ServicerContext) -> float:
        remaining = context.time_remaining()
        seconds = self._limits.max_request_s if remaining is None else min(remaining, self._limits.max_request_s)
        return time.monotonic() + seconds - min(seconds * DEADLINE_MARGIN, LONGEST_MARGIN_S)

    async def _encode(
        self, inputs: Sequence[vision_pb2.VisionInput], deadline: float, cache_salt: bytes = b"", caller: bytes = b""
    ) -> list[EncodedPicture]:
        if not inputs:
            return []
        pictures = await self._vision.encode(inputs, deadline, cache_salt, caller)
        expected = self._reader.expected_embeddings(inputs)
        found = [tuple(picture.embedding.shape) for picture in pictures]
        if found != expected:
            raise RuntimeError(f"the vision encoder returned embeddings of {found} instead of {expected}")
        return pictures


def _traits(
    hints: router_pb2.OrganHints,
    pictures: list[EncodedPicture],
    session_key: str,
    context: grpc.aio.ServicerContext,
    policy_version: int = 0,
) -> RequestTraits:
    pooled = torch.cat([picture.embedding for picture in pictures]).float().mean(0) if pictures else None
    request_id = current_request_id() or request_id_of(context.invocation_metadata() or ())
    return RequestTraits(hints.organs, hints.anatomy_terms, pooled, request_id, session_key, policy_version)


def _with_version(error: Exception, experts: PinnedExperts) -> Exception:
    """The error with the version that callers know; below this only digests are known."""
    if not isinstance(error, ExpertsUnusableError):
        return error
    versions = {used.digest: used.version for used in experts.used}
    return ExpertsUnusableError(error.organ, error.digest, error.reason, versions.get(error.digest, ""))


def _response(
    request: router_pb2.RouterGenerateRequest, output: StepOutput, completed: int, experts: PinnedExperts
) -> router_pb2.RouterGenerateResponse:
    response = router_pb2.RouterGenerateResponse(token_ids=[output.token_id])
    if output.logits_TV is not None:
        response.logits.CopyFrom(tensor_to_proto(output.logits_TV))
    if output.routed_pairs is None:
        return response
    provenance = provenance_of(experts, output.routed_pairs)
    if completed == 1:
        response.provenance.CopyFrom(provenance)
    if output.finish is not None:
        summary = router_pb2.RouterSummary(
            finish_reason=FINISH_REASONS[output.finish],
            prompt_tokens=len(request.input_ids),
            completion_tokens=completed,
            provenance=provenance,
        )
        response.summary.CopyFrom(summary)
    return response
