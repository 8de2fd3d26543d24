"""Prints what `echoray checkpoint inspect` found, for people."""

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from echovlm_ray.checkpoint.inspect import KIND_NAMES, CheckpointReport

# A longer list of problems helps nobody; --json has them all.
_SHOWN_PROBLEMS = 20


def print_report(report: CheckpointReport) -> None:
    """Prints a report to stdout."""
    console = Console()
    _print_head(console, report)
    if report.parts:
        console.print(_parts_table(report))
    if report.organs:
        console.print(_organs_table(report))
    for note in report.notes:
        console.print(f"note: {escape(note)}", highlight=False)
    for problem in report.problems[:_SHOWN_PROBLEMS]:
        console.print(f"[red]wrong:[/red] {escape(problem)}", highlight=False)
    if len(report.problems) > _SHOWN_PROBLEMS:
        console.print(f"[red]wrong:[/red] and {len(report.problems) - _SHOWN_PROBLEMS} more; --json lists them all")
    if not report.problems:
        console.print("[green]Nothing is wrong with it.[/green]")


def _print_head(console: Console, report: CheckpointReport) -> None:
    console.print(f"[bold]{escape(report.directory)}[/bold] is {KIND_NAMES[report.kind]}.", highlight=False)
    if report.name is not None:
        title = f"{report.name} {report.version}: {report.description}"
        console.print(escape(title), highlight=False)
    sizes = [f"{report.num_layers} layers"] if report.num_layers is not None else []
    if report.num_experts is not None:
        sizes.append(f"{report.num_experts} experts, top {report.num_experts_per_tok}")
    files = "weight file" if report.weight_files == 1 else "weight files"
    sizes += [f"{report.weight_files} {files}", f"{report.bytes_on_disk / 1e9:,.3f} GB", ", ".join(report.dtypes)]
    console.print(" · ".join(size for size in sizes if size), highlight=False)


def _parts_table(report: CheckpointReport) -> Table:
    table = Table("part", "parameters", "bytes", "dtypes")
    for part in report.parts:
        table.add_row(part.part, f"{part.parameters:,}", f"{part.bytes:,}", ", ".join(part.dtypes))
    nbytes = sum(part.bytes for part in report.parts)
    table.add_row("total", f"{report.parameters:,}", f"{nbytes:,}", "", style="bold")
    return table


def _organs_table(report: CheckpointReport) -> Table:
    table = Table("organ", "version", "experts", "parameters", "bundle")
    for organ in report.organs:
        experts = str(organ.num_experts)
        if report.routing == "flat" and organ.source_experts is not None:
            experts += f" ({', '.join(map(str, organ.source_experts))})"
        table.add_row(organ.organ, organ.version, experts, f"{organ.parameters:,}", organ.bundle_digest[:12])
    return table
