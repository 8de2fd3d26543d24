import json
import math

from hypothesis import given
from hypothesis import strategies as st

from router.rollouts.settings import Mode
from router.rollouts.traffic import CandidateTraffic, TrafficPolicy, assign, with_candidates
from tests.router.rollouts.support import digest, set_of

STABLE = set_of(breast="a", heart="b", liver="c")
NAMES = st.text(min_size=1, max_size=30)
PERCENTAGES = st.floats(0, 100)


def candidate(organ: str, percent: float, mode: Mode = "canary", rollout_id: str = "r-1") -> CandidateTraffic:
    return CandidateTraffic(
        organ=organ, digest=digest(f"new {organ}"), rollout_id=rollout_id, mode=mode, percent=percent
    )


def policy_of(*candidates: CandidateTraffic) -> TrafficPolicy:
    return TrafficPolicy(version=1, stable=STABLE, candidates=candidates)


def gets(policy: TrafficPolicy, organ: str, key: str) -> bool:
    assigned = assign(policy, [organ], request_id=key)
    return assigned.expert_set.bundle_digest(organ) == digest(f"new {organ}")


@given(percent=st.sampled_from([0.5, 1, 5, 25, 50, 90, 99]), rollout_id=NAMES)
def test_the_part_of_the_requests_is_what_was_asked(percent: float, rollout_id: str) -> None:
    policy = policy_of(candidate("heart", percent, rollout_id=rollout_id))
    requests = 2000
    chosen = sum(gets(policy, "heart", f"request {number}") for number in range(requests))
    part = percent / 100
    # Six standard deviations: about once in 10⁸ examples by chance.
    assert abs(chosen - requests * part) <= 6 * math.sqrt(requests * part * (1 - part)) + 1


@given(session=NAMES, requests=st.lists(NAMES, min_size=2, max_size=5), percent=PERCENTAGES)
def test_a_session_always_gets_the_same(session: str, requests: list[str], percent: float) -> None:
    policy = policy_of(candidate("heart", percent), candidate("liver", percent, "shadow"))
    answers = {
        (assigned.expert_set.id, assigned.shadow_set and assigned.shadow_set.id)
        for assigned in (assign(policy, None, request_id=request, session_key=session) for request in requests)
    }
    assert len(answers) == 1


@given(key=NAMES, low=PERCENTAGES, high=PERCENTAGES)
def test_raising_the_percentage_only_adds(key: str, low: float, high: float) -> None:
    low, high = sorted((low, high))
    if gets(policy_of(candidate("heart", low)), "heart", key):
        assert gets(policy_of(candidate("heart", high)), "heart", key)


@given(key=NAMES)
def test_the_ends_of_the_scale_are_exact(key: str) -> None:
    assert not gets(policy_of(candidate("heart", 0)), "heart", key)
    assert gets(policy_of(candidate("heart", 100)), "heart", key)


def test_organs_and_rollouts_are_independent_of_each_other() -> None:
    keys = [f"request {number}" for number in range(4000)]
    pairs = [
        (policy_of(candidate("heart", 50)), "heart", policy_of(candidate("liver", 50)), "liver"),
        (policy_of(candidate("heart", 50)), "heart", policy_of(candidate("heart", 50, rollout_id="r-2")), "heart"),
    ]
    for first, first_organ, second, second_organ in pairs:
        both = sum(gets(first, first_organ, key) and gets(second, second_organ, key) for key in keys)
        # A quarter, within six standard deviations.
        assert abs(both - 1000) <= 6 * math.sqrt(4000 * 0.25 * 0.75)


def test_a_session_and_a_request_of_the_same_name_are_two_things() -> None:
    policy = policy_of(candidate("heart", 50))
    by_request = [assign(policy, None, request_id=f"{n}").expert_set.id for n in range(64)]
    by_session = [assign(policy, None, request_id="x", session_key=f"{n}").expert_set.id for n in range(64)]
    assert by_request != by_session


def test_only_the_organs_of_a_request_are_replaced() -> None:
    policy = policy_of(candidate("heart", 100), candidate("liver", 100))
    assert assign(policy, ["breast"], request_id="r").expert_set is STABLE
    expert_set = assign(policy, ["heart"], request_id="r").expert_set
    assert [member.bundle_digest for member in expert_set.members] == [digest("a"), digest("new heart"), digest("c")]


def test_flat_routing_replaces_each_organ_by_itself() -> None:
    flat = set_of("flat", breast="a", heart="b", liver="c")
    policy = TrafficPolicy(version=1, stable=flat, candidates=(candidate("heart", 50), candidate("liver", 50)))
    sets = {assign(policy, None, request_id=f"r{number}").expert_set.id for number in range(200)}
    assert len(sets) == 4


def test_a_shadow_stands_on_what_answers() -> None:
    policy = policy_of(candidate("heart", 100), candidate("liver", 100, "shadow"))
    assigned = assign(policy, None, request_id="r")
    assert assigned.shadow_set is not None
    assert assigned.expert_set.bundle_digest("heart") == digest("new heart")
    assert assigned.expert_set.bundle_digest("liver") == digest("c")
    assert assigned.shadow_set.bundle_digest("heart") == digest("new heart")
    assert assigned.shadow_set.bundle_digest("liver") == digest("new liver")
    assert assign(policy, ["heart"], request_id="r").shadow_set is None


def test_sets_are_replaced_and_never_changed() -> None:
    before = STABLE.model_dump_json(), STABLE.id
    changed = with_candidates(STABLE, [candidate("heart", 1), candidate("lung", 1)])
    assert changed.organs == ("breast", "heart", "liver", "lung")
    assert (STABLE.model_dump_json(), STABLE.id) == before
    assert changed.id != STABLE.id


def test_a_policy_travels_as_plain_values() -> None:
    policy = policy_of(candidate("heart", 12.5), candidate("lung", 3, "shadow"))
    assert TrafficPolicy.from_dict(json.loads(json.dumps(policy.to_dict()))) == policy
    assert policy.organs == ("breast", "heart", "liver", "lung")
    assert policy.digests == {digest(name) for name in ("a", "b", "c", "new heart", "new lung")}
