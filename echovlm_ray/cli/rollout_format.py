"""Formats rollouts as text and JSON, for all commands."""

import time
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from echovlm_ray.cli.gate_format import gate_as_dict
from echovlm_ray.cli.messages import message_as_dict

if TYPE_CHECKING:
    from protos.control_pb2 import (
        BundleInfo,
        ExpertSet,
        OperationResponse,
        ReplicaResidents,
        Rollout,
        ShadowReport,
    )

IN_FLIGHT = ("staged", "verified", "warm", "shadow", "canary")
ENDED_BADLY = ("failed", "rolled_back")
_SHOWN_DIGEST = 12

# Digest → version, if known.
Versions = Mapping[str, str]


def format_state(rollout: "Rollout") -> str:
    """A rollout's state with its share of the traffic, for example "canary 5 %"."""
    state = rollout.state.replace("_", " ")
    return f"{state} {format_number(rollout.percent)} %" if rollout.percent else state


def format_number(number: float) -> str:
    """The shortest text that reads back as the same number: 5 or 99.99999."""
    short = f"{number:g}"
    return short if float(short) == number or number != number else repr(number)


def in_flight(rollouts: Iterable["Rollout"], organ: str) -> "Rollout | None":
    """An organ's rollout in flight."""
    return next((rollout for rollout in rollouts if rollout.organ == organ and rollout.state in IN_FLIGHT), None)


def newest(rollouts: Iterable["Rollout"], organ: str) -> "Rollout | None":
    """An organ's rollout in flight, or its last one."""
    found = [rollout for rollout in rollouts if rollout.organ == organ]
    return in_flight(found, organ) or max(found, key=lambda rollout: rollout.created_at, default=None)


def versions_of(bundles: Iterable["BundleInfo"], rollouts: Iterable["Rollout"] = ()) -> dict[str, str]:
    """The versions of all digests in an answer."""
    known = {rollout.digest: rollout.version for rollout in rollouts if rollout.version}
    return known | {bundle.digest: bundle.version for bundle in bundles}


def format_version(digest: str, versions: Versions) -> str:
    """A bundle's version, or the prefix of its digest if the version is unknown."""
    return versions.get(digest) or f"{digest[:_SHOWN_DIGEST]}…"


def short(digest: str) -> str:
    """The prefix of a digest, for display."""
    return digest[:_SHOWN_DIGEST]


def format_size(nbytes: float) -> str:
    """Bytes with a unit that keeps the number short."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= size:
            return f"{nbytes / size:.3g} {unit}"
    return f"{nbytes:.0f} B"


def format_age(since: float, now: float | None = None) -> str:
    """The time since `at`, for example "3 min"."""
    seconds = max(0.0, (time.time() if now is None else now) - since)
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def format_shadow(report: "ShadowReport") -> str:
    """The agreement of a shadow with the incumbent, as text."""
    text = f"{report.requests} compared, {report.identical} identical, token overlap {report.token_overlap:.3g}"
    if report.HasField("mean_first_divergence"):
        text += f", the others part at token {report.mean_first_divergence:.3g} on average"
    if report.HasField("latency_ratio"):
        text += f", time per token x {report.latency_ratio:.3g}"
    return text


def operation_as_dict(response: "OperationResponse") -> dict[str, Any]:
    """What an operation did, or would do."""
    rollout = rollout_as_dict(response.rollout) if response.HasField("rollout") else None
    return message_as_dict(response) | {"rollout": rollout}


def rollout_as_dict(rollout: "Rollout") -> dict[str, Any]:
    """A rollout; what it does not have is None."""
    return message_as_dict(rollout) | {
        "incumbent_digest": rollout.incumbent_digest or None,
        "waits_for": rollout.waits_for or None,
        "gates": [gate_as_dict(gate) for gate in rollout.gates],
    }


def state_as_dict(
    live: "ExpertSet",
    rollouts: Iterable["Rollout"],
    replicas: Iterable["ReplicaResidents"],
    versions: Versions,
    organ: str = "",
) -> dict[str, Any]:
    """The live set, the rollouts and the replicas' bundles as JSON values, of all organs or of one."""
    return {
        "expert_set_id": live.id,
        "backbone_digest": live.backbone_digest,
        "routing": live.routing,
        "live": [
            {
                "organ": member.organ,
                "version": versions.get(member.bundle_digest),
                "digest": member.bundle_digest,
            }
            for member in live.members
            if organ in ("", member.organ)
        ],
        "rollouts": [rollout_as_dict(rollout) for rollout in rollouts if organ in ("", rollout.organ)],
        "replicas": [
            message_as_dict(replica)
            | {
                "bundles": [
                    message_as_dict(share) | {"version": versions.get(share.digest)} for share in replica.bundles
                ]
            }
            for replica in replicas
            if organ in ("", replica.organ)
        ],
    }
