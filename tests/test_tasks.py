"""A new task is one row of the table: in a process with one more, every part supports it."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest

from echovlm_ray.tasks import LANGUAGES, TASKS, Language, TaskName, language_of, task_of
from protos import echovlm_pb2

ROOT = Path(__file__).resolve().parent.parent
# What a developer adds to `echovlm_ray/tasks.py`, before anything else reads it.
ADDED = """
import json
from typing import Literal, get_args

from echovlm_ray import tasks

tasks.TaskName = Literal[(*get_args(tasks.TaskName), "measurements")]
tasks.TASKS["measurements"] = tasks.Task(
    "measurements",
    7,
    {"en": "Measure what these ultrasound images show.", "zh": "请测量。"},
    states=("organ", "values"),
    phantoms="findings",
)
"""
ASKED = """
from typer.testing import CliRunner

from echovlm_ray.cli.main import app
from echovlm_ray.cli.saved_request import SavedRequest
from echovlm_ray.client.request import build_request
from echovlm_ray.config import GatewaySection, RouterSection
from echovlm_ray.data.parse import parse_record
from echovlm_ray.data.phantom.phantom import attributes_at
from echovlm_ray.data.phantom.catalogue import all_classes
from echovlm_ray.data.phantom.records import records
from echovlm_ray.data.record import request_of
from echovlm_ray.errors import InvalidRequestError
from echovlm_ray.evaluation.items import item_of
from echovlm_ray.evaluation.judging import judge
from echovlm_ray.prompts import build_messages
from echovlm_ray.serving.grpc.gateway import request_from_proto
from echovlm_ray.serving.core.request_checks import check_request
from echovlm_ray.training.recipe import PhantomSection
from protos import echovlm_pb2


def check(message):
    request = request_from_proto(message)
    check_request(request, GatewaySection(), RouterSection())
    return request


def refusal(message):
    try:
        check(message)
    except InvalidRequestError as error:
        return str(error)


message = build_request(b"x", task="measurements")
(raw,) = records(attributes_at(0, 0, all_classes()), 0, 0, path="a.png", tasks=["measurements"], languages=["en"])
record, problems = parse_record(raw)
item = item_of(record, 0)
judgement = judge(item, record.target)
runner = CliRunner()
print(json.dumps({
    "client": message.task,
    "gateway": check(message).task.name,
    "no image": refusal(echovlm_pb2.GenerateRequest(task=7)),
    "no task": refusal(echovlm_pb2.GenerateRequest(task=99)),
    "prompt": build_messages("measurements", "en", "", [])[1]["content"][0]["text"],
    "data": [problems, request_of(record).task, item.task, item.kind],
    "references": len(item.references),
    "judged": [judgement.exact, judgement.attributes[0] > 1, judgement.diagnosis],
    "recipe": PhantomSection(tasks={"measurements": 1.0}).tasks,
    "saved": SavedRequest.__pydantic_fields__["task"].annotation == tasks.TaskName,
    "generate": runner.invoke(app, ["generate", "--help"], env={"COLUMNS": "200"}).output.count("measurements"),
    "phantom": runner.invoke(app, ["data", "phantom", "--help"], env={"COLUMNS": "200"}).output.count("measurements"),
    "convert": runner.invoke(app, ["data", "convert", "a", "b", "--to", "swift", "--task", "unknown"]).output,
}))
"""


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    done = subprocess.run([sys.executable, "-c", ADDED + ASKED], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def test_the_client_and_the_gateway_take_it(found: dict[str, Any]) -> None:
    assert (found["client"], found["gateway"]) == (7, "measurements")
    assert "TASK_MEASUREMENTS needs at least one image" in found["no image"]
    assert "TASK_VQA, TASK_MEASUREMENTS" in found["no task"]
    assert found["prompt"] == "Measure what these ultrasound images show."


def test_data_and_evaluation_know_it(found: dict[str, Any]) -> None:
    assert found["data"] == [[], "measurements", "measurements", "text"]
    assert found["references"] > 1
    assert found["judged"] == [True, True, None]
    assert found["recipe"] == {"measurements": 1.0}


def test_the_command_line_offers_it(found: dict[str, Any]) -> None:
    assert found["saved"]
    assert found["generate"] == found["phantom"] == 1
    assert "measurements" in found["convert"]


def test_the_names_and_the_contract_are_those_of_the_table() -> None:
    assert tuple(TASKS) == get_args(TaskName)
    assert tuple(LANGUAGES) == get_args(Language)
    for task in TASKS.values():
        assert task_of(task.value) is task
        assert set(task.instructions) in (set(), set(LANGUAGES))
        assert task.value == 0 or echovlm_pb2.Task.Name(task.value) == task.label
    assert (task_of(99), language_of(99)) == (None, None)
    assert [language_of(value) for value in (0, 1, 2)] == ["en", "en", "zh"]
