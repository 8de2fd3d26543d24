"""Concurrent questions to a real gRPC server: limits, retry hints, failures, resuming."""

from collections import Counter
from pathlib import Path

import pytest

from echovlm_ray.client import AsyncEchoVLMClient, UnauthenticatedError
from echovlm_ray.data.media import ImageRoot, UnusableImageError
from echovlm_ray.evaluation.answers import AnswerLog
from echovlm_ray.evaluation.asking import Asking, Outcome, ServiceLostError, ask_all, target_of, work_of
from echovlm_ray.evaluation.settings import AskSettings, RequestLimits, settings_digest
from echovlm_ray.vision.images import ImageLimits
from protos import echovlm_pb2
from tests.evaluation.phantom_records import items_of, write_phantoms
from tests.evaluation.service import ScriptedGateway, serving

LIMITS = ImageLimits(max_image_bytes=10**7, max_image_pixels=10**7, max_frames=8)
COUNT = 12


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    return write_phantoms(tmp_path, COUNT)


async def ask(
    gateway: ScriptedGateway,
    dataset: Path,
    *,
    organs: str = "found",
    limits: RequestLimits | None = None,
    seed: int = 0,
) -> Outcome:
    items = items_of(dataset)
    asking = AskSettings.model_validate({"organs": organs, "max_new_tokens": 9})
    async with serving(gateway) as address, AsyncEchoVLMClient(address, retry=False) as client:
        digest = settings_digest(target_of(await client.model_info()), asking, seed)
        with AnswerLog(dataset.parent / "answers.jsonl") as log:
            run = Asking(
                ImageRoot(dataset.parent),
                log,
                digest,
                asking,
                limits or RequestLimits(timeout_s=20),
                LIMITS,
                seed,
            )
            return await ask_all(client, work_of(items, seed), run)


def echo(request: echovlm_pb2.GenerateRequest) -> str:
    return f"{request.task} {request.language} {request.prompt[:20]}"


async def test_all_variants_are_asked_eight_at_once(dataset: Path) -> None:
    gateway = ScriptedGateway(echo, seconds=0.05)
    outcome = await ask(gateway, dataset)
    assert (len(gateway.requests), gateway.most) == (3 * COUNT, 8)
    assert {variant: len(answers) for variant, answers in outcome.answers.items()} == {
        "model": COUNT,
        "blank image": COUNT,
        "shuffled images": COUNT,
    }
    assert outcome.failed == {}
    own = {item.index: (dataset.parent / item.media[0]).read_bytes() for item in items_of(dataset)}
    # Each image is shown twice, with its own question and with another one; all blank ones are the same.
    sent = Counter(request.images[0].content for request in gateway.requests)
    blank = [content for content in sent if content not in own.values()]
    assert [sent[content] for content in blank] == [COUNT]
    assert [sent[content] for content in own.values()] == [2] * COUNT
    assert {request.max_new_tokens for request in gateway.requests} == {9}
    assert all(not request.organs for request in gateway.requests)


async def test_no_record_is_shown_its_own_images_in_the_exchange(dataset: Path) -> None:
    items = items_of(dataset)
    for seed in range(5):
        exchanged = [work for work in work_of(items, seed) if work.variant == "shuffled images"]
        assert all(work.shown.media != work.item.media for work in exchanged)
        assert sorted(work.shown.index for work in exchanged) == list(range(COUNT))


async def test_organs_are_named_where_they_are_to_be(dataset: Path) -> None:
    gateway = ScriptedGateway(echo)
    await ask(gateway, dataset, organs="given")
    assert {tuple(request.organs) for request in gateway.requests} == {("breast",), ("kidney",)}


async def test_nothing_is_asked_twice(dataset: Path) -> None:
    first, second = ScriptedGateway(echo), ScriptedGateway(echo)
    before = await ask(first, dataset)
    after = await ask(second, dataset)
    assert second.requests == []
    assert after.answers == before.answers
    # Another version is another model, and another image another question.
    third = ScriptedGateway(echo, expert_set_id="set-2")
    await ask(third, dataset)
    assert len(third.requests) == 3 * COUNT
    (dataset.parent / "0.png").write_bytes((dataset.parent / "5.png").read_bytes())
    fourth = ScriptedGateway(echo)
    await ask(fourth, dataset)
    # As its own image, and as that of the record it is exchanged with; a blank one is as blank as before.
    assert len(fourth.requests) == 2


async def test_a_full_service_is_asked_again_when_it_says(dataset: Path) -> None:
    gateway = ScriptedGateway(echo, full=20, retry_s=0.05)
    outcome = await ask(gateway, dataset)
    assert len(outcome.answers["model"]) == COUNT
    assert (gateway.full, outcome.failed) == (0, {})


async def test_a_service_that_stays_full_ends_the_run_and_keeps_the_answers(dataset: Path) -> None:
    gateway = ScriptedGateway(echo)
    await ask(gateway, dataset)
    full = ScriptedGateway(echo, full=10**6, retry_s=0.02, expert_set_id="set-2")
    with pytest.raises(ServiceLostError, match="full"):
        await ask(full, dataset, limits=RequestLimits(retry_s=0.2))
    with AnswerLog(dataset.parent / "answers.jsonl") as log:
        assert len(log) == 3 * COUNT


async def test_a_refused_request_is_kept_as_refused(dataset: Path) -> None:
    gateway = ScriptedGateway(echo, invalid=lambda request: request.language == echovlm_pb2.LANGUAGE_CHINESE)
    outcome = await ask(gateway, dataset)
    refused = [answer for answer in outcome.answers["model"].values() if answer.refused]
    assert 0 < len(refused) < COUNT
    assert all(answer.text == "" and "InvalidRequestError" in answer.refused for answer in refused)
    again = ScriptedGateway(echo)
    await ask(again, dataset)
    assert again.requests == []


async def test_a_failure_of_the_moment_is_not_kept(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("echovlm_ray.evaluation.asking.RETRY_S", 0.01)
    passing = await ask(ScriptedGateway(echo, failing=2), dataset, limits=RequestLimits(concurrency=1))
    assert passing.failed == {}
    (dataset.parent / "answers.jsonl").unlink()
    lasting = await ask(ScriptedGateway(echo, failing=10**6), dataset)
    assert lasting.failed == {"InternalServerError": 3 * COUNT}
    assert (dataset.parent / "answers.jsonl").read_bytes() == b""


async def test_a_missing_image_ends_the_run_with_its_reason(dataset: Path) -> None:
    (dataset.parent / "3.png").unlink()
    with pytest.raises(UnusableImageError, match="does not exist"):
        await ask(ScriptedGateway(echo), dataset)


async def test_wrong_credentials_are_not_tried_for_every_record(dataset: Path) -> None:
    class Locked(ScriptedGateway):
        async def Generate(self, request: object, context: object) -> echovlm_pb2.GenerateResponse:
            import grpc

            self.most += 1
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "no token")  # type: ignore[attr-defined]
            raise AssertionError

    gateway = Locked(echo)
    with pytest.raises(UnauthenticatedError):
        await ask(gateway, dataset)
    assert gateway.most <= 8
