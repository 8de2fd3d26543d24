"""`echoray experts history`: shows and verifies the history of rollouts."""

import json
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from echovlm_ray.cli.control import EXIT_FAILED, with_control
from echovlm_ray.cli.experts_targets import AsJSON
from echovlm_ray.cli.messages import message_as_dict
from echovlm_ray.cli.rollout_format import format_number
from echovlm_ray.cli.tables import Listing
from echovlm_ray.cli.terminal import console_of, line, name_of, say_json, styled
from echovlm_ray.client.control import ExpertControlClient

if TYPE_CHECKING:
    from protos.control_pb2 import HistoryEntry, HistoryResponse

DEFAULT_LAST = 50


@with_control
def history(
    control: ExpertControlClient,
    organ: Annotated[str, typer.Argument(metavar="[ORGAN]", help="Only this organ. [default: all]")] = "",
    last: Annotated[int, typer.Option(min=0, help="The number of newest entries; 0 for all.")] = DEFAULT_LAST,
    verify: Annotated[bool, typer.Option("--verify", help="Verify the chain of hashes of the whole history.")] = False,
    head: Annotated[
        str, typer.Option(metavar="HASH", help="An earlier head that the history must contain; implies --verify.")
    ] = "",
    as_json: AsJSON = False,
) -> None:
    """Shows the history of rollouts, oldest first, with time, operator and reason.

    Every entry has the hash of the previous one, so `--verify` finds changed, removed and inserted entries. `--head`
    also finds a completely rewritten history, with a head that you stored elsewhere.

    Exit status: 0 no problem; 1 the history was tampered with.

    Example: `echoray experts history heart --verify`
    """
    found = control.history(organ, last=last, verify=verify or bool(head), noted_hash=head)
    if as_json:
        say_json(_as_dict(found, verified=verify or bool(head)), indent=2)
    else:
        console = console_of()
        if found.entries:
            console.print(_table(found))
        else:
            console.print(f"Nothing has happened{f' to {organ}' if organ else ''} yet.")
        _print_head(found, verify or bool(head), console)
    if found.faults:
        raise typer.Exit(EXIT_FAILED)


def _table(found: "HistoryResponse") -> Listing:
    table = Listing("#", "time", "organ", "event", "rollout", "by", "details", "reason", right=["#"])
    for entry in found.entries:
        table.add_row(
            str(entry.sequence),
            datetime.fromtimestamp(entry.time).astimezone().strftime("%Y-%m-%d %H:%M:%S"),
            name_of(entry.organ),
            name_of(entry.event.replace("_", " ")),
            name_of(entry.rollout_id),
            name_of(entry.actor),
            _details(entry),
            entry.reason,
        )
    return table


def _details(entry: "HistoryEntry") -> str:
    """The details that fit on a line: scalar values, and shortened digests."""
    details = _parsed(entry.details_json)
    before, after = str(details.pop("from_state", "")), str(details.pop("to_state", ""))
    move = f"{before} → {after}".replace("_", " ").removeprefix(" ").strip() if after else ""
    shown = {key: value for key, value in details.items() if isinstance(value, str | int | float) and value != ""}
    rest = (key if value is True else f"{key} {_brief(value)}" for key, value in shown.items() if value is not False)
    return ", ".join(part for part in (move, *rest) if part)


def _parsed(details_json: str) -> dict[str, Any]:
    """The details of an entry; invalid ones are shown unchanged."""
    try:
        details = json.loads(details_json or "{}")
    except ValueError:
        details = details_json
    return details if isinstance(details, dict) else {"details": details}


def _brief(value: Any) -> str:
    if isinstance(value, str) and len(value) == 64:
        return value[:12]
    return format_number(value) if isinstance(value, float) else str(value)


def _print_head(found: "HistoryResponse", verified: bool, console: Console) -> None:
    for fault in found.faults:
        console.print(styled("TAMPERED WITH:", "bold red"), line(fault), soft_wrap=True)
    if verified and not found.faults:
        console.print(styled("The history is intact:", "green"), f"{found.length} entries.")
    console.print(f"head {line(found.head_hash)}", style="dim", soft_wrap=True)
    if verified and not found.faults:
        console.print("Note the head down elsewhere, and give it to --head the next time.", style="dim")


def _as_dict(found: "HistoryResponse", *, verified: bool) -> dict[str, Any]:
    entries = [_entry_as_dict(entry) for entry in found.entries]
    return message_as_dict(found) | {"entries": entries, "verified": verified}


def _entry_as_dict(entry: "HistoryEntry") -> dict[str, Any]:
    shown = message_as_dict(entry)
    del shown["details_json"]
    time = datetime.fromtimestamp(entry.time, UTC).isoformat()
    return shown | {"time": time, "details": _parsed(entry.details_json)}
