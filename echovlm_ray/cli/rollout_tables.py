"""Tables of rollouts: live versions, candidates, and the bundles of every replica."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar

from echovlm_ray.cli.rollout_format import (
    ENDED_BADLY,
    IN_FLIGHT,
    Versions,
    format_age,
    format_shadow,
    format_size,
    format_state,
    format_version,
    newest,
    short,
)
from echovlm_ray.cli.tables import Cell, Listing
from echovlm_ray.cli.terminal import line, name_of, styled

if TYPE_CHECKING:
    from protos.control_pb2 import BundleInfo, ExpertSet, ReplicaMemory, ReplicaResidents, Rollout

BAR_WIDTH = 20


def state_view(
    live: "ExpertSet",
    rollouts: Iterable["Rollout"],
    replicas: Iterable["ReplicaResidents"],
    versions: Versions,
    organ: str = "",
) -> RenderableType:
    """The whole state, or one organ's, as tables."""
    rollouts = list(rollouts)
    parts: list[RenderableType] = [
        line(f"expert set {short(live.id)}, backbone {short(live.backbone_digest)}, routing {name_of(live.routing)}"),
        _organs(live, rollouts, versions, organ),
    ]
    parts += [
        line(f"shadow of {name_of(rollout.organ)}: {format_shadow(rollout.shadow)}")
        for rollout in rollouts
        if rollout.HasField("shadow") and organ in ("", rollout.organ) and rollout.state in IN_FLIGHT
    ]
    parts += [
        line(
            f"{name_of(rollout.organ)} {name_of(rollout.version or short(rollout.digest))} waits for "
            f"{line(rollout.waits_for)}"
        )
        for rollout in rollouts
        if rollout.waits_for and organ in ("", rollout.organ)
    ]
    held = [replica for replica in replicas if organ in ("", replica.organ)]
    if held:
        parts.append(_replicas(held, versions))
    return Group(*parts)


def bundles_view(bundles: Iterable["BundleInfo"]) -> RenderableType:
    """A table of the registry's bundles."""
    table = Listing("registry", "version", "name", "experts", "size", "digest", "live")
    last = ""
    for bundle in bundles:
        name = "" if bundle.organ == last else bundle.organ
        last = bundle.organ
        table.add_row(
            name_of(name),
            name_of(bundle.version),
            name_of(bundle.name),
            str(bundle.num_experts),
            format_size(bundle.size_bytes),
            short(bundle.digest),
            styled("live", "green") if bundle.live else "",
        )
    return table


def memory_view(memory: Iterable["ReplicaMemory"]) -> RenderableType:
    """A table of the memory that a load takes on every replica."""
    table = Listing("replica", "holds", "would need", "limit", "")
    for replica in memory:
        known = replica.limit_bytes > 0
        verdict = styled("fits", "green") if replica.fits else styled("does not fit", "red")
        if replica.fits and not replica.needed_bytes:
            verdict = styled("holds it already", "green")
        table.add_row(
            name_of(replica.replica),
            format_size(replica.resident_bytes) if known else "",
            format_size(replica.needed_bytes),
            format_size(replica.limit_bytes) if known else "",
            verdict if known else styled("does not answer", "red"),
        )
    return table


def _organs(live: "ExpertSet", rollouts: list["Rollout"], versions: Versions, organ: str) -> Listing:
    table = Listing("organ", "live", "digest", "rollout", "of", "state", "for", "by", "reason")
    members = {member.organ: member.bundle_digest for member in live.members}
    names = [*members, *sorted({rollout.organ for rollout in rollouts} - set(members))]
    for name in names:
        if organ not in ("", name):
            continue
        digest = members.get(name)
        row: list[Cell] = [name_of(name)]
        row += [styled("none", "dim"), ""] if digest is None else [_version(digest, versions), short(digest)]
        rollout = newest(rollouts, name)
        if rollout is not None:
            row += [
                name_of(rollout.id),
                name_of(rollout.version or short(rollout.digest)),
                styled(name_of(format_state(rollout)), _style(rollout)),
                format_age(rollout.state_since),
                name_of(rollout.actor),
                rollout.reason,
            ]
        table.add_row(*row)
    return table


def _replicas(replicas: Iterable["ReplicaResidents"], versions: Versions) -> Listing:
    table = Listing("replica of", "name", "memory", "bundle", "", "")
    for replica in replicas:
        held = sum(share.resident_bytes for share in replica.bundles)
        limit = f" of {format_size(replica.limit_bytes)}" if replica.limit_bytes else ""
        head: list[Cell] = [name_of(replica.organ), name_of(replica.replica), f"{format_size(held)}{limit}"]
        for share in replica.bundles:
            row = [*head, _version(share.digest, versions)]
            if share.progress < 1:
                bar = ProgressBar(total=1.0, completed=share.progress, width=BAR_WIDTH)
                table.add_row(*row, f"loading {share.progress:.0%}", bar)
            else:
                kept = styled("kept to go back to", "dim") if share.spare else ""
                table.add_row(*row, format_size(share.resident_bytes), kept)
            head = ["", "", ""]
        if not replica.bundles:
            table.add_row(*head, styled("nothing", "dim"))
    return table


def _version(digest: str, versions: Versions) -> str:
    return name_of(format_version(digest, versions))


def _style(rollout: "Rollout") -> str:
    if rollout.state in ENDED_BADLY:
        return "red"
    return "yellow" if rollout.state in IN_FLIGHT else "green"
