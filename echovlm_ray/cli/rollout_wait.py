"""Waits until a rollout reaches a state and shows its progress. Ctrl-C ends only the waiting."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import typer

from echovlm_ray.cli.control import EXIT_INTERRUPTED
from echovlm_ray.cli.experts_watch import Versions, display, states
from echovlm_ray.cli.gate_format import failed_gates
from echovlm_ray.cli.rollout_format import ENDED_BADLY, IN_FLIGHT, format_state, short
from echovlm_ray.cli.terminal import console_of, line, say
from echovlm_ray.cli.work import fail

if TYPE_CHECKING:
    from echovlm_ray.client.control import ExpertControlClient
    from protos.control_pb2 import ControlState, Rollout

Reached = Callable[["Rollout", "ControlState"], bool]
# States of a rollout that is or was the organ's version.
SERVED = ("stable", "superseded", "retired")
LOADED = ("warm", "shadow", "canary", *SERVED)


def is_loaded(rollout: "Rollout", state: "ControlState") -> bool:
    """Whether the candidate is loaded on every replica; for `stage`."""
    return rollout.state in LOADED


def has_traffic(mode: str, percent: float) -> Reached:
    """Whether the candidate gets this share of the requests, or was promoted."""
    return lambda rollout, state: (rollout.state == mode and rollout.percent == percent) or rollout.state in SERVED


def has_taken_over(rollout: "Rollout", state: "ControlState") -> bool:
    """Whether all requests, including running ones, use the new version; for `promote`."""
    used = is_used(rollout.organ, rollout.incumbent_digest, state)
    return rollout.state in SERVED and not used and not state.not_taken_up


def is_gone(rollout: "Rollout", state: "ControlState") -> bool:
    """Whether no request uses the candidate any more and its memory is free; for `rollback`."""
    held = is_held(rollout.organ, rollout.digest, state)
    return rollout.state in ENDED_BADLY and not held and not state.not_taken_up


def is_used(organ: str, digest: str, state: "ControlState") -> bool:
    """Whether a replica of the organ has a bundle loaded for other uses than a rollback."""
    return any(
        share.digest == digest and not share.spare
        for replica in state.replicas
        if replica.organ == organ
        for share in replica.bundles
    )


def is_held(organ: str, digest: str, state: "ControlState") -> bool:
    """Whether a replica of the organ has a bundle loaded."""
    return any(
        share.digest == digest for replica in state.replicas if replica.organ == organ for share in replica.bundles
    )


def wait_until(control: "ExpertControlClient", rollout: "Rollout", reached: Reached) -> "Rollout":
    """Waits until the rollout reaches a state and returns it. Shows the progress on stderr.

    Ends the command with exit code 1 and the reason if the rollout fails before.
    """
    organ = rollout.organ
    note = "Ctrl-C ends only the waiting; the rollout goes on."
    try:
        with display(Versions(control), organ, console_of(stderr=True), note) as show, states(control) as shown:
            for state in shown:
                show(state)
                current = next((found for found in state.rollouts if found.id == rollout.id), None)
                if current is None:
                    fail(_ended(f"{rollout.id} has ended and another rollout of {organ} has begun", organ))
                if reached(current, state):
                    return current
                if (
                    current.state in IN_FLIGHT
                    and reached not in (is_gone, is_loaded)
                    and (why := failed_gates(current))
                ):
                    version = current.version or short(current.digest)
                    fail(
                        f"{organ} {version} did not pass its gates: {line(why)}; roll it back, or override: "
                        f"echoray experts promote {organ} --override --reason TEXT"
                    )
                # If the rollout was to end, only its memory must still be freed.
                if current.state in ENDED_BADLY and reached is not is_gone:
                    because = f": {line(current.reason)}" if current.reason else ""
                    version = current.version or short(current.digest)
                    fail(_ended(f"{organ} {version} is {format_state(current)}{because}", organ))
    except KeyboardInterrupt:
        say(
            f"No longer waiting; the rollout goes on. See it: echoray experts watch {organ}. "
            f"Take it back: echoray experts rollback {organ} --rollout {rollout.id}",
            err=True,
        )
        raise typer.Exit(EXIT_INTERRUPTED) from None
    raise AssertionError("states end with an error only")


def _ended(problem: str, organ: str) -> str:
    return f"{problem}; see echoray experts history {organ}"
