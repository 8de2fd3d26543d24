"""The precondition of an operation: the state that the command saw."""

from typing import TYPE_CHECKING, Annotated

import typer

from echovlm_ray.cli.rollout_format import in_flight
from protos.control_pb2 import Expected

if TYPE_CHECKING:
    from echovlm_ray.client.control import ExpertControlClient

RolloutId = Annotated[
    str,
    typer.Option("--rollout", metavar="ID", help="Only this rollout, like heart-12; see `list`. [default: looked up]"),
]


def candidate_seen(control: "ExpertControlClient", organ: str, rollout: str, digest: str) -> Expected:
    """The precondition for a candidate: the given rollout, or the one in flight, in its current state.

    If nothing is in flight, the precondition is that nothing was staged since.
    """
    if rollout:
        return Expected(rollout_id=rollout)
    if digest:
        return Expected()
    candidate = in_flight(control.list(organ).rollouts, organ)
    if candidate is None:
        return Expected(nothing_in_flight=True)
    return Expected(rollout_id=candidate.id, state=candidate.state, percent=candidate.percent)


def stable_seen(control: "ExpertControlClient", organ: str) -> Expected:
    """The precondition that the organ's stable version is the current one."""
    members = control.list(organ).live.members
    return Expected(stable_digest=next((member.bundle_digest for member in members if member.organ == organ), ""))
