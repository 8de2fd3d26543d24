"""A router uses the set that the request names, if it is served, or resident for a replay."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from tests.serving.rollout_feed import Alone, Versions, WatchingRouter, alone, make_versions, watching_router
from tests.waiting import until_async


@pytest.fixture(scope="module")
def versions(golden_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Versions:
    return make_versions(golden_dir / "base" / "checkpoint", tmp_path_factory.mktemp("versions"))


@pytest.fixture(scope="module")
def reference(versions: Versions) -> Iterator[Alone]:
    with alone(versions) as engine:
        yield engine


async def refused(router: WatchingRouter, expert_set_id: str) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await router.generate(expert_set_id=expert_set_id).rest()
    return caught.value


async def test_a_replayed_set_gives_its_own_tokens_after_later_promotions(versions: Versions, reference: Alone) -> None:
    past = [
        versions.expert_set(),
        versions.expert_set(liver="2.0.0"),
        versions.expert_set(liver="2.0.0", heart="3.0.0"),
    ]
    live = versions.expert_set(liver="3.0.0", heart="2.0.0")
    async with watching_router(versions) as router:
        for stable in [*past, live]:
            await router.policy(stable)
        router.control.servicer.replayed = {expert_set.id: expert_set for expert_set in past}
        asked = [*past, live] * 2
        streams = [router.generate(("liver",), tokens=60, expert_set_id=each.id) for each in asked]
        others = [router.generate(("liver",), tokens=60) for _ in range(3)]
        await asyncio.gather(*(stream.rest() for stream in [*streams, *others]))
        for expert_set, stream in zip(asked, streams, strict=True):
            assert stream.provenance.expert_set_id == expert_set.id
            assert stream.token_ids == reference.tokens(expert_set, ("liver",), 60)
        for stream in others:
            assert stream.provenance.expert_set_id == live.id
            assert stream.token_ids == reference.tokens(live, ("liver",), 60)
        # Nothing is kept of the past, and what a caller chose is no evidence.
        await router.wait_for_pins(router.version, {member.bundle_digest for member in live.members})
        assert [set_id for set_id in router.parts.expert_sets._sets if set_id != live.id] == []
        # The feed may be sending a report itself, which has the outcomes and has not arrived yet.
        await router.feed._send_reports()
        observed = router.control.servicer.observed
        await until_async(lambda: observed(versions.digests["liver", "3.0.0"]).requests == 3)
        assert observed(versions.digests["liver", "1.0.0"]).requests == 0


async def test_a_served_set_needs_no_replay_and_no_control(versions: Versions, reference: Alone) -> None:
    stable, canary = versions.expert_set(), versions.expert_set(liver="2.0.0")
    async with watching_router(versions) as router:
        await router.policy(stable, [versions.candidate("liver", "2.0.0", "canary", 50)])
        await router.control.stop()
        for expert_set in (stable, canary):
            for _ in range(3):
                stream = await router.generate(expert_set_id=expert_set.id).rest()
                assert stream.provenance.expert_set_id == expert_set.id
                assert stream.token_ids == reference.tokens(expert_set, ("liver",), 24)
        error = await refused(router, versions.expert_set(liver="3.0.0").id)
        assert error.code() == grpc.StatusCode.UNAVAILABLE
        assert "Control" in error.details()


async def test_a_set_that_is_not_served_is_refused_in_words(versions: Versions) -> None:
    async with watching_router(versions) as router:
        await router.policy(versions.expert_set(liver="2.0.0"))
        error = await refused(router, versions.expert_set(liver="1.0.0").id)
        assert error.code() == grpc.StatusCode.FAILED_PRECONDITION
        assert "echoray experts replay" in error.details()
        for malformed in ("x", "F" * 64, "f" * 63, "f" * 65, "../" * 21 + "f"):
            error = await refused(router, malformed)
            assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
            assert "expert_set_id" in error.details()
        assert (await router.generate().rest()).provenance.expert_set_id == versions.expert_set(liver="2.0.0").id


async def test_a_bundle_that_is_gone_ends_the_request_alone(versions: Versions) -> None:
    live = versions.expert_set(liver="2.0.0")
    members = tuple(
        member.model_copy(update={"bundle_digest": "0" * 64}) if member.organ == "heart" else member
        for member in live.members
    )
    broken = live.model_copy(update={"members": members})
    broken = type(live).model_validate(broken.model_dump())
    async with watching_router(versions) as router:
        await router.policy(live)
        router.control.servicer.replayed = {broken.id: broken}
        assert (await refused(router, broken.id)).code() == grpc.StatusCode.NOT_FOUND
        assert (await router.generate().rest()).provenance.expert_set_id == live.id
        await router.wait_for_pins(router.version, {member.bundle_digest for member in live.members})
