"""Draws rollouts: what is live, what is on its way, what every replica holds, and how far its loads are."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table

from echovlm_ray.cli.rollout_words import (
    ENDED_BADLY,
    IN_FLIGHT,
    Versions,
    age_in_words,
    newest,
    shadow_in_words,
    short,
    size_in_words,
    state_in_words,
    version_in_words,
)

if TYPE_CHECKING:
    from protos.control_pb2 import BundleInfo, ExpertSet, ReplicaMemory, ReplicaResidents, Rollout

BAR_WIDTH = 20
# A pipe has no width to fit into, and a reason that is cut off is of no use.
PIPE_WIDTH = 200


def console_of(*, stderr: bool = False) -> Console:
    """Where tables go."""
    console = Console(stderr=stderr, highlight=False)
    return console if console.is_terminal else Console(stderr=stderr, highlight=False, width=PIPE_WIDTH)


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
        f"expert set {short(live.id)}, backbone {short(live.backbone_digest)}, routing {live.routing}",
        _organs(live, rollouts, versions, organ),
    ]
    parts += [
        f"shadow of {rollout.organ}: {shadow_in_words(rollout.shadow)}"
        for rollout in rollouts
        if rollout.HasField("shadow") and organ in ("", rollout.organ) and rollout.state in IN_FLIGHT
    ]
    parts += [
        f"{rollout.organ} {escape(rollout.version or short(rollout.digest))} waits for {escape(rollout.waits_for)}"
        for rollout in rollouts
        if rollout.waits_for and organ in ("", rollout.organ)
    ]
    held = [replica for replica in replicas if organ in ("", replica.organ)]
    if held:
        parts.append(_replicas(held, versions))
    return Group(*parts)


def bundles_view(bundles: Iterable["BundleInfo"]) -> RenderableType:
    """What the registry has."""
    table = _table("registry", "version", "name", "experts", "size", "digest", "live")
    last = ""
    for bundle in bundles:
        name = "" if bundle.organ == last else bundle.organ
        last = bundle.organ
        table.add_row(
            name,
            escape(bundle.version),
            escape(bundle.name),
            str(bundle.num_experts),
            size_in_words(bundle.size_bytes),
            short(bundle.digest),
            "[green]live[/green]" if bundle.live else "",
        )
    return table


def memory_view(memory: Iterable["ReplicaMemory"]) -> RenderableType:
    """What a load would mean for every replica."""
    table = _table("replica", "holds", "would need", "limit", "")
    for replica in memory:
        known = replica.limit_bytes > 0
        verdict = "[green]fits[/green]" if replica.fits else "[red]does not fit[/red]"
        if replica.fits and not replica.needed_bytes:
            verdict = "[green]holds it already[/green]"
        table.add_row(
            escape(replica.replica),
            size_in_words(replica.resident_bytes) if known else "",
            size_in_words(replica.needed_bytes),
            size_in_words(replica.limit_bytes) if known else "",
            verdict if known else "[red]does not answer[/red]",
        )
    return table


def _organs(live: "ExpertSet", rollouts: list["Rollout"], versions: Versions, organ: str) -> Table:
    table = _table("organ", "live", "digest", "rollout", "state", "for", "by", "reason")
    members = {member.organ: member.bundle_digest for member in live.members}
    names = [*members, *sorted({rollout.organ for rollout in rollouts} - set(members))]
    for name in names:
        if organ not in ("", name):
            continue
        digest = members.get(name)
        row = [name]
        row += (
            ["[dim]none[/dim]", ""] if digest is None else [escape(version_in_words(digest, versions)), short(digest)]
        )
        rollout = newest(rollouts, name)
        if rollout is not None:
            row += [
                escape(rollout.version or short(rollout.digest)),
                f"[{_style(rollout)}]{state_in_words(rollout)}[/]",
                age_in_words(rollout.state_since),
                escape(rollout.actor),
                escape(rollout.reason),
            ]
        table.add_row(*row)
    return table


def _replicas(replicas: Iterable["ReplicaResidents"], versions: Versions) -> Table:
    table = _table("replica of", "name", "memory", "bundle", "", "")
    for replica in replicas:
        held = sum(share.resident_bytes for share in replica.bundles)
        limit = f" of {size_in_words(replica.limit_bytes)}" if replica.limit_bytes else ""
        head = [replica.organ, escape(replica.replica), f"{size_in_words(held)}{limit}"]
        for share in replica.bundles:
            row = [*head, escape(version_in_words(share.digest, versions))]
            if share.progress < 1:
                bar = ProgressBar(total=1.0, completed=share.progress, width=BAR_WIDTH)
                table.add_row(*row, f"loading {share.progress:.0%}", bar)
            else:
                kept = "[dim]kept to go back to[/dim]" if share.spare else ""
                table.add_row(*row, size_in_words(share.resident_bytes), kept)
            head = ["", "", ""]
        if not replica.bundles:
            table.add_row(*head, "[dim]nothing[/dim]")
    return table


def _style(rollout: "Rollout") -> str:
    if rollout.state in ENDED_BADLY:
        return "red"
    return "yellow" if rollout.state in IN_FLIGHT else "green"


def _table(*headers: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for header in headers:
        table.add_column(header, overflow="fold")
    return table
