"""Prints the report of `echoray checkpoint inspect`."""

from rich.console import Console
from rich.text import Text

from echovlm_ray.checkpoint.inspect import KIND_NAMES, CheckpointReport
from echovlm_ray.cli.tables import Listing
from echovlm_ray.cli.terminal import MAX_CELL, console_of, line, name_of, styled

# A longer list of problems does not help; --json has them all.
_SHOWN_PROBLEMS = 20


def print_report(report: CheckpointReport) -> None:
    """Prints a report to stdout."""
    console = console_of()
    _print_head(console, report)
    if report.parts:
        console.print(_parts_table(report))
    if report.organs:
        console.print(_organs_table(report))
    for note in report.notes:
        console.print(f"note: {line(note)}", soft_wrap=True)
    for problem in report.problems[:_SHOWN_PROBLEMS]:
        console.print(styled("wrong:", "red"), line(problem), soft_wrap=True)
    if len(report.problems) > _SHOWN_PROBLEMS:
        more = len(report.problems) - _SHOWN_PROBLEMS
        console.print(styled("wrong:", "red"), f"and {more} more; --json lists them all")
    if not report.problems:
        console.print("Nothing is wrong with it.", style="green")


def _print_head(console: Console, report: CheckpointReport) -> None:
    folder = styled(line(report.directory), "bold")
    console.print(Text.assemble(folder, f" is {KIND_NAMES[report.kind]}."), soft_wrap=True)
    if report.name is not None:
        title = f"{name_of(report.name)} {name_of(str(report.version))}: {line(str(report.description), MAX_CELL)}"
        console.print(title)
    sizes = [f"{report.num_layers} layers"] if report.num_layers is not None else []
    if report.num_experts is not None:
        sizes.append(f"{report.num_experts} experts, top {report.num_experts_per_tok}")
    files = "weight file" if report.weight_files == 1 else "weight files"
    sizes += [
        f"{report.weight_files} {files}",
        f"{report.bytes_on_disk / 1e9:,.3f} GB",
        line(", ".join(report.dtypes), MAX_CELL),
    ]
    console.print(" · ".join(size for size in sizes if size))


def _parts_table(report: CheckpointReport) -> Listing:
    table = Listing("part", "parameters", "bytes", "dtypes", right=["parameters", "bytes"])
    for part in report.parts:
        table.add_row(name_of(part.part), f"{part.parameters:,}", f"{part.bytes:,}", ", ".join(part.dtypes))
    nbytes = sum(part.bytes for part in report.parts)
    table.add_row(*(styled(text, "bold") for text in ("total", f"{report.parameters:,}", f"{nbytes:,}")))
    return table


def _organs_table(report: CheckpointReport) -> Listing:
    table = Listing("organ", "version", "experts", "parameters", "bundle", right=["parameters"])
    for organ in report.organs:
        experts = str(organ.num_experts)
        if report.routing == "flat" and organ.source_experts is not None:
            experts += f" ({', '.join(map(str, organ.source_experts))})"
        table.add_row(
            name_of(organ.organ), name_of(organ.version), experts, f"{organ.parameters:,}", organ.bundle_digest[:12]
        )
    return table
