"""Waits until all Routers and gateways apply a policy: only then is a promotion complete."""

import asyncio
from collections.abc import Callable, Mapping

from echovlm_ray.serving.control.policies import PolicyPublisher
from echovlm_ray.serving.control.watchers import WatcherKind, Watchers

# There are no events for replicas that Serve has removed, nor for policies that another thread publishes.
LOOK_AGAIN_S = 0.1


class PolicyPropagation:
    """Compares the published policy with those that Routers and gateways have acknowledged."""

    def __init__(
        self,
        policies: PolicyPublisher,
        watchers: Watchers,
        running: Callable[[], Mapping[WatcherKind, int]],
        timeout_s: float,
    ) -> None:
        """
        Args:
            policies: the published policies.
            watchers: the connected Routers and gateways, and the policies that they apply.
            running: returns the numbers of running Routers and gateways, connected or not.
            timeout_s: the timeout of `wait`.
        """
        self._policies = policies
        self._watchers = watchers
        self._running = running
        self._timeout_s = timeout_s

    def missing(self, sequence: int) -> tuple[str, ...]:
        """The parts that do not apply the policy of a database state yet, as text. Thread-safe.

        Args:
            sequence: the number of the state's newest history entry.
        """
        if self._policies.sequence < sequence:
            return ("Control has not published the policy yet",)
        missing = [f"{name} does not apply it yet" for name in self._watchers.behind(self._policies.current.version)]
        for kind, running in self._running().items():
            connected = len(self._watchers.connected(kind))
            if connected < running:
                missing.append(f"{running - connected} of {running} {kind}s not connected to Control")
        return tuple(missing)

    async def wait(self, sequence: int) -> tuple[str, ...]:
        """Waits until all parts apply it, or the timeout.

        Returns:
            The result of `missing` at the end.
        """
        with self._watchers.changes.listener() as changed:
            try:
                async with asyncio.timeout(self._timeout_s):
                    while missing := self.missing(sequence):
                        changed.clear()
                        await _at_most(changed, LOOK_AGAIN_S)
            except TimeoutError:
                return missing
        return ()


async def _at_most(event: asyncio.Event, seconds: float) -> None:
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        return
