"""The use case without a transport: a plain request in, events out, and errors of our own."""

import subprocess
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
from google.rpc import code_pb2

from echovlm_ray.config import GatewaySection, QuotaSection, RouterSection
from echovlm_ray.errors import (
    DeadlineError,
    InvalidRequestError,
    MessageTooLargeError,
    OverloadedError,
    PartUnavailableError,
    TextUnavailableError,
)
from echovlm_ray.events import Accepted, Text
from echovlm_ray.model.processing import EchoVLMProcessor
from echovlm_ray.serving.core.caller import Caller
from echovlm_ray.serving.core.description import ModelDescription
from echovlm_ray.serving.core.failures import Failure, PartRefusedError, failure_of
from echovlm_ray.serving.core.parts import GenerateParts
from echovlm_ray.serving.core.request import Event, GenerateRequest, SamplingOptions, Summary
from echovlm_ray.serving.core.session import GenerateSession
from echovlm_ray.tasks import TASKS
from protos import router_pb2
from tests.random_checkpoint import make_random
from tests.vision.decoding.pools import png

ROOT = Path(__file__).resolve().parents[3]
CALLER = Caller(b"1" * 32, ("ward",))
MODEL = ModelDescription("test", "1.0.0", "", "", "", (), "breast", ("It means nothing.",), policy_version=7)


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> EchoVLMProcessor:
    directory = tmp_path_factory.mktemp("demo") / "demo"
    make_random(directory)
    return EchoVLMProcessor.from_pretrained(directory)


class Tokens:
    """Says a text token by token, then raises what it is given, if anything."""

    def __init__(self, token_ids: Sequence[int], error: Exception | None = None) -> None:
        self.token_ids = token_ids
        self.error = error
        self.asked: list[tuple[router_pb2.RouterGenerateRequest, str]] = []
        self.closed = False

    async def generate(
        self, request: router_pb2.RouterGenerateRequest, *, deadline: float, request_id: str
    ) -> AsyncGenerator[router_pb2.RouterGenerateResponse, None]:
        self.asked.append((request, request_id))
        try:
            for token_id in self.token_ids:
                yield router_pb2.RouterGenerateResponse(token_ids=[token_id])
            if self.error is not None:
                raise self.error
            provenance = router_pb2.Provenance(organ_source=router_pb2.ORGAN_SOURCE_DEFAULT)
            summary = router_pb2.RouterSummary(finish_reason=router_pb2.FINISH_REASON_LENGTH, provenance=provenance)
            yield router_pb2.RouterGenerateResponse(summary=summary)
        finally:
            self.closed = True


class Files:
    """Images that say when the last was taken."""

    def __init__(self, contents: list[bytes]) -> None:
        self.contents = contents
        self.freed = False

    def __len__(self) -> int:
        return len(self.contents)

    def __iter__(self) -> Iterator[bytes]:
        yield from self.contents
        self.freed = True


def parts_of(processor: EchoVLMProcessor | None, tokens: Tokens, **gateway: Any) -> GenerateParts:
    return GenerateParts(
        processor, tokens, lambda: MODEL, gateway=GatewaySection(**gateway), limits=RouterSection(max_prompt_tokens=600)
    )


def question(**fields: Any) -> GenerateRequest:
    return GenerateRequest(**{"task": TASKS["free"], "language": "en", "prompt": "What is a cyst?", **fields})


def session(parts: GenerateParts, request: GenerateRequest, deadline_s: float | None = 30.0) -> GenerateSession:
    return GenerateSession(parts, request, caller=CALLER, request_id="case-3", deadline_s=deadline_s)


async def collected(events: AsyncIterator[Event]) -> list[Event]:
    return [event async for event in events]


async def test_a_request_becomes_events(processor: EchoVLMProcessor) -> None:
    tokens = Tokens(processor.encode_text("A simple cyst."))
    parts = parts_of(processor, tokens)
    asked = question(for_replay=True, session_key="visit", sampling=SamplingOptions(temperature=0.5, seed=3))
    accepted, *pieces, summary = await collected(session(parts, asked).events())
    ((request, request_id),) = tokens.asked
    assert accepted == Accepted(len(request.input_ids), 0, ())
    assert "".join(piece.text for piece in pieces if isinstance(piece, Text)) == "A simple cyst."
    assert isinstance(summary, Summary)
    assert (summary.request_id, request_id) == ("case-3", "case-3")
    assert summary.finish_reason == router_pb2.FINISH_REASON_LENGTH
    assert list(summary.token_ids) == list(tokens.token_ids)
    assert summary.completion_tokens == len(tokens.token_ids)
    assert summary.prompt_tokens == accepted.prompt_tokens
    assert len(summary.prompt_digest) == 64
    assert "'breast'" in summary.notices[0]
    assert summary.notices[1] == "It means nothing."
    assert "not a medical device" in summary.notices[2]
    assert (request.policy_version, request.session_key, request.caller) == (7, "visit", CALLER.id)
    assert (request.sampling.temperature, request.sampling.seed) == (0.5, 3)
    assert request.max_new_tokens == parts.gateway.default_new_tokens
    await parts.close()


async def test_leaving_or_a_stop_string_ends_the_router(processor: EchoVLMProcessor) -> None:
    tokens = Tokens(processor.encode_text("A cyst. And more."))
    parts = parts_of(processor, tokens)
    *_, summary = await collected(session(parts, question(stop=(". And",))).events())
    assert isinstance(summary, Summary)
    assert summary.finish_reason == router_pb2.FINISH_REASON_STOP
    assert tokens.closed
    tokens.closed = False
    async with aclosing(session(parts, question()).events()) as events:
        async for event in events:
            if isinstance(event, Text):
                break
    assert tokens.closed
    await parts.close()


async def test_images_are_taken_once_before_the_first_event(processor: EchoVLMProcessor) -> None:
    tokens = Tokens([])
    parts = parts_of(processor, tokens)
    await parts.start()
    files = Files([png(), png()])
    async with aclosing(session(parts, question(task=TASKS["report"], prompt="", images=files)).events()) as events:
        accepted = await anext(events)
        assert isinstance(accepted, Accepted)
        assert accepted.frames == (1, 1)
        assert accepted.visual_tokens > 0
        assert files.freed
    with pytest.raises(InvalidRequestError, match=r"images\[1\].content: "):
        await collected(session(parts, question(images=Files([png(), b"x"]))).events())
    await parts.close()


async def test_errors_are_of_our_own(processor: EchoVLMProcessor) -> None:
    refusal = Failure(code_pb2.NOT_FOUND, "there is no organ 'spleen'")
    parts = parts_of(processor, Tokens([], PartRefusedError(refusal)))
    with pytest.raises(PartRefusedError) as caught:
        await collected(session(parts, question()).events())
    assert failure_of(caught.value) == refusal
    with pytest.raises(InvalidRequestError, match="TASK_REPORT needs at least one image"):
        await collected(session(parts, question(task=TASKS["report"])).events())
    with pytest.raises(InvalidRequestError, match="needs a question"):
        await collected(session(parts, question(task=TASKS["vqa"], prompt=" ", images=Files([b"x"]))).events())
    with pytest.raises(DeadlineError):
        await collected(session(parts, question(), deadline_s=0.0).events())
    without_text = parts_of(None, Tokens([]))
    with pytest.raises(TextUnavailableError):
        await collected(session(without_text, question()).events())
    await parts.close()
    await without_text.close()


@pytest.mark.parametrize(
    ("answered", "error", "is_charged"),
    [
        ("", PartRefusedError(Failure(code_pb2.RESOURCE_EXHAUSTED, "full")), False),
        ("", PartUnavailableError("router", "is away"), False),
        ("A", PartUnavailableError("router", "was lost"), True),
        ("", PartRefusedError(Failure(code_pb2.INVALID_ARGUMENT, "wrong")), True),
        ("", DeadlineError("late"), True),
    ],
)
async def test_a_prompt_for_which_there_was_no_room_is_not_charged(
    processor: EchoVLMProcessor, answered: str, error: Exception, is_charged: bool
) -> None:
    parts = parts_of(processor, Tokens(processor.encode_text(answered), error), quota=QuotaSection(tokens_per_minute=5))
    with parts.place(CALLER), pytest.raises(type(error)):
        await collected(session(parts, question()).events())
    if is_charged:
        with pytest.raises(OverloadedError, match=r"quota\.tokens_per_minute"), parts.place(CALLER):
            pass
    else:
        with parts.place(CALLER):
            pass
    await parts.close()


async def test_the_files_of_a_request_are_bounded_together_to_the_byte(processor: EchoVLMProcessor) -> None:
    file = png()
    both = question(images=Files([file, file]), organs=("breast",))
    for limit, fits in ((2 * len(file), True), (2 * len(file) - 1, False)):
        parts = parts_of(
            processor, Tokens(()), max_image_bytes=len(file), max_request_bytes=limit, max_received_bytes=10**7
        )
        await parts.start()
        if fits:
            await collected(session(parts, both).events())
        else:
            with pytest.raises(MessageTooLargeError, match=r"gateway\.max_request_bytes"):
                await collected(session(parts, both).events())
        await parts.close()


async def test_places_and_quotas_are_those_of_all_transports(processor: EchoVLMProcessor) -> None:
    tokens = Tokens(processor.encode_text("A cyst."))
    parts = parts_of(processor, tokens, max_requests=2, quota=QuotaSection(tokens_per_minute=5))
    with parts.place(Caller()), parts.place(Caller()):
        assert parts.queue_length == 2
        with pytest.raises(OverloadedError, match=r"gateway\.max_requests"), parts.place(Caller()):
            pass
    assert parts.queue_length == 0
    with parts.place(CALLER):
        await collected(session(parts, question()).events())
    with pytest.raises(OverloadedError, match=r"quota\.tokens_per_minute"), parts.place(CALLER):
        pass
    await parts.close()


def test_nothing_of_it_loads_grpc() -> None:
    modules = [
        path.stem for path in (ROOT / "echovlm_ray" / "serving" / "core").glob("*.py") if path.stem != "__init__"
    ]
    assert "session" in modules
    imports = "; ".join(f"import echovlm_ray.serving.core.{module}" for module in modules)
    code = f"import sys; {imports}; print(*[name for name in sys.modules if name.split('.')[0].startswith('grpc')])"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert loaded.stdout.split() == []
