"""Nothing that comes from elsewhere steers the terminal: every command, with hostile strings in every field."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from typer.testing import CliRunner, Result

from echovlm_ray.cli.checkpoint_report import print_report
from echovlm_ray.cli.evaluation_output import print_comparison, print_result
from echovlm_ray.cli.experts_tables import print_check, print_diff
from echovlm_ray.cli.main import app
from echovlm_ray.cli.terminal import console_of
from protos import control_pb2, control_pb2_grpc, echovlm_pb2, echovlm_pb2_grpc, status_pb2, status_pb2_grpc

MARK = "[bold red]x[/bold red]"
HOSTILE = f"a\x1b[31m\x1b]0;t\x07\x9b2J\u202eb\u200b\u2028\r\x7f{MARK}:smile:" + "y" * 3000
STEP = "\x1b]52;c;owned\x07 \u2066 step"


def filled(message: Message) -> Any:
    """The message with the hostile text in every field that takes text, two of each that may be repeated."""
    for field in message.DESCRIPTOR.fields:
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            continue
        if field.message_type is not None:
            values = [filled(getattr(message, field.name).add()) for _ in range(2)] if field.is_repeated else []
            if not values:
                filled(getattr(message, field.name))
        elif field.cpp_type == FieldDescriptor.CPPTYPE_STRING:
            _set(message, field, HOSTILE)
        else:
            _set(message, field, 1)
    return message


def _set(message: Message, field: Any, value: Any) -> None:
    if field.is_repeated:
        getattr(message, field.name).extend([value] * 2)
    else:
        setattr(message, field.name, value)


class HostileControl(control_pb2_grpc.ExpertControlServicer):
    """Answers every call, or refuses it, with hostile text."""

    def __init__(self) -> None:
        self.refusal: grpc.StatusCode | None = None

    def answer(self, kind: type[Message], context: grpc.ServicerContext) -> Any:
        if self.refusal is not None:
            context.abort(self.refusal, HOSTILE)
        response = filled(kind())
        for rollout in [*getattr(response, "rollouts", ()), getattr(response, "rollout", None)]:
            if rollout is not None:
                rollout.organ, rollout.state = "heart", "canary"
        return response

    def Push(self, request_iterator: Any, context: Any) -> Any:
        for _ in request_iterator:
            pass
        return self.answer(control_pb2.PushResponse, context)

    def operation(self, request: Any, context: Any) -> Any:
        return self.answer(control_pb2.OperationResponse, context)

    Stage = Canary = Shadow = Promote = Rollback = RollBackStable = Retire = Apply = operation

    def List(self, request: Any, context: Any) -> Any:
        return self.answer(control_pb2.ListResponse, context)

    def History(self, request: Any, context: Any) -> Any:
        response = self.answer(control_pb2.HistoryResponse, context)
        response.entries[0].details_json = json.dumps({HOSTILE: HOSTILE, "to_state": HOSTILE})
        return response

    def Watch(self, request: Any, context: Any) -> Any:
        yield self.answer(control_pb2.ControlState, context)
        context.abort(grpc.StatusCode.PERMISSION_DENIED, HOSTILE)


class HostileStatus(status_pb2_grpc.SystemStatusServicer):
    def GetStatus(self, request: Any, context: Any) -> Any:
        return filled(status_pb2.GetStatusResponse())


class HostileGateway(echovlm_pb2_grpc.EchoVLMServicer):
    def __init__(self) -> None:
        self.refusal: grpc.StatusCode | None = None

    def GetModelInfo(self, request: Any, context: Any) -> Any:
        return filled(echovlm_pb2.ModelInfo())

    def GenerateStream(self, request: Any, context: Any) -> Any:
        if self.refusal is not None:
            context.abort(self.refusal, HOSTILE)
        yield echovlm_pb2.GenerateEvent(text="an answer")
        yield echovlm_pb2.GenerateEvent(summary=filled(echovlm_pb2.GenerateSummary()))


@pytest.fixture
def control() -> HostileControl:
    return HostileControl()


@pytest.fixture
def gateway() -> HostileGateway:
    return HostileGateway()


@pytest.fixture
def address(control: HostileControl, gateway: HostileGateway) -> Iterator[str]:
    server = grpc.server(ThreadPoolExecutor(4))
    control_pb2_grpc.add_ExpertControlServicer_to_server(control, server)
    status_pb2_grpc.add_SystemStatusServicer_to_server(HostileStatus(), server)
    echovlm_pb2_grpc.add_EchoVLMServicer_to_server(gateway, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None).wait()


def check(text: str) -> None:
    """Nothing but what draws itself; markup is text, and no name fills the screen."""
    assert text
    wrong = {letter for letter in text if not letter.isprintable() and letter not in "\n\t"}
    assert not wrong
    assert "😄" not in text


def run(*arguments: object) -> Result:
    result = CliRunner().invoke(app, [*map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


COMMANDS: list[tuple[str, ...]] = [
    ("stage", "heart", "1.1.0"),
    ("stage", "heart", "1.1.0", "--dry-run"),
    ("shadow", "heart", "--percent", "5"),
    ("canary", "heart", "--percent", "5"),
    ("promote", "heart"),
    ("rollback", "heart"),
    ("rollback", "heart", "--stable", "1.1.0"),
    ("retire", "heart"),
    ("list",),
    ("list", "--organ", "heart"),
    ("history",),
    ("history", "heart", "--verify"),
    ("watch",),
]


@pytest.mark.parametrize("json_", [(), ("--json",)], ids=["text", "json"])
@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_what_control_says_is_harmless(address: str, command: tuple[str, ...], json_: tuple[str, ...]) -> None:
    result = run("experts", *command, *json_, "--control", address)
    check(result.output)
    if json_:
        assert _reads_back(result.stdout)
    else:
        # Of names that are shown, no more than a line.
        assert "y" * 1000 not in result.stdout


def _reads_back(text: str) -> bool:
    """Whether JSON, one document or one a line, holds the hostile text itself."""
    documents = [text] if text.startswith("{\n") else [row for row in text.splitlines() if row.startswith("{")]
    return any(json.dumps(HOSTILE) in json.dumps(json.loads(document)) for document in documents)


@pytest.mark.parametrize("code", [code for code in grpc.StatusCode if code != grpc.StatusCode.OK])
def test_what_control_refuses_with_is_harmless(address: str, control: HostileControl, code: grpc.StatusCode) -> None:
    control.refusal = code
    for command in (("list",), ("rollback", "heart"), ("history",)):
        result = run("experts", *command, "--control", address)
        assert result.exit_code
        check(result.stderr)


@pytest.mark.parametrize("json_", [(), ("--json",)], ids=["text", "json"])
def test_status_and_the_gateway_are_harmless(address: str, json_: tuple[str, ...]) -> None:
    check(run("status", "--control", address, *json_).output)
    check(run("info", "--server", address, *json_).output)
    check(run("generate", "--prompt", "what?", "--server", address, *json_).output)


@pytest.mark.parametrize("code", [grpc.StatusCode.INTERNAL, grpc.StatusCode.NOT_FOUND, grpc.StatusCode.UNAVAILABLE])
def test_what_a_gateway_refuses_with_is_harmless(address: str, gateway: HostileGateway, code: grpc.StatusCode) -> None:
    gateway.refusal = code
    # UNAVAILABLE is tried again until the time is over.
    check(run("generate", "--prompt", "what?", "--server", address, "--timeout", "1").stderr)


def test_a_name_of_3000_letters_is_cut(address: str) -> None:
    printed = run("experts", "list", "--control", address).stdout
    assert "…" in printed
    # Sentences, like notices before the state and reasons in it, may be longer than names.
    names = printed.partition("expert set")[2].partition("reason")[0]
    assert "y" * 61 not in names.replace("\n", "").replace(" ", "")
    assert "y" * 1001 not in printed


def test_a_dataset_and_its_file_are_harmless(tmp_path: Path) -> None:
    from tests.data.records import record, write_lines

    folder = tmp_path / "\x1b]0;owned\x07\u202e[red]"
    folder.mkdir()
    hostile = STEP * 3
    file = write_lines(
        folder / "re\x9bcords.jsonl",
        [
            record(hostile, organ=hostile, task=hostile, language=hostile),
            record(hostile, image=[hostile]),
            {hostile: hostile},
        ],
    )
    for command in (("check", "--names"), ("check", "--json", "--names"), ("stats",), ("stats", "--json")):
        check(run("data", command[0], file, *command[1:]).output)
    check(run("data", "check", folder / "\x1bnone.jsonl").output)
    check(run("data", "convert", file, folder / "out.jsonl").output)


def test_results_of_evaluations_and_bundles_are_harmless(capsys: pytest.CaptureFixture[str]) -> None:
    from echovlm_ray.checkpoint.inspect import CheckpointReport
    from echovlm_ray.evaluation.comparing import ComparedMetric, Comparison
    from echovlm_ray.evaluation.result import EvaluationResult, GroupScores, Score
    from echovlm_ray.evaluation.settings import AskSettings, Target
    from experts.bundles.diff import BundleDiff, FieldChange
    from experts.checks.check import CheckResult

    target = Target.model_construct(name=HOSTILE, version=HOSTILE, expert_set_id=HOSTILE)
    groups = [
        GroupScores(
            variant="model",
            by=by,
            name=f"{number}{HOSTILE}",
            records=1,
            substance={"attribute F1": Score(value=0.5, low=0.4, high=0.6), HOSTILE: Score(error=HOSTILE)},
            words={"BLEU-1": Score(value=1.0)},
        )
        for by in ("all", "organ", "class")
        for number in range(2)
    ]
    result = EvaluationResult.model_construct(groups=groups, notices=[HOSTILE], target=target, asking=AskSettings())
    print_result(result, console_of())
    metric = ComparedMetric(by=HOSTILE, group=HOSTILE, name=HOSTILE, words=True, records=1)
    print_comparison(
        Comparison.model_construct(first=target, second=target, notices=[HOSTILE], metrics=[metric]), console_of()
    )
    print_report(
        CheckpointReport(
            directory=HOSTILE,
            kind="split",
            parameters=1,
            parts=(),
            dtypes=(HOSTILE,),
            bytes_on_disk=1,
            weight_files=1,
            name=HOSTILE,
            version=HOSTILE,
            description=HOSTILE,
            notes=(HOSTILE,),
            problems=(HOSTILE,),
        )
    )
    print_diff(BundleDiff("a", "b", (FieldChange(HOSTILE, HOSTILE, {HOSTILE: [HOSTILE]}),), incomparable=HOSTILE))
    print_check(
        CheckResult.model_construct(
            ok=True,
            organ=HOSTILE,
            version=HOSTILE,
            digest=HOSTILE,
            signature=HOSTILE,
            kernel=HOSTILE,
            dtype="float32",
            probe_recorded=True,
            worst_error=0.1,
            tolerance=0.2,
            resident_bytes=1,
        )
    )
    check(capsys.readouterr().out)
