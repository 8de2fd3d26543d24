"""Requests of an evaluation: answered by the version that they name, after all callers, and no evidence of traffic."""

from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from echovlm_ray.config import RouterSection
from tests.serving.rollout_feed import Alone, Versions, alone, make_versions, watching_router
from tests.waiting import until_async


@pytest.fixture(scope="module")
def versions(golden_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Versions:
    return make_versions(golden_dir / "base" / "checkpoint", tmp_path_factory.mktemp("versions"))


@pytest.fixture(scope="module")
def reference(versions: Versions) -> Iterator[Alone]:
    with alone(versions) as engine:
        yield engine


@pytest.mark.parametrize("mode", ["shadow", "canary"])
@pytest.mark.parametrize("version", ["1.0.0", "2.0.0"])
async def test_the_version_that_is_named_answers(versions: Versions, reference: Alone, version: str, mode: str) -> None:
    percent = 0 if mode == "shadow" else 50
    async with watching_router(versions) as router:
        await router.policy(versions.expert_set(), [versions.candidate("liver", "2.0.0", mode, percent)])
        digest = versions.digests["liver", version]
        for _ in range(4):
            stream = await router.generate(tokens=20, evaluated_bundle=digest).rest()
            assert stream.versions == {"liver": version}
            assert stream.token_ids == reference.tokens(versions.expert_set(liver=version), ("liver",), 20)
        # The others get what the policy says.
        plain = await router.generate(tokens=20).rest()
        observed = router.control.servicer.observed
        await until_async(lambda: sum(observed(versions.digests["liver", v]).requests for v in ("1.0.0", "2.0.0")) == 1)
        assert mode == "canary" or plain.versions == {"liver": "1.0.0"}
        assert not router.control.servicer.shadows


async def test_a_version_that_the_policy_lacks_is_asked_for_again_later(versions: Versions) -> None:
    async with watching_router(versions) as router:
        await router.policy(versions.expert_set())
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await router.generate(evaluated_bundle=versions.digests["liver", "2.0.0"]).rest()
        assert raised.value.code() == grpc.StatusCode.UNAVAILABLE


async def test_an_evaluation_leaves_the_batch_to_callers(versions: Versions, reference: Alone) -> None:
    digest = versions.digests["liver", "1.0.0"]
    async with watching_router(versions, limits=RouterSection(max_batch_size=2, max_queue=8)) as router:
        await router.policy(versions.expert_set())
        evaluation = await router.generate(tokens=1000, evaluated_bundle=digest).first()
        assert [sequence.request.background for sequence in router.engine._scheduler.running] == [True]
        callers = [await router.generate(("heart",), tokens=200).first()]
        waiting = router.generate(("heart",), tokens=30)
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await evaluation.rest()
        assert raised.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        expected = reference.tokens(versions.expert_set(), ("heart",), 30)
        assert (await waiting.rest()).token_ids == expected
        callers.append(await router.generate(("heart",), tokens=200).first())
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await router.generate(evaluated_bundle=digest).rest()
        assert raised.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        for caller in callers:
            caller.call.cancel()
        await until_async(lambda: router.engine.free_blocks == router.engine.num_blocks)
