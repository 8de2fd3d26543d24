"""What an operator reads of organs that cannot be answered as they should be. Only the client's packages."""

from typing import TYPE_CHECKING, Any

from rich.markup import escape

if TYPE_CHECKING:
    from protos.control_pb2 import OrganProblem

# In the place of Ray Serve's word for an application whose replicas run and cannot answer.
NO_ANSWER = "NOT SERVING"
DIGEST_LENGTH = 12


def problem_in_words(problem: "OrganProblem") -> str:
    """One organ's problem, in rich's markup: red where no request of it can be answered."""
    version = problem.version or f"(version unknown) {problem.digest[:DIGEST_LENGTH]}"
    reasons = "; ".join(
        f"{reason.replica}: {reason.text}" if reason.replica else reason.text for reason in problem.reasons
    )
    if not problem.holding:
        why = escape(f"no replica holds {version}: {reasons}")
        return f"[red]{escape(problem.organ)} cannot be answered[/red]: {why}"
    why = escape(f"{problem.holding} of {problem.replicas} replicas hold {version}: {reasons}")
    return f"[yellow]{escape(problem.organ)} is answered by fewer replicas[/yellow]: {why}"


def problem_as_dict(problem: "OrganProblem") -> dict[str, Any]:
    """The same for programs."""
    return {
        "organ": problem.organ,
        "version": problem.version,
        "digest": problem.digest,
        "answers": problem.holding > 0,
        "replicas": problem.replicas,
        "holding": problem.holding,
        "reasons": [{"replica": reason.replica, "text": reason.text} for reason in problem.reasons],
    }
