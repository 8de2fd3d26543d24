"""One channel per address for the replica's lifetime, and least-loaded calls."""

from collections import Counter

from echovlm_ray.serving.grpc.replica_pool import ReplicaPool


class Channels:
    """Opens numbered channels."""

    def __init__(self) -> None:
        self.opened: list[str] = []

    def open(self, address: str) -> str:
        self.opened.append(address)
        return f"{address}#{len(self.opened)}"


def test_a_channel_is_opened_once_and_again_for_a_replica_that_came_back() -> None:
    channels = Channels()
    pool = ReplicaPool(channels.open)
    assert pool.channel("a") == pool.channel("a") == "a#1"
    assert pool.channel("b") == "b#2"
    assert pool.keep_only(["b"]) == ["a#1"]
    assert pool.channel("a") == "a#3"
    assert sorted(pool.keep_only(())) == ["a#3", "b#2"]


def test_the_least_busy_of_the_least_tried_is_next() -> None:
    pool = ReplicaPool(Channels().open)
    assert pool.least_busy([]) is None
    live = ["a", "b", "c"]
    with pool.call("a"), pool.call("b"), pool.call("b"):
        assert pool.least_busy(live) == "c"
        assert pool.least_busy(live, Counter("c")) == "a"
        assert pool.least_busy(live, Counter("cab")) == "c"
        assert pool.least_busy(live, Counter("cabc")) == "a"
    assert pool.least_busy(live) == "a"


def test_a_channel_to_a_lost_replica_goes_when_its_last_call_has_ended() -> None:
    channels = Channels()
    pool = ReplicaPool(channels.open)
    with pool.call("a") as channel:
        assert channel == "a#1"
        assert pool.least_busy(["b"]) == "b"
        assert pool.channel("a") == "a#1"
    assert pool.least_busy(["b"]) == "b"
    assert pool.keep_only(()) == []
