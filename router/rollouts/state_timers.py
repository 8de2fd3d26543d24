"""How long each rollout has been in its state, by a monotonic clock."""

from collections.abc import Callable, Hashable, Iterable

from router.rollouts.records import Rollout


class StateTimers:
    """When this process first saw each rollout in its state, and with traffic.

    The database has times of day for people, but the wall clock may be set while a rollout waits. So hold times and
    time limits are measured here. After a restart they begin again: a restart may lengthen them, but never shortens
    them. Not thread-safe.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        """`clock` must be monotonic, in seconds."""
        self._clock = clock
        self._seen: dict[Hashable, float] = {}

    def note(self, rollouts: Iterable[Rollout], pass_began: float) -> None:
        """Records the rollouts that are measured, and drops all others.

        Args:
            rollouts: the rollouts in their current states.
            pass_began: when the pass began that may have given them traffic; reports from then on count.
        """
        now = self._clock()
        seen: dict[Hashable, float] = {}
        for rollout in rollouts:
            seen[_state_key(rollout)] = now
            if rollout.traffic_since is not None:
                seen[_traffic_key(rollout)] = pass_began
        self._seen = {key: self._seen.get(key, first) for key, first in seen.items()}

    def in_state_s(self, rollout: Rollout) -> float:
        """Seconds since this process first saw a rollout in its state and step."""
        return self._clock() - self.state_since(rollout)

    def state_since(self, rollout: Rollout) -> float:
        """When this process first saw a recorded rollout in its state and step."""
        return self._seen.get(_state_key(rollout), self._clock())

    def traffic_since(self, rollout: Rollout) -> float:
        """When this process first saw a recorded rollout with traffic."""
        return self._seen.get(_traffic_key(rollout), self._clock())


def _state_key(rollout: Rollout) -> Hashable:
    return rollout.id, rollout.state, rollout.state_since, rollout.percent, rollout.next_step


def _traffic_key(rollout: Rollout) -> Hashable:
    return rollout.id, "traffic"
