"""The differences between two states of Control as lines, for logs and pipes."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from echovlm_ray.cli.rollout_format import (
    IN_FLIGHT,
    Versions,
    format_size,
    format_state,
    format_version,
    short,
)
from echovlm_ray.cli.terminal import line

if TYPE_CHECKING:
    from protos.control_pb2 import ControlState, Rollout

# The step of a load's progress for which a line is printed.
PROGRESS_STEP = 0.1


def changes(before: "ControlState | None", after: "ControlState", versions: Versions, organ: str = "") -> Iterator[str]:
    """One line for every change; without a state before, the live versions and the rollouts in flight.

    Args:
        before: the state that was reported last.
        after: the state now.
        versions: the versions of the digests in both.
        organ: only this organ, if given.
    """
    for change in (_live, _rollouts, _replicas):
        yield from map(line, change(before, after, versions, organ))


def _live(before: "ControlState | None", after: "ControlState", versions: Versions, organ: str) -> Iterator[str]:
    old = {} if before is None else {member.organ: member.bundle_digest for member in before.live.members}
    new = {member.organ: member.bundle_digest for member in after.live.members}
    for name, digest in new.items():
        if organ in ("", name) and old.get(name) != digest:
            text = f"{name}: {format_version(digest, versions)} ({short(digest)}) is live"
            yield text if name not in old else f"{text} instead of {format_version(old[name], versions)}"
    for name in old:
        if organ in ("", name) and name not in new:
            yield f"{name}: no longer live"


def _rollouts(before: "ControlState | None", after: "ControlState", versions: Versions, organ: str) -> Iterator[str]:
    old = {} if before is None else {rollout.id: _standing(rollout) for rollout in before.rollouts}
    for rollout in after.rollouts:
        if organ not in ("", rollout.organ) or old.get(rollout.id) == _standing(rollout):
            continue
        if before is None and rollout.state not in IN_FLIGHT:
            continue
        version = rollout.version or format_version(rollout.digest, versions)
        reason = f": {rollout.reason}" if rollout.reason else ""
        waits = f"; waits for {rollout.waits_for}" if rollout.waits_for else ""
        yield f"{rollout.organ}: {version} ({rollout.id}) is {format_state(rollout)}{reason}{waits}"


def _replicas(before: "ControlState | None", after: "ControlState", versions: Versions, organ: str) -> Iterator[str]:
    old = {} if before is None else _progress(before)
    new = _progress(after)
    for (name, replica, digest), (progress, nbytes) in new.items():
        if organ not in ("", name):
            continue
        previous = old.get((name, replica, digest), (-1.0, 0))[0]
        where = f"{name}: replica {replica}"
        if progress >= 1:
            # Bundles that are loaded from the beginning are not reported.
            if previous < 1 and before is not None:
                yield f"{where} holds {format_version(digest, versions)}, {format_size(nbytes)}"
        elif previous < 0 or int(progress / PROGRESS_STEP) > int(previous / PROGRESS_STEP):
            yield f"{where} loads {format_version(digest, versions)}: {progress:.0%}"
    living = {(replica.organ, replica.replica) for replica in after.replicas}
    for name, replica, digest in old:
        if organ in ("", name) and (name, replica, digest) not in new and (name, replica) in living:
            yield f"{name}: replica {replica} has unloaded {format_version(digest, versions)}"


def _standing(rollout: "Rollout") -> tuple[str, float, str, str]:
    # A line if the condition changes, but not for every countdown of its number.
    waits_for = "".join(character for character in rollout.waits_for if not character.isdigit())
    return rollout.state, rollout.percent, rollout.reason, waits_for


def _progress(state: "ControlState") -> dict[tuple[str, str, str], tuple[float, int]]:
    return {
        (replica.organ, replica.replica, share.digest): (share.progress, share.resident_bytes)
        for replica in state.replicas
        for share in replica.bundles
    }
