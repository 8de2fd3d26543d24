"""A replica serves its organ while the version of the requests is resident, with any other bundles."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from echovlm_ray.serving.cluster.organ_health import OrganHealth, OrganPolicy
from echovlm_ray.serving.control.messages import policy_to_proto
from experts.errors import ExpertCapacityError, UnknownBundleError
from experts.group import ExpertGroup
from experts.kernels.registry import get_kernel
from experts.registry.registry import Registry
from protos import control_pb2
from router.gating.expert_set import ExpertSet
from router.rollouts.traffic import CandidateTraffic, TrafficPolicy
from tests.serving.rollout_feed import Control, Versions, make_versions
from tests.waiting import until_async

SERVICE = "echovlm.v1.ExpertGroup/liver"


@pytest.fixture
def versions(golden_dir: Path, tmp_path: Path) -> Versions:
    return make_versions(golden_dir / "base" / "checkpoint", tmp_path)


def group_of(versions: Versions, max_resident_bytes: int = 10**9) -> ExpertGroup:
    registry = Registry(versions.split.registry)
    return ExpertGroup("liver", registry, get_kernel("reference"), device="cpu", max_resident_bytes=max_resident_bytes)


def message(expert_set: ExpertSet, version: int = 1) -> control_pb2.TrafficPolicy:
    return policy_to_proto(TrafficPolicy(version=version, stable=expert_set), lambda digest: "9.9.9")


@asynccontextmanager
async def published(
    group: ExpertGroup, control: Control, policy: control_pb2.TrafficPolicy | None
) -> AsyncIterator[tuple[OrganHealth, dict[str, bool]]]:
    said: dict[str, bool] = {}

    async def publish(service: str, serving: bool) -> None:
        said[service] = serving

    health = OrganHealth(group, lambda: list(control.addresses), publish, OrganPolicy("liver", policy))
    await health.start()
    try:
        yield health, said
    finally:
        await health.stop()


async def test_it_serves_while_the_stable_version_is_resident(versions: Versions) -> None:
    stable = versions.expert_set()
    group = group_of(versions)
    async with published(group, Control(), message(stable)) as (health, said):
        assert said == {SERVICE: False}
        assert health.problem() == "does not hold liver 9.9.9: it is not loaded yet"
        await asyncio.to_thread(group.load, stable.bundle_digest("liver"))
        await until_async(lambda: said[SERVICE])
        assert health.problem() == ""
        group.unload(stable.bundle_digest("liver"))
        await until_async(lambda: not said[SERVICE])


async def test_another_version_is_not_enough_after_a_promotion(versions: Versions) -> None:
    first, second = versions.expert_set(), versions.expert_set(liver="2.0.0")
    group = group_of(versions)
    group.load(first.bundle_digest("liver"))
    control = Control()
    await control.start()
    try:
        async with published(group, control, message(first)) as (_, said):
            assert said == {SERVICE: True}
            await control.servicer.set(TrafficPolicy(version=2, stable=second))
            await until_async(lambda: not said[SERVICE])
            group.load(second.bundle_digest("liver"))
            await until_async(lambda: said[SERVICE])
    finally:
        await control.stop()


async def test_a_candidate_that_is_missing_takes_nothing_from_the_stable_version(versions: Versions) -> None:
    first, second = versions.expert_set(), versions.expert_set(liver="2.0.0")
    group = group_of(versions)
    group.load(first.bundle_digest("liver"))
    candidate = CandidateTraffic(
        organ="liver", digest=second.bundle_digest("liver"), rollout_id="liver-2", mode="canary", percent=5
    )
    policy = policy_to_proto(TrafficPolicy(version=1, stable=first, candidates=(candidate,)), lambda digest: "")
    async with published(group, Control(), policy) as (health, said):
        assert said == {SERVICE: True}
        assert health.problem() == ""


@pytest.mark.parametrize(
    ("limit", "known", "words"),
    [(1000, True, "above the limit max_resident_bytes = 1000"), (10**9, False, "has no bundle with the digest")],
)
async def test_the_problem_is_why_the_last_load_failed(versions: Versions, limit: int, known: bool, words: str) -> None:
    stable = versions.expert_set()
    digest = stable.bundle_digest("liver") if known else "0" * 64
    members = tuple(
        member.model_copy(update={"bundle_digest": digest}) if member.organ == "liver" else member
        for member in stable.members
    )
    group = group_of(versions, limit)
    async with published(group, Control(), message(stable.model_copy(update={"members": members}))) as (health, said):
        with pytest.raises((ExpertCapacityError, UnknownBundleError)):
            group.load(digest)
        assert words in health.problem()
        assert said == {SERVICE: False}


async def test_before_anything_is_known_any_version_counts(versions: Versions) -> None:
    group = group_of(versions)
    async with published(group, Control(), None) as (health, said):
        assert said == {SERVICE: False}
        group.load(versions.expert_set().bundle_digest("liver"))
        await until_async(lambda: said[SERVICE])
        assert health.problem() == ""
