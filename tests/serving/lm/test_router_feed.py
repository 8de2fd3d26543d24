"""A router with Control's policies, with invalid ones, and without Control."""

import asyncio
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from echovlm_ray.engine.sampler import NonFiniteLogitsError
from echovlm_ray.errors import DeadlineError
from echovlm_ray.serving.cluster.policy_follower import UnusablePolicyError
from echovlm_ray.serving.lm.admission import UsedBundle
from echovlm_ray.serving.lm.feed import policy_from_proto
from echovlm_ray.serving.lm.outcomes import Outcomes, report_of
from protos import control_pb2
from router.errors import ExpertsFailedError, ExpertsUnavailableError, ExpertsUnusableError
from router.gating.expert_set import ExpertSet, ExpertSetMember
from router.rollouts.traffic import CandidateTraffic, TrafficPolicy
from tests.serving.rollout_feed import Versions, make_versions, policy_to_proto, watching_router
from tests.waiting import until_async


@pytest.fixture(scope="module")
def versions(golden_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Versions:
    return make_versions(golden_dir / "base" / "checkpoint", tmp_path_factory.mktemp("versions"))


async def test_without_control_the_checkpoints_own_set_serves_as_policy_0(versions: Versions) -> None:
    own = versions.expert_set()
    async with watching_router(versions, control_runs=False) as router:
        assert (await router.generate().rest()).provenance.expert_set_id == own.id
        assert await router.pins() == (0, {member.bundle_digest for member in own.members})
        await router.control.start()
        second = versions.expert_set(liver="2.0.0")
        await router.policy(second)
        assert (await router.generate().rest()).provenance.expert_set_id == second.id
        assert router.control.servicer.watchers == {router.feed.name}


async def test_without_control_what_it_last_left_serves_until_it_says_something_newer(versions: Versions) -> None:
    left = TrafficPolicy(version=7, stable=versions.expert_set(liver="2.0.0"))
    async with watching_router(versions, control_runs=False, last_known=left) as router:
        assert (await router.generate().rest()).versions == {"liver": "2.0.0"}
        assert await router.pins() == (7, set(left.digests))
        router.version = 7
        await router.control.start()
        await router.policy(versions.expert_set(liver="3.0.0"))
        assert (await router.generate().rest()).versions == {"liver": "3.0.0"}


async def test_what_control_says_counts_and_not_what_an_earlier_one_left(versions: Versions) -> None:
    left = TrafficPolicy(version=7, stable=versions.expert_set(liver="2.0.0"))
    now = TrafficPolicy(version=5, stable=versions.expert_set(liver="3.0.0"))
    async with watching_router(versions, last_known=left, said=now) as router:
        assert router.parts.expert_sets.policy.version == 5
        assert (await router.generate().rest()).versions == {"liver": "3.0.0"}


async def test_it_goes_on_while_control_is_away_and_reports_afterwards(versions: Versions) -> None:
    digest = versions.digests["liver", "2.0.0"]
    async with watching_router(versions) as router:
        await router.policy(versions.expert_set(liver="2.0.0"))
        await router.control.stop()
        for _ in range(5):
            assert (await router.generate(tokens=4).rest()).versions == {"liver": "2.0.0"}
        await asyncio.sleep(0.3)
        # Elsewhere, as after a restart, and with an older state first.
        await router.control.servicer.set(TrafficPolicy(version=0, stable=versions.expert_set()))
        await router.control.start()
        await until_async(lambda: router.control.servicer.observed(digest).requests == 5)
        observed = router.control.servicer.observed(digest)
        assert (observed.errors, observed.tokens, len(observed.seconds_per_token)) == (0, 20, 5)
        assert all(0 < seconds < 1 for seconds in observed.seconds_per_token)
        assert router.parts.expert_sets.policy.version == 1
        await router.policy(versions.expert_set(liver="3.0.0"))


async def test_a_smaller_version_is_ignored(versions: Versions) -> None:
    async with watching_router(versions) as router:
        router.version = 7
        await router.policy(versions.expert_set(liver="2.0.0"))
        await router.control.servicer.set(TrafficPolicy(version=3, stable=versions.expert_set()))
        await asyncio.sleep(0.2)
        assert (await router.pins())[0] == 8
        assert (await router.generate().rest()).versions == {"liver": "2.0.0"}


async def test_a_policy_of_another_deployment_is_refused_whatever_its_number(versions: Versions) -> None:
    ours, theirs = "a" * 32, "b" * 32
    async with watching_router(versions) as router:

        async def say(version: int, liver: str, identity: str) -> None:
            stable = versions.expert_set(liver=liver)
            await router.control.servicer.set(TrafficPolicy(version=version, stable=stable, identity=identity))

        await say(1, "2.0.0", ours)
        await until_async(lambda: router.parts.expert_sets.policy.version == 1)
        await say(9, "3.0.0", theirs)
        await asyncio.sleep(0.2)
        assert (await router.pins())[0] == 1
        with pytest.raises(UnusablePolicyError, match="of the deployment bbbb"):
            await router.parts.expert_sets.take_up(
                TrafficPolicy(version=1, stable=versions.expert_set(), identity=theirs)
            )
        await say(2, "3.0.0", ours)
        await until_async(lambda: router.parts.expert_sets.policy.version == 2)


@pytest.mark.parametrize("field", ["backbone_digest", "routing"])
async def test_a_policy_for_another_model_is_refused(versions: Versions, field: str) -> None:
    async with watching_router(versions) as router:
        await router.policy(versions.expert_set(liver="2.0.0"))
        other = {"backbone_digest": "c" * 64, "routing": "flat"}[field]
        stable = ExpertSet.model_validate(versions.expert_set().model_dump() | {field: other})
        await router.control.servicer.set(TrafficPolicy(version=2, stable=stable))
        await asyncio.sleep(0.2)
        assert (await router.pins())[0] == 1
        router.version = 2
        await router.policy(versions.expert_set(liver="3.0.0"))


async def test_a_bundle_that_cannot_be_read_leaves_the_old_policy_until_it_can(
    golden_dir: Path, tmp_path: Path
) -> None:
    versions = make_versions(golden_dir / "base" / "checkpoint", tmp_path)
    manifest = versions.split.registry / "bundles" / "liver" / "2.0.0" / "manifest.json"
    hidden = tmp_path / "hidden.json"
    placement = versions.placement()
    manifest.rename(hidden)
    async with watching_router(versions, placement=placement) as router:
        wanted = TrafficPolicy(version=1, stable=versions.expert_set(liver="2.0.0"))
        await router.control.servicer.set(wanted)
        await asyncio.sleep(0.3)
        assert (await router.pins())[0] == 0
        assert (await router.generate().rest()).versions == {"liver": "1.0.0"}
        hidden.rename(manifest)
        await until_async(lambda: router.parts.expert_sets.policy.version == 1)
        assert (await router.generate().rest()).versions == {"liver": "2.0.0"}
        # A newer policy does not wait for one that cannot be taken up.
        manifest.rename(hidden)
        router.version = 2
        bad = TrafficPolicy(version=2, stable=versions.expert_set(liver="2.0.0", heart="2.0.0"))
        (versions.split.registry / "bundles" / "heart" / "2.0.0" / "manifest.json").unlink()
        await router.control.servicer.set(bad)
        await asyncio.sleep(0.1)
        await router.policy(versions.expert_set(liver="3.0.0"))


async def test_a_candidate_without_finite_outputs_is_named_and_no_other(versions: Versions) -> None:
    bad, heart = versions.digests["liver", "9.0.0"], versions.digests["heart", "1.0.0"]
    async with watching_router(versions) as router:
        await router.policy(versions.expert_set(), [versions.candidate("liver", "9.0.0", "canary", 100)])
        stream = router.generate(("liver", "heart"))
        with pytest.raises(Exception, match="internal error"):
            await stream.rest()
        control = router.control.servicer
        await until_async(lambda: control.observed(bad).requests == 1)
        assert (control.observed(bad).errors, control.observed(bad).nonfinite) == (1, 1)
        assert (control.observed(heart).requests, control.observed(heart).errors) == (1, 0)


def used(organ: str, digest: str, *, candidate: bool = False) -> UsedBundle:
    rollout = CandidateTraffic(organ=organ, digest=digest, rollout_id="r", mode="canary", percent=1)
    return UsedBundle(organ, digest, "1.0.0", rollout if candidate else None)


def observations(outcomes: Outcomes) -> dict[str, control_pb2.Observation]:
    return {each.digest: each for each in report_of("router", *outcomes.take()).observations}


def record(outcomes: Outcomes, bundles: list[UsedBundle], error: Exception | None, tokens: int = 3) -> None:
    outcomes.record(bundles, error, tokens=tokens, seconds_per_token=0.5, last_progress=100.0)


def test_whose_error_it_is() -> None:
    outcomes = Outcomes()
    pair = [used("liver", "l"), used("heart", "h")]
    record(outcomes, pair, ExpertsFailedError("liver", "why"))
    found = observations(outcomes)
    assert [(found[d].requests, found[d].errors, found[d].nonfinite) for d in "lh"] == [(1, 1, 0), (1, 0, 0)]
    assert not found["l"].seconds_per_token
    record(outcomes, pair, NonFiniteLogitsError())
    assert [(each.errors, each.nonfinite) for each in observations(outcomes).values()] == [(1, 1), (1, 1)]
    record(outcomes, [used("liver", "l", candidate=True), used("heart", "h")], NonFiniteLogitsError())
    found = observations(outcomes)
    assert [(found[d].errors, found[d].nonfinite) for d in "lh"] == [(1, 1), (0, 0)]
    record(outcomes, pair, DeadlineError("late"))
    assert all(not each.errors and list(each.seconds_per_token) == [0.5] for each in observations(outcomes).values())
    record(outcomes, pair, DeadlineError("late"), tokens=0)
    assert not observations(outcomes)


def test_what_was_cut_short_before_its_second_token_is_no_success() -> None:
    """Where every answer takes too long, nothing else is ever seen of a version."""
    outcomes = Outcomes()
    for error in (DeadlineError("late"), None):
        outcomes.record(
            [used("liver", "l")], error, tokens=1, seconds_per_token=None, last_progress=1.0, complete=False
        )
    assert not observations(outcomes)
    outcomes.record([used("liver", "l")], None, tokens=1, seconds_per_token=None, last_progress=1.0, complete=True)
    assert observations(outcomes)["l"].requests == 1


def test_a_lost_organ_is_no_versions_error_but_a_version_that_is_missing_alone_is() -> None:
    outcomes = Outcomes()
    lost = ExpertsUnavailableError("liver", "gone")
    record(outcomes, [used("liver", "new")], lost, tokens=0)
    assert not observations(outcomes)
    # The other version stopped in the same moment.
    outcomes.note_token([used("liver", "old")], 100.01)
    record(outcomes, [used("liver", "new")], lost, tokens=0)
    assert not observations(outcomes)
    outcomes.note_token([used("heart", "other")], 110.0)
    # It was cut off, so it is no success either; the other organ's experts did what they should.
    record(outcomes, [used("liver", "new"), used("heart", "h")], lost)
    assert {digest: each.errors for digest, each in observations(outcomes).items()} == {"h": 0}
    outcomes.note_token([used("liver", "old")], 102.0)
    record(outcomes, [used("liver", "new"), used("heart", "h")], lost, tokens=0)
    found = observations(outcomes)
    assert list(found) == ["new"]
    assert found["new"].errors == 1


def test_a_request_that_waited_long_and_was_stalled_shortly_at_its_deadline_says_nothing() -> None:
    outcomes = Outcomes()
    lost = ExpertsUnavailableError("liver", "gone")
    # It came at 100, waited in the queue, and its caller's deadline was just when a replica did not answer.
    lost.since = 109.5
    outcomes.note_token([used("liver", "old")], 109.6)
    record(outcomes, [used("liver", "new")], lost, tokens=0)
    assert not observations(outcomes)
    outcomes.note_token([used("liver", "old")], 111.0)
    record(outcomes, [used("liver", "new")], lost, tokens=0)
    assert observations(outcomes)["new"].errors == 1


def test_a_version_that_no_replica_could_load_is_its_own_error_and_no_others() -> None:
    outcomes = Outcomes()
    error = ExpertsUnusableError("liver", "new", "the bundle is damaged")
    record(outcomes, [used("liver", "new", candidate=True), used("heart", "h")], error, tokens=0)
    found = observations(outcomes)
    assert {digest: each.errors for digest, each in found.items()} == {"new": 1}


def test_outcomes_are_bounded_and_the_oldest_go_first() -> None:
    outcomes = Outcomes(max_waiting=10)
    for index in range(25):
        record(outcomes, [used("liver", f"{index}")], None)
    runs, shadows = outcomes.take()
    assert [run.digest for run in runs] == [f"{index}" for index in range(15, 25)]
    record(outcomes, [used("liver", "newest")], None)
    outcomes.give_back(runs, shadows)
    assert [run.digest for run in outcomes.take()[0]] == [f"{index}" for index in range(16, 25)] + ["newest"]


digests = st.text("abcdef0123456789", min_size=1, max_size=8)


@given(
    st.integers(0, 2**63 - 1),
    st.dictionaries(st.sampled_from(["breast", "liver", "lung"]), digests, min_size=1),
    st.dictionaries(st.sampled_from(["breast", "liver", "heart"]), st.tuples(digests, st.floats(0, 100))),
)
def test_a_policy_survives_the_wire(
    version: int, stable: dict[str, str], candidates: dict[str, tuple[str, float]]
) -> None:
    members = tuple(ExpertSetMember(organ=organ, bundle_digest=digest) for organ, digest in stable.items())
    policy = TrafficPolicy(
        version=version,
        stable=ExpertSet(backbone_digest="b", routing="organs", members=members),
        candidates=tuple(
            CandidateTraffic(organ=organ, digest=digest, rollout_id=organ, mode="shadow", percent=percent)
            for organ, (digest, percent) in candidates.items()
        ),
    )
    message = policy_to_proto(policy)
    assert policy_from_proto(control_pb2.TrafficPolicy.FromString(message.SerializeToString())) == policy
    message.stable.id = "another"
    with pytest.raises(ValueError, match="another"):
        policy_from_proto(message)
