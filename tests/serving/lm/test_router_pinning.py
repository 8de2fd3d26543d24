"""Requests stay pinned to their experts across policies, and unused sets are dropped."""

import asyncio
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import grpc
import pytest

from echovlm_ray.config import RouterSection
from protos import router_pb2
from tests.engines import remote_experts
from tests.expert_servers import server_thread
from tests.serving.rollout_feed import Alone, Versions, alone, make_versions, watching_router
from tests.waiting import until_async


@pytest.fixture(scope="module")
def versions(golden_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Versions:
    return make_versions(golden_dir / "base" / "checkpoint", tmp_path_factory.mktemp("versions"))


@pytest.fixture(scope="module")
def reference(versions: Versions) -> Iterator[Alone]:
    with alone(versions) as engine:
        yield engine


async def test_every_request_gives_the_tokens_of_its_own_set_alone(versions: Versions, reference: Alone) -> None:
    sets = {(liver, heart): versions.expert_set(liver=liver, heart=heart) for liver, heart in (
        ("1.0.0", "1.0.0"), ("2.0.0", "1.0.0"), ("2.0.0", "2.0.0"), ("3.0.0", "2.0.0"))}  # fmt: skip
    by_id = {expert_set.id: expert_set for expert_set in sets.values()}
    asked = [("liver",), ("heart",), ("liver", "heart")]
    async with watching_router(versions) as router:
        streams, ends = [], []
        for round_ in range(12):
            await router.policy(list(sets.values())[round_ % len(sets)])
            organs = asked[round_ % 3]
            stream = await router.generate(organs, tokens=60).first()
            streams.append((organs, stream))
            ends.append(asyncio.create_task(stream.rest()))
        await asyncio.gather(*ends)
        seen = set()
        for organs, stream in streams:
            expert_set = by_id[stream.provenance.expert_set_id]
            seen.add(expert_set.id)
            ordered = tuple(organ for organ in expert_set.organs if organ in organs)
            assert stream.token_ids == reference.tokens(expert_set, ordered, 60)
            for organ in stream.provenance.organs:
                assert organ.bundle_digest == expert_set.bundle_digest(organ.organ)
                assert versions.digests[organ.organ, organ.bundle_version] == organ.bundle_digest
        assert seen == set(by_id)
    liver = [reference.tokens(expert_set, ("liver",), 60) for expert_set in sets.values()]
    assert liver[0] != liver[1] != liver[3]
    assert liver[1] == liver[2]


async def test_two_organs_candidates_make_a_combined_set(versions: Versions, reference: Alone) -> None:
    stable = versions.expert_set()
    candidates = [versions.candidate(organ, "2.0.0", "canary", 100) for organ in ("liver", "heart")]
    async with watching_router(versions) as router:
        await router.policy(stable, candidates)
        for organs, both in (
            (("liver", "heart"), {"liver": "2.0.0", "heart": "2.0.0"}),
            (("liver",), {"liver": "2.0.0"}),
        ):
            expert_set = versions.expert_set(**both)
            stream = await router.generate(organs).rest()
            assert stream.provenance.expert_set_id == expert_set.id
            assert stream.versions == both
            assert stream.token_ids == reference.tokens(expert_set, organs, 24)
        assert (await router.generate(("breast",)).rest()).provenance.expert_set_id == stable.id


async def test_a_session_keeps_its_experts_and_a_request_its_own(versions: Versions) -> None:
    canary = versions.expert_set(liver="2.0.0").id
    async with watching_router(versions) as router:
        await router.policy(versions.expert_set(), [versions.candidate("liver", "2.0.0", "canary", 50)])

        async def routed(session_key: str, request_id: str) -> str:
            request = router_pb2.RouteRequest(
                organ_hints=router_pb2.OrganHints(organs=["liver"]), session_key=session_key
            )
            response = await router.stub.Route(request, metadata=(("x-request-id", request_id),))
            return str(response.expert_set_id)

        by_session = [{await routed(f"visit-{key}", f"{key}-{i}") for i in range(3)} for key in range(20)]
        assert all(len(sets) == 1 for sets in by_session)
        assert 3 < sum(canary in sets for sets in by_session) < 17
        by_request = [await routed("", f"request-{i}") for i in range(20)]
        assert by_request == [await routed("", f"request-{i}") for i in range(20)]
        assert 3 < by_request.count(canary) < 17
        for i in range(4):
            stream = await router.generate(tokens=2, request_id=f"request-{i}").rest()
            assert stream.provenance.expert_set_id == by_request[i]
            stream = await router.generate(tokens=2, session_key=f"visit-{i}").rest()
            assert {stream.provenance.expert_set_id} == by_session[i]


async def test_a_new_organ_is_there_for_those_who_get_the_candidate(versions: Versions, reference: Alone) -> None:
    stable = versions.expert_set()
    async with watching_router(versions) as router:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await router.generate(("lung",)).rest()
        assert caught.value.code() == grpc.StatusCode.NOT_FOUND
        await router.policy(stable, [versions.candidate("lung", "1.0.0", "canary", 50)])
        lung = versions.expert_set(lung="1.0.0")
        answers = 0
        for i in range(12):
            stream = router.generate(("lung",), request_id=f"request-{i}")
            with suppress(grpc.aio.AioRpcError):
                await stream.rest()
            if await stream.call.code() == grpc.StatusCode.FAILED_PRECONDITION:
                continue
            answers += 1
            assert stream.provenance.expert_set_id == lung.id
            assert stream.token_ids == reference.tokens(lung, ("lung",), 24)
        assert 0 < answers < 12
        await router.policy(lung)
        assert (await router.generate(("lung",)).rest()).versions == {"lung": "1.0.0"}


async def test_pins_name_the_policy_and_what_is_under_way_at_every_moment(versions: Versions) -> None:
    digests = versions.digests
    first, second, third = (versions.expert_set(liver=version) for version in ("1.0.0", "2.0.0", "3.0.0"))
    stable = {member.bundle_digest for member in first.members}
    async with watching_router(versions) as router:
        assert await router.pins() == (0, stable)
        running = await router.generate(tokens=1500).first()
        await router.policy(second, [versions.candidate("heart", "2.0.0", "canary", 1)])
        heart = digests["heart", "2.0.0"]
        assert await router.pins() == (1, stable | {digests["liver", "2.0.0"], heart})
        other = await router.generate(tokens=1500).first()
        await router.policy(third)
        expected = stable | {digests["liver", "2.0.0"], digests["liver", "3.0.0"]}
        assert await router.pins() == (2, expected)
        other.call.cancel()
        await router.wait_for_pins(2, expected - {digests["liver", "2.0.0"]})
        running.call.cancel()
        await router.wait_for_pins(2, {member.bundle_digest for member in third.members})


async def test_queued_and_refused_requests_are_counted_too(versions: Versions) -> None:
    limits = RouterSection(max_batch_size=1, max_queue=1, max_new_tokens=2000)
    old = versions.digests["liver", "1.0.0"]
    async with watching_router(versions, limits=limits) as router:
        running = await router.generate(("heart",), tokens=1500).first()
        waiting = router.generate(("liver",), tokens=3)
        await until_async(lambda: router.engine.queue_length == 2)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await router.generate(("liver",), tokens=3).rest()
        assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        second = versions.expert_set(liver="2.0.0")
        await router.policy(second)
        assert old in (await router.pins())[1]
        running.call.cancel()
        assert (await waiting.rest()).versions == {"liver": "1.0.0"}
        await router.wait_for_pins(1, {member.bundle_digest for member in second.members})


async def test_nothing_grows_over_two_hundred_policies(versions: Versions) -> None:
    sets = [
        versions.expert_set(liver=liver, heart=heart)
        for liver in ("1.0.0", "2.0.0", "3.0.0")
        for heart in ("1.0.0", "2.0.0")
    ]
    async with watching_router(versions) as router:
        tasks = []
        for change in range(200):
            candidates = []
            if change % 3 == 0:
                candidates = [versions.candidate("liver", "1.0.1", "canary" if change % 2 else "shadow", 50)]
            await router.policy(sets[change % len(sets)], candidates)
            if change % 4 == 0:
                stream = router.generate(("liver", "heart"), tokens=3, request_id=f"{change}")
                tasks.append(asyncio.create_task(stream.rest()))
        await asyncio.gather(*tasks)
        await until_async(lambda: router.engine.queue_length == 0)
        last = await router.policy(versions.expert_set())
        dispatcher, expert_sets = router.engine.dispatcher, router.parts.expert_sets
        assert list(dispatcher._gates) == [versions.expert_set().id]
        assert len(expert_sets._sets) == 1
        stable = {member.bundle_digest for member in versions.expert_set().members}
        assert set(expert_sets._gates) == stable
        assert await router.pins() == (last, stable)
        assert router.engine.free_blocks == router.engine.num_blocks


async def test_a_swap_leaves_the_other_organs_prefixes(versions: Versions, reference: Alone) -> None:
    prompt = list(range(10, 60))
    second = versions.expert_set(liver="2.0.0")
    async with watching_router(versions) as router:
        for organs in (("heart",), ("liver",), ("liver", "heart")):
            await router.generate(organs, input_ids=prompt, tokens=2).rest()
        before = router.engine.prefix_hits
        await router.policy(second)
        await until_async(lambda: router.engine.cached_blocks == 3)
        again = await router.generate(("heart",), input_ids=prompt, tokens=30).rest()
        assert router.engine.prefix_hits - before == 48
        assert again.provenance.expert_set_id == second.id
        assert again.token_ids == reference.tokens(second, ("heart",), 30, prompt)


async def test_cached_prefixes_of_a_bundle_go_with_it(versions: Versions) -> None:
    prompt = list(range(10, 60))
    async with watching_router(versions) as router:
        await router.generate(input_ids=prompt, tokens=2).rest()
        assert router.engine.cached_blocks == 3
        await router.policy(versions.expert_set(liver="2.0.0"))
        await until_async(lambda: router.engine.cached_blocks == 0)
        stream = await router.generate(input_ids=prompt, tokens=2).rest()
        assert router.engine.prefix_hits == 0
        assert stream.versions == {"liver": "2.0.0"}


async def test_a_replica_that_has_not_loaded_a_pinned_bundle_is_waited_for(
    versions: Versions, reference: Alone
) -> None:
    second = versions.expert_set(liver="2.0.0")
    with server_thread() as servers:
        placement = remote_experts(versions.split, servers)
        group = next(iter(servers.groups["liver"]))
        async with watching_router(versions, placement=placement) as router:
            group.load(versions.digests["liver", "2.0.0"])
            await router.policy(second)
            stream = await router.generate(tokens=80).first()
            group.unload(versions.digests["liver", "2.0.0"])
            waiting = asyncio.create_task(stream.rest())
            await asyncio.sleep(0.5)
            assert not waiting.done()
            assert (await router.generate(("heart",)).rest()).versions == {"heart": "1.0.0"}
            assert versions.digests["liver", "2.0.0"] in (await router.pins())[1]
            group.load(versions.digests["liver", "2.0.0"])
            await waiting
            assert stream.token_ids == reference.tokens(second, ("liver",), 80)
