"""Prints bundles, checks and differences, for people."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from experts.bundle import Bundle
from experts.bundle_check import CheckResult
from experts.bundle_diff import BundleDiff
from experts.manifest import Manifest

_SHOWN_DIGEST = 12


def print_versions(found: Sequence[tuple[Manifest, bool]]) -> None:
    """Prints the bundles of a registry, each with whether it is signed."""
    if not found:
        Console().print("There are no bundles.")
        return
    table = Table("organ", "version", "name", "experts", "MB", "digest", "signed")
    for column in table.columns:
        # Names may be cut in a narrow terminal, what identifies a bundle may not.
        column.no_wrap = column.header != "name"
        column.overflow = "ellipsis" if column.header == "name" else "fold"
    for manifest, signed in found:
        table.add_row(
            manifest.organ,
            manifest.version,
            escape(manifest.name),
            str(manifest.num_experts),
            f"{manifest.size_bytes / 1e6:,.1f}",
            manifest.digest[:_SHOWN_DIGEST],
            "yes" if signed else "no",
        )
    Console().print(table)


def print_bundle(bundle: Bundle) -> None:
    """Prints a bundle's manifest."""
    manifest = bundle.manifest
    console = Console()
    console.print(f"[bold]{escape(manifest.name)}[/bold] {manifest.organ}@{manifest.version}", highlight=False)
    console.print(escape(manifest.description), highlight=False)
    table = Table("field", Column("value", overflow="fold"), show_header=False)
    table.add_row("digest", bundle.digest)
    table.add_row("signature", "there is one" if bundle.signature else "none")
    table.add_row("weights", f"{manifest.num_expert_parameters:,} parameters in {manifest.dtype}")
    table.add_row("bytes", f"{manifest.size_bytes:,} in {len(manifest.files)} files")
    skipped = {"name", "organ", "version", "description", "format", "files", "dtype"}
    for field, value in manifest.model_dump(mode="json", exclude_defaults=True, exclude=skipped).items():
        table.add_row(field, escape(_shown(value)))
    console.print(table)


def print_check(result: CheckResult) -> None:
    """Prints the result of a check that went well."""
    console = Console()
    table = Table("check", "result", show_header=False)
    table.add_row("bundle", f"{result.organ}@{result.version} {result.digest}")
    table.add_row("files", "sizes, digests, tensors and shapes are what the manifest says; all weights are finite")
    table.add_row("signature", str(result.signature))
    compared = "recorded when it was packed" if result.probe_recorded else "of the reference kernel, made now"
    table.add_row("self-test", f"kernel {result.kernel} in {result.dtype}, against outputs {compared}")
    if result.bundle_dtype != result.dtype:
        table.add_row("dtype", f"its weights are converted from {result.bundle_dtype} to {result.dtype} when they load")
    table.add_row("error", f"{result.worst_error:.2g} of the largest output, {result.tolerance:g} is allowed")
    table.add_row("memory", f"{result.resident_bytes:,} bytes when it serves")
    console.print(table)
    console.print("[green]The bundle is good.[/green]")


def print_diff(found: BundleDiff) -> None:
    """Prints the differences of two bundles."""
    console = Console()
    if found.before == found.after:
        console.print("They are the same bundle.")
        return
    if found.fields:
        table = Table("field", "before", "after")
        for change in found.fields:
            table.add_row(change.field, escape(_shown(change.before)), escape(_shown(change.after)))
        console.print(table)
    if found.incomparable is not None:
        console.print(f"The weights cannot be compared: {found.incomparable}.", highlight=False)
        return
    for words, experts in (("removed", found.removed), ("added", found.added)):
        if experts:
            console.print(f"Experts {words}: {', '.join(map(str, experts))}", highlight=False)
    moved = [f"{left} → {right}" for left, right in found.pairs if left != right]
    if moved:
        console.print(f"Experts that have another place: {', '.join(moved)}", highlight=False)
    if found.same_weights:
        console.print("All weights are equal in every bit." if not moved else "No expert changed.")
        return
    console.print(f"{found.unchanged} of {len(found.pairs)} experts are equal in every bit.", highlight=False)
    table = Table("layer", "experts", "most changed", "gate rows", title="relative change")
    for layer in found.layers:
        most = "" if layer.most_changed is None else f"{layer.most_changed[1]:.3g} (expert {layer.most_changed[0]})"
        table.add_row(str(layer.layer), f"{layer.experts:.3g}", most, f"{layer.gate:.3g}")
    console.print(table)


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return "\n".join(f"{key}: {_shown(part)}" for key, part in value.items())
    if isinstance(value, list):
        return ", ".join(_shown(part) for part in value)
    return "" if value is None else str(value)
