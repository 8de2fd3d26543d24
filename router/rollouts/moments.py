"""When each rollout entered its state, by the monotonic clock."""

from collections.abc import Callable, Hashable, Iterable

from router.rollouts.records import Rollout


class Moments:
    """When this process first saw each rollout in its state, and first with traffic.

    The database has times of day, for people: the wall clock may be set while a rollout waits. Holds and time limits
    are measured from here instead. After a restart they begin again, so a restart may lengthen them and never shortens
    them. Used by one thread.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        """Takes a monotonic clock in seconds."""
        self._clock = clock
        self._seen: dict[Hashable, float] = {}

    def note(self, rollouts: Iterable[Rollout], pass_began: float) -> None:
        """Records all rollouts of which something is still measured, and drops the others.

        Args:
            rollouts: as they stand now.
            pass_began: when the pass began that may have given them traffic: what is reported while it goes on counts.
        """
        now = self._clock()
        seen: dict[Hashable, float] = {}
        for rollout in rollouts:
            seen[_state_key(rollout)] = now
            if rollout.traffic_since is not None:
                seen[_traffic_key(rollout)] = pass_began
        self._seen = {key: self._seen.get(key, first) for key, first in seen.items()}

    def in_state_s(self, rollout: Rollout) -> float:
        """Seconds that a rollout has been in its state, and in its step, as far as this process knows."""
        return self._clock() - self.state_since(rollout)

    def state_since(self, rollout: Rollout) -> float:
        """When this process first saw a rollout, one of those noted, in its state and step."""
        return self._seen.get(_state_key(rollout), self._clock())

    def traffic_since(self, rollout: Rollout) -> float:
        """When this process first saw that a rollout, one of those noted, has had traffic."""
        return self._seen.get(_traffic_key(rollout), self._clock())


def _state_key(rollout: Rollout) -> Hashable:
    return rollout.id, rollout.state, rollout.state_since, rollout.percent, rollout.next_step


def _traffic_key(rollout: Rollout) -> Hashable:
    return rollout.id, "traffic"
