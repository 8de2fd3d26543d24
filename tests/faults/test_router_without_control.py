"""A Router that starts while Control is unavailable serves the last promoted version, not the initial one."""

import fcntl
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from echovlm_ray.client.control import ExpertControlClient
from tests.changed_bundles import changed_bundle
from tests.live_rollouts import WHO, ask, bundle_of, held, in_state, kill, until
from tests.running_system import RunningSystem

ORGAN, VERSION = "breast", "1.8.0"


@contextmanager
def no_control(system: RunningSystem) -> Iterator[None]:
    """Kills Control and the Router, and takes the database's lock, so that no other Control starts while the block
    lasts."""
    descriptor = os.open(system.checkpoint / "rollouts" / "rollouts.db.lock", os.O_RDWR)
    try:
        with ThreadPoolExecutor(1) as waiting:
            # Asked for before: the next Control must not be faster.
            taken = waiting.submit(fcntl.flock, descriptor, fcntl.LOCK_EX)
            kill(system, "control", "router")
            taken.result(10)
        yield
    finally:
        os.close(descriptor)


def test_a_router_that_starts_without_control_serves_what_was_promoted(
    running_system: RunningSystem, tmp_path: Path
) -> None:
    system, first = running_system, bundle_of(running_system, ORGAN)
    digest = changed_bundle(tmp_path / "next", first, VERSION).digest
    before = ask(system, ORGAN)
    with ExpertControlClient(system.control_address, timeout_s=10) as control:
        control.push(tmp_path / "next")
        control.stage(ORGAN, digest=digest, actor=WHO)
        in_state(control, ORGAN, "warm")
        control.promote(ORGAN, digest=digest, actor=WHO)
        until(lambda: held(control, ORGAN) == [{digest}], "the version before unloaded")
        after = ask(system, ORGAN)
        assert (before[1], after[1], before[2] == after[2]) == ("1.0.0", VERSION, False)

        with no_control(system):
            assert until(lambda: ask(system, ORGAN), "the next Router's first answer") == after
            assert ask(system, ORGAN) == after

        until(lambda: control.roll_back_stable(ORGAN, digest=digest, actor=WHO), "Control is back")
        until(lambda: ask(system, ORGAN) == before, "the version before")
        until(lambda: held(control, ORGAN) == [{first.digest}], "the promoted version unloaded")
