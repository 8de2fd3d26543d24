"""Prints bundles, checks and differences, for people."""

from collections.abc import Sequence
from typing import Any

from rich.text import Text

from echovlm_ray.cli.tables import Listing
from echovlm_ray.cli.terminal import MAX_CELL, console_of, line, name_of, styled
from experts.bundles.bundle import Bundle
from experts.bundles.diff import BundleDiff
from experts.bundles.invisible import visible
from experts.bundles.manifest import Manifest
from experts.checks.check import CheckResult

_SHOWN_DIGEST = 12
# Of a description or a changelog.
MAX_PROSE = 4000


def print_versions(found: Sequence[tuple[Manifest, bool]]) -> None:
    """Prints the bundles of a registry, each with whether it is signed."""
    if not found:
        console_of().print("There are no bundles.")
        return
    table = Listing("organ", "version", "name", "experts", "MB", "digest", "signed", right=["experts", "MB"])
    for manifest, signed in found:
        table.add_row(
            manifest.organ,
            name_of(manifest.version),
            name_of(manifest.name),
            str(manifest.num_experts),
            f"{manifest.size_bytes / 1e6:,.1f}",
            manifest.digest[:_SHOWN_DIGEST],
            "yes" if signed else "no",
        )
    console_of().print(table)


def print_bundle(bundle: Bundle) -> None:
    """Prints a bundle's manifest."""
    manifest = bundle.manifest
    console = console_of()
    console.print(styled(name_of(manifest.name), "bold"), f"{manifest.organ}@{manifest.version}")
    console.print(_cut(manifest.description))
    table = Listing("field", "value", header=False)
    table.add_row("digest", bundle.digest)
    table.add_row("signature", "there is one" if bundle.signature else "none")
    table.add_row("weights", f"{manifest.num_expert_parameters:,} parameters in {manifest.dtype}")
    table.add_row("bytes", f"{manifest.size_bytes:,} in {len(manifest.files)} files")
    skipped = {"name", "organ", "version", "description", "format", "files", "dtype"}
    for field, value in manifest.model_dump(mode="json", exclude_defaults=True, exclude=skipped).items():
        table.add_row(field, Text(_cut(_shown(value))))
    console.print(table)


def print_check(result: CheckResult) -> None:
    """Prints the result of a check that went well."""
    console = console_of()
    table = Listing("check", "result", header=False)
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
    console.print("The bundle is good.", style="green")


def print_diff(found: BundleDiff) -> None:
    """Prints the differences of two bundles."""
    console = console_of()
    if found.before == found.after:
        console.print("They are the same bundle.")
        return
    if found.fields:
        table = Listing("field", "before", "after")
        for change in found.fields:
            table.add_row(change.field, Text(_cut(_shown(change.before))), Text(_cut(_shown(change.after))))
        console.print(table)
    if found.incomparable is not None:
        console.print(line(f"The weights cannot be compared: {found.incomparable}."))
        return
    for words, experts in (("removed", found.removed), ("added", found.added)):
        if experts:
            console.print(f"Experts {words}: {', '.join(map(str, experts))}")
    moved = [f"{left} → {right}" for left, right in found.pairs if left != right]
    if moved:
        console.print(f"Experts that have another place: {', '.join(moved)}")
    if found.same_weights:
        console.print("All weights are equal in every bit." if not moved else "No expert changed.")
        return
    console.print(f"{found.unchanged} of {len(found.pairs)} experts are equal in every bit.")
    table = Listing("layer", "experts", "most changed", "gate rows", title="relative change")
    for layer in found.layers:
        most = "" if layer.most_changed is None else f"{layer.most_changed[1]:.3g} (expert {layer.most_changed[0]})"
        table.add_row(str(layer.layer), f"{layer.experts:.3g}", most, f"{layer.gate:.3g}")
    console.print(table)


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return "\n".join(f"{name_of(str(key))}: {_shown(part)}" for key, part in value.items())
    if isinstance(value, list):
        return ", ".join(line(_shown(part), MAX_CELL) for part in value)
    return "" if value is None else str(value)


def _cut(text: str) -> str:
    """A text of several lines as far as people read it."""
    more = len(text) - MAX_PROSE
    return visible(text if more <= 0 else f"{text[:MAX_PROSE]}… ({more} characters more; --json shows all)")
