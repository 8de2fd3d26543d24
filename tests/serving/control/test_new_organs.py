"""A new organ: the errors of requests until routers have its policy, and during its canary."""

import asyncio
from collections.abc import Collection
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from echovlm_ray.serving.lm.router_client import RouterClient
from protos import router_pb2
from router.gating.expert_gates import BundleGates
from router.rollouts.traffic import TrafficPolicy
from tests.serving.rollout_feed import Versions, WatchingRouter, make_versions, watching_router
from tests.waiting import until_async


@pytest.fixture(scope="module")
def versions(golden_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Versions:
    return make_versions(golden_dir / "base" / "checkpoint", tmp_path_factory.mktemp("versions"))


async def refusal(router: WatchingRouter, organ: str, **fields: Any) -> tuple[grpc.StatusCode, dict[str, Any], str]:
    """The status of a request that is refused, its details by their type, and its text."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await router.generate((organ,), tokens=2, **fields).rest()
    details: dict[str, Any] = {}
    status = rpc_status.from_call(caught.value)
    for packed in status.details if status is not None else ():
        for kind in (error_details_pb2.ErrorInfo, error_details_pb2.RetryInfo):
            detail = kind()
            if packed.Unpack(detail):
                details[kind.__name__] = detail
    return caught.value.code(), details, str(caught.value.details())


async def reading_is_held(router: WatchingRouter, policy: TrafficPolicy) -> asyncio.Event:
    """Control sends a policy that the router has received and cannot apply before the event is set."""
    go_on, loop = asyncio.Event(), asyncio.get_running_loop()
    expert_sets = router.parts.expert_sets
    read = expert_sets._read

    def hold(digest: str, in_use: Collection[str]) -> BundleGates:
        asyncio.run_coroutine_threadsafe(go_on.wait(), loop).result(30)
        return read(digest, in_use)

    expert_sets._read = hold
    await router.control.servicer.set(policy)
    await until_async(lambda: expert_sets._announced.version == policy.version)
    return go_on


@pytest.mark.parametrize("in_canary", [False, True])
async def test_until_a_router_has_a_new_organ_it_is_unavailable_and_never_not_found(
    versions: Versions, in_canary: bool
) -> None:
    lung = versions.candidate("lung", "1.0.0", "canary", 100)
    policy = TrafficPolicy(version=7, stable=versions.expert_set(lung="1.0.0"))
    if in_canary:
        policy = TrafficPolicy(version=7, stable=versions.expert_set(), candidates=(lung,))
    async with watching_router(versions) as router:
        assert (await refusal(router, "lung"))[0] == grpc.StatusCode.NOT_FOUND
        go_on = await reading_is_held(router, policy)
        for organ in ("lung", "a word that may be a synonym"):
            code, details, _ = await refusal(router, organ)
            assert code == grpc.StatusCode.UNAVAILABLE
            assert details["ErrorInfo"].reason == "ORGAN_PENDING"
            assert 0 < details["RetryInfo"].retry_delay.ToMilliseconds() <= 1000
        assert (await router.generate(("liver",), tokens=2).rest()).versions == {"liver": "1.0.0"}
        go_on.set()
        await until_async(lambda: router.parts.expert_sets.policy.version == 7)
        assert (await router.generate(("lung",), tokens=2).rest()).versions == {"lung": "1.0.0"}
        assert (await refusal(router, "spleen"))[0] == grpc.StatusCode.NOT_FOUND


async def test_a_caller_that_knows_a_newer_policy_is_asked_to_wait(versions: Versions) -> None:
    async with watching_router(versions) as router:
        version = await router.policy(versions.expert_set())
        assert (await refusal(router, "lung", policy_version=version))[0] == grpc.StatusCode.NOT_FOUND
        code, details, _ = await refusal(router, "lung", policy_version=version + 1)
        assert (code, details["ErrorInfo"].reason) == (grpc.StatusCode.UNAVAILABLE, "ORGAN_PENDING")


async def test_a_policy_that_can_never_be_taken_up_leaves_not_found(versions: Versions) -> None:
    other = versions.expert_set(lung="1.0.0").model_copy(update={"backbone_digest": "c" * 64})
    async with watching_router(versions) as router:
        await router.control.servicer.set(TrafficPolicy(version=5, stable=other))
        async with asyncio.timeout(10):
            while router.control.servicer.taken_up.get(router.feed.name) is None:
                await asyncio.sleep(0.005)
        await until_async(lambda: router.parts.expert_sets._announced.version == 0)
        assert (await refusal(router, "lung"))[0] == grpc.StatusCode.NOT_FOUND


async def test_who_is_not_in_a_new_organs_canary_is_told_so(versions: Versions) -> None:
    async with watching_router(versions) as router:
        await router.policy(versions.expert_set(), [versions.candidate("lung", "1.0.0", "canary", 0.001)])
        for fields in ({"request_id": "not chosen"}, {"session_key": "not chosen either"}):
            code, details, text = await refusal(router, "lung", **fields)
            assert code == grpc.StatusCode.FAILED_PRECONDITION
            assert details["ErrorInfo"].reason == "ORGAN_IN_CANARY"
            assert dict(details["ErrorInfo"].metadata) == {"organ": "lung", "percent": "0.001"}
            assert "'lung' is new and in canary: its experts answer 0.001 % of the requests" in text
            assert "RetryInfo" not in details
        code, _, _ = await refusal(router, "spleen")
        assert code == grpc.StatusCode.NOT_FOUND
        await router.policy(versions.expert_set())
        assert (await refusal(router, "lung"))[0] == grpc.StatusCode.NOT_FOUND, "the canary was taken back"


async def test_a_router_says_which_policy_is_in_force_and_says_it_to_a_new_control(versions: Versions) -> None:
    async with watching_router(versions) as router:
        taken_up = router.control.servicer.taken_up
        go_on = await reading_is_held(router, TrafficPolicy(version=1, stable=versions.expert_set(liver="2.0.0")))
        await until_async(lambda: router.feed.name in taken_up)
        assert taken_up == {router.feed.name: 0}
        go_on.set()
        await until_async(lambda: taken_up == {router.feed.name: 1})
        await router.control.stop()
        taken_up.clear()
        await router.control.start()
        await until_async(lambda: taken_up == {router.feed.name: 1})


async def test_the_gateway_sends_a_request_again_until_its_router_has_the_organ(versions: Versions) -> None:
    async with watching_router(versions) as router:
        client = RouterClient(lambda: [router.address])
        request = router_pb2.RouterGenerateRequest(
            input_ids=[5, 6, 7], max_new_tokens=2, organ_hints=router_pb2.OrganHints(organs=["lung"]), policy_version=1
        )
        deadline = asyncio.get_running_loop().time() + 60

        async def ask() -> list[router_pb2.RouterGenerateResponse]:
            return [each async for each in client.generate(request, deadline=deadline, request_id="first")]

        answer = asyncio.create_task(ask())
        await asyncio.sleep(0.5)
        assert not answer.done()
        await router.policy(versions.expert_set(lung="1.0.0"))
        (organ,) = (await answer)[-1].summary.provenance.organs
        assert (organ.organ, organ.bundle_version) == ("lung", "1.0.0")
        await client.close()
