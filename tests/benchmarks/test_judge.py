from benchmarks.judge import TARGET_REQUESTS, WAYS, bad, bad_lines, good, good_lines, requests_until_back, share_within
from router.rollouts.states import State


def test_good_candidates_go_through_and_bad_ones_go_back() -> None:
    outcomes = [good(seed) for seed in range(4)]
    assert [(each.state, each.was_stable) for each in outcomes] == [(State.STABLE, True)] * 4
    assert all(each.requests >= 60 for each in outcomes)
    for way in WAYS:
        requests = requests_until_back([bad(0.5, way, seed) for seed in range(3)])
        assert share_within(requests, TARGET_REQUESTS) == 1.0
        assert "100.0%" in bad_lines({(0.5, way.name): requests})[-1]
    assert all(line.endswith("| 0 | 0 |") for line in good_lines(outcomes)[2:])


def test_what_was_not_taken_back_is_no_success() -> None:
    assert share_within([10, float("inf")], TARGET_REQUESTS) == 0.5
