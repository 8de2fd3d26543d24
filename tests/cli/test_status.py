import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
from typer.testing import CliRunner

from echovlm_ray.cli.main import app
from echovlm_ray.config import TLSSection
from echovlm_ray.serving.control import STATUS_SERVICE
from echovlm_ray.serving.grpc.server import GrpcServer, ServerOptions
from protos import control_pb2, expert_pb2, status_pb2, status_pb2_grpc
from tests.certificates import write_certificates

DIGEST = "ab" * 32


def healthy() -> status_pb2.GetStatusResponse:
    bundle = expert_pb2.ResidentBundle(
        digest=DIGEST, name="heart-experts", version="2.1.0", resident_bytes=3_400_000_000, kernel="reference"
    )
    replicas = [
        status_pb2.ReplicaDescription(
            application="expert-heart",
            deployment="ExpertGroup",
            replica_id=f"r{number}",
            endpoint=f"127.0.0.1:4000{number}",
            node="node-1",
            pid=100 + number,
            device="cpu",
            resident_bytes=330 * 1024 * 1024,
            queue_length=number,
            organ="heart",
            bundles=[bundle],
        )
        for number in range(2)
    ]
    application = status_pb2.ApplicationStatus(name="expert-heart", status="RUNNING", replicas=replicas)
    return status_pb2.GetStatusResponse(applications=[application], expert_set_id=DIGEST)


class Status(status_pb2_grpc.SystemStatusServicer):
    def __init__(self, response: status_pb2.GetStatusResponse) -> None:
        self.response = response

    async def GetStatus(
        self, request: status_pb2.GetStatusRequest, context: grpc.aio.ServicerContext
    ) -> status_pb2.GetStatusResponse:
        return self.response


@contextmanager
def control(
    response: status_pb2.GetStatusResponse | None = None, options: ServerOptions | None = None
) -> Iterator[str]:
    """A real Control server on a separate event loop; yields its address."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    async def start() -> GrpcServer:
        server = GrpcServer(options or ServerOptions())
        if response is not None:
            server.add(status_pb2_grpc.add_SystemStatusServicer_to_server, Status(response), STATUS_SERVICE)
        await server.start()
        return server

    server = asyncio.run_coroutine_threadsafe(start(), loop).result(20)
    try:
        yield server.address
    finally:
        asyncio.run_coroutine_threadsafe(server.stop(0), loop).result(20)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def run(*arguments: str | Path) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["status", *map(str, arguments)])
    return result.exit_code, result.output


def test_the_table_has_every_replica_whole() -> None:
    with control(healthy()) as address:
        code, output = run("--control", address)
    assert code == 0
    lines = output.splitlines()
    for number in range(2):
        (line,) = [line for line in lines if f"127.0.0.1:4000{number}" in line]
        assert all(text in line for text in (str(100 + number), "330 MiB", "2.1.0", "cpu"))
    assert "node-1" in output
    assert DIGEST[:12] in output


def test_json_has_numbers_as_numbers() -> None:
    with control(healthy()) as address:
        code, output = run("--json", "--control", address)
    assert code == 0
    found = json.loads(output)
    assert found["expert_set_id"] == DIGEST
    (application,) = found["applications"]
    assert application["name"] == "expert-heart"
    replica = application["replicas"][1]
    assert replica["pid"] == 101
    assert replica["resident_bytes"] == 330 * 1024 * 1024
    assert replica["queue_length"] == 1
    assert replica["bundles"][0]["resident_bytes"] == 3_400_000_000


def test_calls_that_were_refused_are_told_by_reason_and_name() -> None:
    response = healthy()
    for replica, count in zip(response.applications[0].replicas, (2, 3), strict=True):
        replica.refusals.add(reason="quota.concurrent", caller="night[bold]", count=count)
    response.applications[0].replicas[0].refusals.add(reason="credentials", count=1)
    with control(response) as address:
        code, output = run("--control", address)
        _, as_json = run("--json", "--control", address)
    assert code == 0
    assert "expert-heart refused 5 (quota.concurrent of night[bold]), 1 (credentials)" in output
    replicas = json.loads(as_json)["applications"][0]["replicas"]
    assert replicas[0]["refusals"] == [
        {"reason": "quota.concurrent", "caller": "night[bold]", "count": 2},
        {"reason": "credentials", "caller": "", "count": 1},
    ]
    assert replicas[1]["refusals"] == [{"reason": "quota.concurrent", "caller": "night[bold]", "count": 3}]


def test_a_part_that_is_not_well_is_told_with_the_reason_and_by_the_exit_status() -> None:
    response = healthy()
    response.applications.add(name="vision", status="DEPLOY_FAILED", message="ValueError: no GPU [here]")
    response.applications[0].replicas[0].pid = 0
    with control(response) as address:
        code, output = run("--control", address)
    assert code == 1
    assert "DEPLOY_FAILED" in output
    assert "vision: ValueError: no GPU [here]" in output
    assert "silent" in output


def unanswered(holding: int) -> control_pb2.OrganProblem:
    reason = control_pb2.ReplicaProblem(replica="r1", text="the registry [/srv] has no bundle")
    return control_pb2.OrganProblem(
        organ="heart", version="2.1.0", digest=DIGEST, replicas=2, holding=holding, reasons=[reason]
    )


def test_an_organ_that_cannot_be_answered_is_told_with_the_reason_and_by_the_exit_status() -> None:
    response = healthy()
    response.problems.append(unanswered(holding=0))
    with control(response) as address:
        code, output = run("--control", address)
        assert run("--control", address, "--json")[0] == 1
    assert code == 1
    assert "NOT SERVING" in output
    assert "heart cannot be answered: no replica holds 2.1.0: r1: the registry [/srv] has no bundle" in output


def test_an_organ_that_fewer_replicas_answer_is_told_and_all_is_well() -> None:
    response = healthy()
    response.problems.append(unanswered(holding=1))
    with control(response) as address:
        code, output = run("--control", address)
        found = json.loads(run("--control", address, "--json")[1])
    assert (code, "RUNNING" in output) == (0, True)
    assert "heart is answered by fewer replicas: 1 of 2 replicas hold 2.1.0: r1: the registry" in output
    assert found["problems"] == [
        {
            "organ": "heart",
            "version": "2.1.0",
            "digest": DIGEST,
            "answers": True,
            "replicas": 2,
            "holding": 1,
            "reasons": [{"replica": "r1", "text": "the registry [/srv] has no bundle"}],
        }
    ]


def test_what_a_router_cannot_take_up_is_told() -> None:
    response = healthy()
    router = status_pb2.ReplicaDescription(endpoint="127.0.0.1:4", pid=4, node="node-1", problem="policy 7 cannot be")
    response.applications.add(name="router", status="RUNNING", replicas=[router])
    with control(response) as address:
        assert "router: policy 7 cannot be" in run("--control", address)[1]


def test_what_multiplies_is_told() -> None:
    response = healthy()
    response.applications[0].replicas[0].arithmetic = response.applications[0].replicas[1].arithmetic = "the C library"
    with control(response) as address:
        assert "products on the CPU by the C library\n" in run("--control", address)[1]
        assert json.loads(run("--control", address, "--json")[1])["applications"][0]["replicas"][0]["arithmetic"]
    router = status_pb2.ReplicaDescription(pid=4, arithmetic="oneDNN; there is no C library")
    response.applications.add(name="router", status="RUNNING", replicas=[router])
    with control(response) as address:
        output = run("--control", address)[1]
    assert "products on the CPU of expert-heart by the C library" in output
    assert "products on the CPU of router by oneDNN; there is no C library" in output


def test_nothing_there_is_one_clear_line() -> None:
    code, output = run("--control", "127.0.0.1:1", "--timeout", "2")
    assert code == 3
    assert "nothing answers at 127.0.0.1:1" in output
    assert "echoray serve" in output


def test_another_server_is_not_taken_for_control() -> None:
    with control(None) as address:
        code, output = run("--control", address)
    assert code == 3
    assert "is not Control" in output


def test_a_token_is_asked_for_and_sent(tmp_path: Path) -> None:
    tokens = tmp_path / "tokens"
    tokens.touch(0o600)
    tokens.write_text("# ours\nsecret\n")
    with control(healthy(), ServerOptions(token_file=tokens)) as address:
        code, output = run("--control", address)
        assert code == 5
        assert "--token-file" in output
        assert run("--control", address, "--token-file", tokens)[0] == 0


def test_tls_is_spoken_with_the_given_authority(tmp_path: Path) -> None:
    write_certificates(tmp_path)
    tls = TLSSection(certificate=tmp_path / "server.pem", key=tmp_path / "server.key")
    with control(healthy(), ServerOptions(tls=tls)) as address:
        assert run("--control", address, "--ca", tmp_path / "ca.pem")[0] == 0
        assert run("--control", address, "--ca", tmp_path / "other.pem", "--timeout", "3")[0] == 3


@pytest.mark.parametrize(("content", "text"), [(None, "No such file"), ("# none\n", "holds no token")])
def test_an_unusable_token_file_is_told(tmp_path: Path, content: str | None, text: str) -> None:
    path = tmp_path / "tokens"
    if content is not None:
        path.write_text(content)
    code, output = run("--token-file", path)
    assert code == 2
    assert text in output
