"""Shadows are not answered, are compared with what was answered, and take nothing from callers."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from echovlm_ray.config import RouterSection
from protos import router_pb2
from router.rollouts.shadow import ShadowRecord
from tests.serving.rollout_feed import Alone, Versions, alone, make_versions, watching_router
from tests.waiting import until_async


@pytest.fixture(scope="module")
def versions(golden_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Versions:
    return make_versions(golden_dir / "base" / "checkpoint", tmp_path_factory.mktemp("versions"))


@pytest.fixture(scope="module")
def reference(versions: Versions) -> Iterator[Alone]:
    with alone(versions) as engine:
        yield engine


async def test_a_shadow_answers_no_request_and_is_compared(versions: Versions, reference: Alone) -> None:
    stable, shadow = versions.expert_set(), versions.expert_set(liver="2.0.0")
    async with watching_router(versions) as router:
        await router.policy(stable, [versions.candidate("liver", "2.0.0", "shadow", 100)])
        stream = await router.generate(tokens=40).rest()
        expected = reference.tokens(stable, ("liver",), 40)
        assert stream.token_ids == expected
        assert stream.provenance.expert_set_id == stable.id
        control = router.control.servicer
        await until_async(lambda: len(control.shadows) == 1)
        record = ShadowRecord.of(expected, reference.tokens(shadow, ("liver",), 40))
        found = control.shadows[0]
        assert found.rollout_id == "liver-2.0.0"
        assert (found.tokens, found.shared_tokens) == (record.tokens, record.shared_tokens)
        assert found.HasField("first_divergence")
        assert found.first_divergence == record.first_divergence
        assert 0.05 < found.latency_ratio < 20
        for digest in ("1.0.0", "2.0.0"):
            observed = control.observed(versions.digests["liver", digest])
            assert (observed.requests, observed.errors, observed.tokens) == (1, 0, 40)
        assert router.parts.service.queue_length == 0


@pytest.mark.parametrize("sampling", [{}, {"temperature": 5.0}, {"temperature": 5.0, "seed": 3}])
async def test_the_same_weights_give_the_same_answer_drawn_or_not(versions: Versions, sampling: dict[str, Any]) -> None:
    async with watching_router(versions) as router:
        await router.policy(versions.expert_set(), [versions.candidate("liver", "1.0.1", "shadow", 100)])
        await router.generate(tokens=20, sampling=router_pb2.Sampling(**sampling)).rest()
        await until_async(lambda: len(router.control.servicer.shadows) == 1)
        found = router.control.servicer.shadows[0]
        assert (found.tokens, found.shared_tokens) == (20, 20)
        assert not found.HasField("first_divergence")


async def test_a_shadow_whose_outputs_are_not_finite_affects_no_request(versions: Versions, reference: Alone) -> None:
    bad = versions.digests["liver", "9.0.0"]
    async with watching_router(versions) as router:
        await router.policy(versions.expert_set(), [versions.candidate("liver", "9.0.0", "shadow", 100)])
        stream = await router.generate(tokens=10).rest()
        assert stream.token_ids == reference.tokens(versions.expert_set(), ("liver",), 10)
        await until_async(lambda: router.control.servicer.observed(bad).requests == 1)
        observed = router.control.servicer.observed(bad)
        assert (observed.errors, observed.nonfinite) == (1, 1)
        assert not router.control.servicer.shadows


async def test_who_leaves_takes_the_shadow_along(versions: Versions) -> None:
    shadow = versions.digests["liver", "2.0.0"]
    async with watching_router(versions) as router:
        await router.policy(versions.expert_set(), [versions.candidate("liver", "2.0.0", "shadow", 100)])
        stream = await router.generate(tokens=1500).first()
        await until_async(lambda: router.engine.queue_length == 2)
        running = router.engine._scheduler.running
        await until_async(lambda: sorted(sequence.request.background for sequence in running) == [False, True])
        assert router.parts.service.queue_length == 1
        await router.policy(versions.expert_set())
        assert shadow in (await router.pins())[1]
        stream.call.cancel()
        await router.wait_for_pins(2, {member.bundle_digest for member in versions.expert_set().members})
        await asyncio.sleep(0.15)
        assert not router.control.servicer.shadows


async def test_shadows_make_way_for_requests(versions: Versions, reference: Alone) -> None:
    limits = RouterSection(max_batch_size=8, max_queue=1, max_new_tokens=2000)
    async with watching_router(versions, limits=limits) as router:
        await router.policy(versions.expert_set(), [versions.candidate("liver", "2.0.0", "shadow", 100)])
        shadows = router.parts.service._shadows
        streams = [await router.generate(tokens=800).first() for _ in range(3)]
        # With a queue of one, a shadow that had not begun yet gave way to the next request.
        await until_async(lambda: len(shadows) >= 1)
        streams += [await router.generate(("heart",), tokens=800).first() for _ in range(5)]
        # All eight are in the batch, and no shadow is.
        await until_async(lambda: len(shadows) == 0)
        assert router.engine.queue_length == 8
        streams[0].call.cancel()
        answer = await router.generate(tokens=30).rest()
        assert answer.token_ids == reference.tokens(versions.expert_set(), ("liver",), 30)
        for stream in streams[1:]:
            stream.call.cancel()
        stable = {member.bundle_digest for member in versions.expert_set().members}
        await router.wait_for_pins(1, stable | {versions.digests["liver", "2.0.0"]})
        await until_async(lambda: router.engine.free_blocks == router.engine.num_blocks)


async def test_a_shadow_beside_a_canary_speaks_for_itself_only(versions: Versions) -> None:
    candidates = [
        versions.candidate("heart", "2.0.0", "canary", 100),
        versions.candidate("liver", "2.0.0", "shadow", 100),
    ]
    async with watching_router(versions) as router:
        await router.policy(versions.expert_set(), candidates)
        stream = await router.generate(("liver", "heart"), tokens=10).rest()
        assert stream.versions == {"liver": "1.0.0", "heart": "2.0.0"}
        control = router.control.servicer
        await until_async(lambda: len(control.shadows) == 1)
        assert control.shadows[0].rollout_id == "liver-2.0.0"
        await until_async(lambda: control.observed(versions.digests["liver", "2.0.0"]).requests == 1)
        assert control.observed(versions.digests["heart", "2.0.0"]).requests == 1
