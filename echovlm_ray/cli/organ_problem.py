"""Formats the problems of organs whose stable version is not loaded everywhere. Needs only the client's packages."""

from typing import TYPE_CHECKING, Any

from rich.text import Text

from echovlm_ray.cli.messages import message_as_dict
from echovlm_ray.cli.terminal import line, name_of, styled

if TYPE_CHECKING:
    from protos.control_pb2 import OrganProblem

# Replaces Ray Serve's status of an application whose replicas run but cannot answer.
NO_ANSWER = "NOT SERVING"
DIGEST_LENGTH = 12


def format_problem(problem: "OrganProblem") -> Text:
    """One organ's problem as text; red if no request for it can be answered."""
    version = problem.version or f"(version unknown) {problem.digest[:DIGEST_LENGTH]}"
    reasons = "; ".join(
        f"{reason.replica}: {reason.text}" if reason.replica else reason.text for reason in problem.reasons
    )
    if not problem.holding:
        return styled(f"{name_of(problem.organ)} cannot be answered", "red").append_text(
            styled(line(f": no replica holds {version}: {reasons}"), "default")
        )
    return styled(f"{name_of(problem.organ)} is answered by fewer replicas", "yellow").append_text(
        styled(line(f": {problem.holding} of {problem.replicas} replicas hold {version}: {reasons}"), "default")
    )


def problem_as_dict(problem: "OrganProblem") -> dict[str, Any]:
    """The same for programs."""
    return message_as_dict(problem) | {"answers": problem.holding > 0}
