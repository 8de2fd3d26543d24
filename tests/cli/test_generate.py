import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
import typer
from google.rpc import error_details_pb2
from typer.testing import CliRunner, Result

from echovlm_ray.cli import generate as commands
from tests.certificates import write_certificates
from tests.client.scripted_server import PIECES, ScriptedEchoVLM, retry_info, serving, status

TEXT = "".join(PIECES)


@pytest.fixture
def servicer() -> ScriptedEchoVLM:
    return ScriptedEchoVLM()


@pytest.fixture
def address(servicer: ScriptedEchoVLM) -> Iterator[str]:
    with serving(servicer) as found:
        yield found


@pytest.fixture
def image(tmp_path: Path) -> str:
    path = tmp_path / "scan.png"
    path.write_bytes(b"a picture")
    return str(path)


def run(*arguments: str, stdin: bytes | None = None) -> Result:
    app = typer.Typer()
    app.command()(commands.generate)
    app.command()(commands.info)
    return CliRunner().invoke(app, list(arguments), input=stdin)


def test_the_answer_goes_to_stdout_and_its_provenance_to_stderr(
    servicer: ScriptedEchoVLM, address: str, image: str
) -> None:
    result = run("generate", image, "--task", "findings", "--language", "zh", "--server", address)
    assert result.exit_code == 0, result.output
    assert result.stdout == TEXT + "\n"
    assert "heart 1.2.0 (75%), liver 1.0.0 (25%)" in result.stderr
    for part in ("set 555555555555 ", "3 tokens", "tokens/s", "complete", "request from-the-server"):
        assert part in result.stderr
    assert "note: the organ was guessed" in result.stderr
    assert servicer.requests[0].images[0].content == b"a picture"


def test_every_option_reaches_the_request(servicer: ScriptedEchoVLM, address: str, image: str) -> None:
    arguments = ["--task", "vqa", "--prompt", "Which side?", "--organ", "heart", "--organ", "liver", "--top-k", "5"]
    arguments += ["--temperature", "0.5", "--top-p", "0.25", "--repetition-penalty", "1.5", "--seed", "7"]
    arguments += ["--max-new-tokens", "9", "--stop", "END", "--stop", "。", "--session", "visit-1", "--server", address]
    assert run("generate", image, image, *arguments).exit_code == 0
    request = servicer.requests[0]
    assert request.session_key == "visit-1"
    assert len(request.images) == 2
    assert (request.prompt, list(request.organs), list(request.stop)) == (
        "Which side?",
        ["heart", "liver"],
        ["END", "。"],
    )
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.repetition_penalty, sampling.seed) == (
        0.5,
        5,
        0.25,
        1.5,
        7,
    )
    assert request.max_new_tokens == 9


def test_a_dash_reads_stdin(servicer: ScriptedEchoVLM, address: str, image: str) -> None:
    assert run("generate", image, "-", "--server", address, stdin=b"\x89PNG\x00").exit_code == 0
    assert [file.content for file in servicer.requests[0].images] == [b"a picture", b"\x89PNG\x00"]
    assert run("generate", "-", "-", "--server", address, stdin=b"x").exit_code == commands.EXIT_INVALID


def test_a_prompt_needs_no_image(servicer: ScriptedEchoVLM, address: str) -> None:
    assert run("generate", "--task", "free", "--prompt", "What is EchoVLM?", "--server", address).exit_code == 0
    nothing = run("generate", "--server", address)
    assert nothing.exit_code == commands.EXIT_INVALID
    assert "name an image file" in nothing.stderr
    assert servicer.calls == 1


def test_json_is_one_object(address: str, image: str) -> None:
    result = run("generate", image, "--json", "--server", address)
    assert result.exit_code == 0
    answer = json.loads(result.stdout)
    assert answer["text"] == TEXT
    assert answer["finish_reason"] == "stop"
    assert answer["accepted"] == {"prompt_tokens": 11, "visual_tokens": 4, "frames": [1, 8]}
    assert [organ["organ"] for organ in answer["provenance"]["organs"]] == ["heart", "liver"]
    assert answer["provenance"]["expert_set_id"] == "5" * 64
    assert answer["notices"] == ["the organ was guessed"]


BAD_REQUEST = error_details_pb2.BadRequest(
    field_violations=[error_details_pb2.BadRequest.FieldViolation(field="images[0].content", description="is no image")]
)
ORGAN = error_details_pb2.ErrorInfo(metadata={"organ": "liver"})


@pytest.mark.parametrize(
    ("failure", "exit_code", "text"),
    [
        (status(grpc.StatusCode.INVALID_ARGUMENT, "bad", BAD_REQUEST), 2, "images[0].content: is no image"),
        (status(grpc.StatusCode.NOT_FOUND, "there is no organ 'spleen'"), 2, "no organ 'spleen'"),
        (status(grpc.StatusCode.RESOURCE_EXHAUSTED, "64 wait", retry_info(2)), 3, "Try again in 2 s."),
        (status(grpc.StatusCode.UNAVAILABLE, "the experts of 'liver' are away", retry_info(1), ORGAN), 3, "'liver'"),
        (status(grpc.StatusCode.UNAUTHENTICATED, "no token"), 5, "--token-file"),
        (status(grpc.StatusCode.PERMISSION_DENIED, "not yours"), 5, "not yours"),
        (status(grpc.StatusCode.INTERNAL, "an internal error"), 1, "an internal error (request "),
    ],
)
def test_each_failure_is_one_line_with_its_exit_status(
    servicer: ScriptedEchoVLM, address: str, image: str, failure: object, exit_code: int, text: str
) -> None:
    servicer.failures = [failure] * 9
    # Too short for a second try.
    result = run("generate", image, "--server", address, "--timeout", "0.9")
    assert result.exit_code == exit_code
    assert result.stdout == ""
    assert text in result.stderr
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1, "one line"


def test_no_server_says_how_to_start_one(image: str) -> None:
    with serving(ScriptedEchoVLM()) as address:
        pass
    result = run("generate", image, "--server", address, "--timeout", "1")
    assert result.exit_code == commands.EXIT_UNAVAILABLE
    assert "Trying again for up to 1 s" in result.stderr
    assert f"no EchoVLM server answers at {address}: start one with `make serve`" in result.stderr


def test_a_server_that_restarts_is_waited_for_and_that_is_said_once(
    servicer: ScriptedEchoVLM, address: str, image: str
) -> None:
    servicer.failures = [status(grpc.StatusCode.UNAVAILABLE, "the server stops", retry_info(0.1))] * 3
    result = run("generate", image, "--server", address)
    assert (result.exit_code, result.stdout.strip()) == (0, TEXT)
    assert result.stderr.count("Trying again for up to 300 s (--timeout); Ctrl-C ends it.") == 1
    assert servicer.calls == 4


def test_out_of_time(servicer: ScriptedEchoVLM, address: str, image: str) -> None:
    servicer.delay_s = 60
    result = run("generate", image, "--timeout", "0.3", "--server", address)
    assert result.exit_code == commands.EXIT_DEADLINE
    assert "--timeout" in result.stderr
    assert servicer.cancelled.wait(5)


@pytest.mark.parametrize(
    "arguments",
    [
        ["missing.dcm"],
        ["--task", "poem"],
        ["--max-new-tokens", "0"],
        ["--server", "http://x"],
        ["--token-file", "none"],
    ],
)
def test_what_is_wrong_here_never_calls_the_server(
    servicer: ScriptedEchoVLM, address: str, image: str, arguments: list[str]
) -> None:
    server = [] if "--server" in arguments else ["--server", address]
    result = run("generate", image, *arguments, *server)
    assert result.exit_code == commands.EXIT_INVALID
    assert result.stderr
    assert servicer.calls == 0


def test_the_server_may_come_from_the_environment(address: str, image: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ECHORAY_SERVER", address)
    assert run("generate", image).exit_code == 0


def test_token_and_certificates(servicer: ScriptedEchoVLM, tmp_path: Path, image: str) -> None:
    write_certificates(tmp_path)
    read = {name: (tmp_path / name).read_bytes() for name in ("ca.pem", "server.pem", "server.key")}
    pair = [(read["server.key"], read["server.pem"])]
    credentials = grpc.ssl_server_credentials(pair, read["ca.pem"], require_client_auth=True)
    token_file = tmp_path / "token"
    token_file.write_text("# for the clinic\n\ns3cret\nanother\n")
    secrets = ["--token-file", str(token_file), "--ca", str(tmp_path / "ca.pem")]
    secrets += ["--certificate", str(tmp_path / "client.pem"), "--key", str(tmp_path / "client.key")]
    with serving(servicer, credentials) as address:
        assert run("generate", image, "--server", address, *secrets).exit_code == 0
    assert servicer.metadata[0]["authorization"] == "Bearer s3cret"


def test_an_empty_token_file_is_named(address: str, tmp_path: Path, image: str) -> None:
    token_file = tmp_path / "token"
    token_file.touch()
    result = run("generate", image, "--server", address, "--token-file", str(token_file))
    assert result.exit_code == commands.EXIT_INVALID
    assert f"{token_file} holds no token" in result.stderr


def test_ctrl_c_cancels_on_the_server(servicer: ScriptedEchoVLM, address: str, image: str) -> None:
    servicer.wait_after = 1
    code = "import typer; from echovlm_ray.cli.generate import generate; typer.run(generate)"
    process = subprocess.Popen(
        [sys.executable, "-c", code, image, "--server", address],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    assert process.stdout is not None
    first = PIECES[0].encode()
    # Text comes before the end: the server has only begun, and waits.
    assert process.stdout.read(len(first)) == first
    assert not servicer.cancelled.is_set()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=10)
    assert process.returncode == commands.EXIT_INTERRUPTED
    assert errors.decode() == "cancelled\n"
    assert servicer.cancelled.wait(5)


def test_a_reader_that_has_seen_enough_cancels_on_the_server(
    servicer: ScriptedEchoVLM, address: str, image: str
) -> None:
    servicer.delay_s = 0.3
    code = "import typer; from echovlm_ray.cli.generate import generate; typer.run(generate)"
    process = subprocess.Popen(
        [sys.executable, "-c", code, image, "--server", address], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.read(len(PIECES[0])) == PIECES[0].encode()
    process.stdout.close()
    errors = process.stderr.read()
    process.stderr.close()
    assert process.wait(10) == commands.EXIT_FAILED
    assert errors == b""
    assert servicer.cancelled.wait(5)


def test_info(address: str) -> None:
    shown = run("info", "--server", address)
    assert shown.exit_code == 0
    for part in ("echovlm-test 0.0.1", "[for] tests", "heart (default)", "1.2.0", "at most 8 images"):
        assert part in shown.stdout
    found = json.loads(run("info", "--server", address, "--json").stdout)
    assert found["organs"][0]["organ"] == "heart"
    assert found["limits"]["max_new_tokens"] == 99
