"""The state of an organ that a command saw, sent along so that an operation on another state is refused."""

from typing import TYPE_CHECKING, Annotated

import typer

from echovlm_ray.cli.rollout_format import in_flight
from protos.control_pb2 import Expected

if TYPE_CHECKING:
    from echovlm_ray.client.control import ExpertControlClient

RolloutId = Annotated[
    str,
    typer.Option(
        "--rollout", metavar="ID", help="Only this rollout, like heart-12, as `list` shows it. [default: looked up]"
    ),
]


def candidate_seen(control: "ExpertControlClient", organ: str, rollout: str, digest: str) -> Expected:
    """The candidate that is meant: the one that is named, or the one in flight now, where and as it stands.

    With nothing in flight it says so, and whatever is staged in the meantime is left alone.
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
    """The organ's stable version now."""
    members = control.list(organ).live.members
    return Expected(stable_digest=next((member.bundle_digest for member in members if member.organ == organ), ""))
