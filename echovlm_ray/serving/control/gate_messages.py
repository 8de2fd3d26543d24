"""Gates and evaluations as protobuf messages."""

from collections.abc import Callable

from pydantic import TypeAdapter, ValidationError

from echovlm_ray.errors import InvalidRequestError
from protos import control_pb2
from router.rollouts.evaluations import Evaluation, GateStanding
from router.rollouts.gates import Gate

_GATES: TypeAdapter[tuple[Gate, ...]] = TypeAdapter(tuple[Gate, ...])
# Position → (answered, all) questions.
Progress = Callable[[int], tuple[int, int]]


def gates_of(gates_json: str) -> tuple[Gate, ...]:
    """Parses an operator's gates; empty if the field is not set.

    Raises:
        InvalidRequestError: they are invalid; the text names the field.
    """
    if not gates_json:
        return ()
    try:
        return _GATES.validate_json(gates_json)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        field = ".".join(["gates_json", *map(str, first["loc"])])
        raise InvalidRequestError(field, first["msg"].removeprefix("Value error, ")) from None


def gates_to_proto(
    standing: GateStanding, version_of: Callable[[str], str], progress: Progress
) -> list[control_pb2.Gate]:
    """The messages of a rollout's gates, in their order."""
    return [_gate(standing, position, version_of, progress) for position in range(len(standing.gates))]


def evaluation_to_proto(evaluation: Evaluation, version_of: Callable[[str], str]) -> control_pb2.Evaluation:
    """The message of a gate's result."""
    evidence, gate = evaluation.evidence, evaluation.gate
    message = control_pb2.Evaluation(
        rollout_id=evaluation.rollout_id,
        organ=evaluation.organ,
        version=version_of(evaluation.digest),
        digest=evaluation.digest,
        dataset=gate.dataset,
        dataset_digest=evidence.dataset_digest,
        metric=gate.metric,
        passed=evaluation.passed,
        text=evaluation.text,
        records=evidence.records,
        value=evidence.value,
        low=evidence.low,
        high=evidence.high,
        evaluated_at=evaluation.evaluated_at,
    )
    if (found := evidence.comparison) is not None:
        message.incumbent_digest = found.incumbent_digest
        message.incumbent_value = found.incumbent_value
        message.difference = found.difference
        message.difference_low, message.difference_high = found.low, found.high
    return message


def _gate(
    standing: GateStanding, position: int, version_of: Callable[[str], str], progress: Progress
) -> control_pb2.Gate:
    gate, found = standing.gates[position], standing.found.get(position)
    answered, questions = progress(position) if found is None else (0, 0)
    return control_pb2.Gate(
        dataset=gate.dataset,
        dataset_digest=gate.dataset_digest or "",
        metric=gate.metric,
        organ=gate.organ,
        organs=gate.organs,
        at_least=gate.at_least,
        not_below_incumbent_by=gate.not_below_incumbent_by,
        state="open" if found is None else "passed" if found.passed else "failed",
        answered=answered,
        questions=questions,
        evaluation=None if found is None else evaluation_to_proto(found, version_of),
    )
