"""Formats gates and evaluations as text, tables and JSON; reads the file of `--gates`."""

from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from echovlm_ray.cli.control import EXIT_INVALID
from echovlm_ray.cli.messages import message_as_dict
from echovlm_ray.cli.tables import Listing
from echovlm_ray.cli.terminal import console_of, line, name_of
from echovlm_ray.cli.work import fail

if TYPE_CHECKING:
    from protos.control_pb2 import Evaluation, Gate, Rollout

Gates = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="First run the evaluations in this YAML file, a list under `gates:`. Control continues automatically once "
        "the candidate has passed them.",
    ),
]
Override = Annotated[
    bool,
    typer.Option("--override", help="Ignore evaluations that were not passed or have not ended; needs --reason."),
]


def gates_json(path: Path | None) -> str:
    """The gates of a file in Control's format; "" without a file. Ends the command if the file is invalid."""
    if path is None:
        return ""
    from echovlm_ray.cli.rollout_yaml import read_gates_file
    from echovlm_ray.yaml_document import DocumentError

    try:
        return read_gates_file(path).model_dump_json()
    except DocumentError as error:
        fail(str(error), EXIT_INVALID)


def check_override(override: bool, reason: str) -> None:
    """Ends the command if an override has no reason."""
    if override and not reason.strip():
        fail("--override needs --reason, which is recorded in the history", EXIT_INVALID)


def failed_gates(rollout: "Rollout") -> str:
    """The failed gates of a candidate in flight as text; "" if there are none."""
    if any(gate.state == "open" for gate in rollout.gates):
        return ""
    return "; ".join(gate.evaluation.text for gate in rollout.gates if gate.state == "failed")


def gate_as_dict(gate: "Gate") -> dict[str, Any]:
    """A gate; what it does not demand is None."""
    evaluation = evaluation_as_dict(gate.evaluation) if gate.HasField("evaluation") else None
    return message_as_dict(gate) | {"evaluation": evaluation}


def evaluation_as_dict(evaluation: "Evaluation") -> dict[str, Any]:
    """What an evaluation found; what it did not measure is None."""
    found = message_as_dict(evaluation) | {"incumbent_digest": evaluation.incumbent_digest or None}
    return {"rollout": found.pop("rollout_id"), **found}


def print_evaluations(evaluations: Iterable["Evaluation"]) -> None:
    """Prints a version's evaluations."""
    found = list(evaluations)
    if not found:
        console_of().print("No evaluation of it is known to Control.")
        return
    table = Listing("evaluated", "rollout", "passed", "figures")
    for evaluation in found:
        when = datetime.fromtimestamp(evaluation.evaluated_at).astimezone().isoformat(" ", "seconds")
        passed = "yes" if evaluation.passed else "no"
        table.add_row(when, name_of(evaluation.rollout_id), passed, line(evaluation.text))
    console_of().print(table)
