import asyncio

import grpc
import pytest

from echovlm_ray.client import (
    Accepted,
    AsyncAnswerStream,
    AsyncEchoVLMClient,
    DeadlineExceededError,
    InternalServerError,
    Summary,
    Text,
    UnavailableError,
)
from tests.client.scripted_server import PIECES, ScriptedEchoVLM, retry_info, status

UNAVAILABLE = status(grpc.StatusCode.UNAVAILABLE, "the experts of 'liver' are away", retry_info(0.1))


async def cancelled(servicer: ScriptedEchoVLM) -> bool:
    return await asyncio.to_thread(servicer.cancelled.wait, 5)


async def test_generate_stream_and_info(servicer: ScriptedEchoVLM, address: str) -> None:
    async with AsyncEchoVLMClient(address) as client:
        answer = await client.generate(b"x", task="vqa", prompt="Which organ?")
        assert answer.text == "".join(PIECES)
        async with client.stream([b"x", b"y"], language="zh") as stream:
            events = [event async for event in stream]
        assert isinstance(events[0], Accepted)
        assert events[1:-1] == [Text(piece) for piece in PIECES]
        assert isinstance(events[-1], Summary)
        assert events[-1] == answer.summary == stream.summary
        assert (await client.model_info()).name == "echovlm-test"
    assert servicer.requests[0].prompt == "Which organ?"
    assert len(servicer.requests[1].images) == 2


async def test_the_text_alone_is_easy(address: str) -> None:
    async with AsyncEchoVLMClient(address) as client:
        stream = client.stream(b"x")
        assert [piece async for piece in stream.text()] == list(PIECES)
        assert stream.summary is not None


async def test_many_calls_at_once(servicer: ScriptedEchoVLM, address: str) -> None:
    servicer.delay_s = 0.2
    async with AsyncEchoVLMClient(address) as client:
        answers = await asyncio.wait_for(asyncio.gather(*(client.generate(b"x") for _ in range(20))), 3)
    assert len(answers) == 20


async def test_a_lost_call_is_sent_again(servicer: ScriptedEchoVLM, address: str) -> None:
    servicer.failures = [UNAVAILABLE, UNAVAILABLE]
    async with AsyncEchoVLMClient(address) as client:
        assert (await client.generate(b"x" * 3_000_000)).text == "".join(PIECES)
        assert servicer.calls == 3
        servicer.failures = [UNAVAILABLE, UNAVAILABLE]
        assert [piece async for piece in client.stream(b"x").text()] == list(PIECES)
        assert servicer.calls == 6


async def test_a_deadline_ends_the_call_on_both_sides(servicer: ScriptedEchoVLM, address: str) -> None:
    servicer.delay_s = 60
    async with AsyncEchoVLMClient(address, timeout_s=0.3) as client:
        with pytest.raises(DeadlineExceededError):
            await client.generate(b"x")
        assert await cancelled(servicer)


async def test_leaving_a_stream_cancels_it_on_the_server(servicer: ScriptedEchoVLM, address: str) -> None:
    servicer.wait_after = 1
    async with AsyncEchoVLMClient(address) as client:
        async with client.stream(b"x") as stream:
            await anext(stream)
            await anext(stream)
            assert not servicer.cancelled.is_set()
        assert await cancelled(servicer)


async def test_cancelling_the_task_cancels_the_request(servicer: ScriptedEchoVLM, address: str) -> None:
    servicer.wait_after = 1
    async with AsyncEchoVLMClient(address) as client:

        async def read() -> None:
            async for _ in client.stream(b"x"):
                pass

        task = asyncio.create_task(read())
        await asyncio.to_thread(servicer.started.wait, 5)
        await asyncio.sleep(0.1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await cancelled(servicer)


async def test_cancelling_a_unary_call_cancels_the_request(servicer: ScriptedEchoVLM, address: str) -> None:
    servicer.delay_s = 60
    async with AsyncEchoVLMClient(address) as client:
        task = asyncio.create_task(client.generate(b"x"))
        await asyncio.to_thread(servicer.started.wait, 5)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await cancelled(servicer)


async def test_a_stream_without_an_end_is_an_error(servicer: ScriptedEchoVLM, address: str) -> None:
    servicer.omit_summary = True
    async with AsyncEchoVLMClient(address) as client:
        with pytest.raises(InternalServerError, match="without a summary"):
            [event async for event in client.stream(b"x")]


async def test_a_stream_that_was_lost_before_its_text_is_sent_again_and_says_nothing_twice(
    servicer: ScriptedEchoVLM, address: str
) -> None:
    servicer.failures = [status(grpc.StatusCode.UNAVAILABLE, "away", retry_info(0.1))] * 2
    servicer.fail_after = 0
    async with AsyncEchoVLMClient(address) as client, client.stream(b"x") as stream:
        events = [event async for event in stream]
    assert servicer.calls == 3
    assert [type(event) for event in events] == [Accepted, *[Text] * len(PIECES), Summary]


async def test_tries_end_with_the_calls_own_time(servicer: ScriptedEchoVLM, address: str) -> None:
    servicer.failures = [status(grpc.StatusCode.UNAVAILABLE, "away", retry_info(0.1))] * 100
    errors: list[str] = []
    async with AsyncEchoVLMClient(address, timeout_s=3.0, waiting=lambda error: errors.append(str(error))) as client:
        with pytest.raises(UnavailableError, match="away"):
            await client.generate(b"x")
    assert servicer.calls == len(errors) + 1 > 2


async def test_cancelling_a_stream_that_waits_ends_it(servicer: ScriptedEchoVLM, address: str) -> None:
    servicer.failures = [status(grpc.StatusCode.UNAVAILABLE, "away", retry_info(0.1))] * 100
    streams: list[AsyncAnswerStream] = []
    async with AsyncEchoVLMClient(address, waiting=lambda error: streams[0].cancel()) as client:
        streams.append(client.stream(b"x"))
        with pytest.raises(UnavailableError):
            await anext(streams[0])
    assert servicer.calls == 1
