import gc
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest

from echovlm_ray.client import (
    TLS,
    Accepted,
    AnswerStream,
    CallCancelledError,
    DeadlineExceededError,
    EchoVLMClient,
    InternalServerError,
    Summary,
    Text,
    UnavailableError,
)
from tests.client.scripted_server import PIECES, ScriptedEchoVLM, retry_info, serving, status

UNAVAILABLE = status(grpc.StatusCode.UNAVAILABLE, "the experts of 'liver' are away", retry_info(0.1))


def test_generate_gives_text_and_provenance(servicer: ScriptedEchoVLM, address: str) -> None:
    with EchoVLMClient(address) as client:
        answer = client.generate([b"one", b"two"], task="findings", organs=["heart"])
    assert answer.text == str(answer) == "".join(PIECES)
    summary = answer.summary
    assert (summary.request_id, summary.finish_reason) == ("from-the-server", "stop")
    assert (summary.prompt_tokens, summary.completion_tokens) == (11, 3)
    assert summary.notices == ("the organ was guessed",)
    assert summary.provenance.organ_source == "caller"
    assert [(organ.organ, organ.bundle_version, organ.routed_share) for organ in summary.provenance.organs] == [
        ("heart", "1.2.0", 0.75),
        ("liver", "1.0.0", 0.25),
    ]
    assert [image.content for image in servicer.requests[0].images] == [b"one", b"two"]


def test_stream_gives_events_in_order(address: str) -> None:
    with EchoVLMClient(address) as client, client.stream(b"x") as stream:
        events = list(stream)
    assert events[0] == Accepted(prompt_tokens=11, visual_tokens=4, frames=(1, 8)) == stream.accepted
    assert events[1:-1] == [Text(piece) for piece in PIECES]
    assert isinstance(events[-1], Summary)
    assert events[-1] is stream.summary


def test_the_text_alone_is_easy(address: str) -> None:
    with EchoVLMClient(address) as client:
        stream = client.stream(b"x")
        assert list(stream.text()) == list(PIECES)
        assert stream.summary is not None


def test_text_arrives_while_it_is_written(servicer: ScriptedEchoVLM, address: str) -> None:
    servicer.wait_after = 1
    with EchoVLMClient(address) as client, client.stream(b"x") as stream:
        assert isinstance(next(stream), Accepted)
        # The server now waits forever: only streaming can bring the first piece.
        assert next(stream) == Text(PIECES[0])


def test_model_info(address: str) -> None:
    with EchoVLMClient(address) as client:
        info = client.model_info()
    assert (info.name, info.version, info.default_organ) == ("echovlm-test", "0.0.1", "heart")
    assert [(organ.organ, organ.num_experts) for organ in info.organs] == [("heart", 4)]
    assert info.limits.max_new_tokens == 99


def test_a_lost_call_is_sent_again(servicer: ScriptedEchoVLM, address: str) -> None:
    # Larger than gRPC's own retry buffer, with which it would not be sent again.
    image = b"x" * 3_000_000
    servicer.failures = [UNAVAILABLE, UNAVAILABLE]
    with EchoVLMClient(address) as client:
        assert client.generate(image).text == "".join(PIECES)
    assert servicer.calls == 3
    assert servicer.requests[0].images[0].content == image


@pytest.mark.parametrize("call", [lambda client: client.model_info(), lambda client: list(client.stream(b"x"))])
def test_other_calls_are_sent_again_too(
    servicer: ScriptedEchoVLM, address: str, call: Callable[[EchoVLMClient], object]
) -> None:
    servicer.failures = [UNAVAILABLE, UNAVAILABLE]
    with EchoVLMClient(address) as client:
        assert call(client)
    assert servicer.calls == 3


def test_a_stream_is_not_sent_again_once_its_text_has_begun(servicer: ScriptedEchoVLM, address: str) -> None:
    servicer.failures, servicer.fail_after = [UNAVAILABLE], 1
    with EchoVLMClient(address) as client:
        stream = client.stream(b"x")
        received = [next(stream), next(stream)]
        with pytest.raises(UnavailableError):
            next(stream)
    assert received[1:] == [Text(PIECES[0])]
    assert servicer.calls == 1


def test_a_call_that_races_with_a_stopping_server_is_sent_again(servicer: ScriptedEchoVLM, address: str) -> None:
    servicer.failures = [status(grpc.StatusCode.CANCELLED, "the server stops")]
    with EchoVLMClient(address) as client:
        assert client.generate(b"x").text == "".join(PIECES)
    assert servicer.calls == 2


def test_a_stream_that_was_lost_before_its_text_is_sent_again_and_says_nothing_twice(
    servicer: ScriptedEchoVLM, address: str
) -> None:
    servicer.failures, servicer.fail_after = [UNAVAILABLE, UNAVAILABLE], 0
    with EchoVLMClient(address) as client, client.stream(b"x") as stream:
        events = list(stream)
    assert servicer.calls == 3
    assert [type(event) for event in events] == [Accepted, *[Text] * len(PIECES), Summary]
    assert "".join(event.text for event in events if isinstance(event, Text)) == "".join(PIECES)


@pytest.mark.parametrize("call", [lambda client: client.generate(b"x"), lambda client: list(client.stream(b"x"))])
def test_tries_end_with_the_calls_own_time_and_tell_the_reason(
    servicer: ScriptedEchoVLM, address: str, call: Callable[[EchoVLMClient], object]
) -> None:
    servicer.failures = [UNAVAILABLE] * 100
    errors: list[str] = []
    client = EchoVLMClient(address, timeout_s=3.0, waiting=lambda error: errors.append(str(error)))
    with client, pytest.raises(UnavailableError, match="liver"):
        call(client)
    assert servicer.calls == len(errors) + 1 > 2
    assert set(errors) == {"the experts of 'liver' are away"}


def test_a_server_that_is_away_for_long_is_waited_for_as_long_as_the_caller_waits(servicer: ScriptedEchoVLM) -> None:
    with serving(servicer) as address:
        port = int(address.rpartition(":")[2])
    found: list[str] = []
    waited = threading.Event()
    tries: list[float] = []

    def waiting(error: Exception) -> None:
        tries.append(time.monotonic())
        if tries[-1] - tries[0] > 8.5:
            waited.set()

    with EchoVLMClient(f"127.0.0.1:{port}", timeout_s=60, waiting=waiting) as client:
        caller = threading.Thread(target=lambda: found.append(client.generate(b"x").text))
        caller.start()
        # Longer than a gateway that was killed is away.
        assert waited.wait(30)
        with serving(servicer, port=port):
            caller.join(20)
    assert found == ["".join(PIECES)]


def test_closing_the_client_ends_its_waiting(servicer: ScriptedEchoVLM, address: str) -> None:
    servicer.failures = [UNAVAILABLE] * 100
    waits = threading.Event()
    caught: list[Exception] = []

    def call() -> None:
        try:
            client.generate(b"x")
        except UnavailableError as error:
            caught.append(error)

    client = EchoVLMClient(address, waiting=lambda error: waits.set())
    caller = threading.Thread(target=call)
    caller.start()
    assert waits.wait(10)
    client.close()
    caller.join(10)
    assert len(caught) == 1


def test_cancelling_a_stream_that_waits_ends_it(servicer: ScriptedEchoVLM, address: str) -> None:
    servicer.failures = [UNAVAILABLE] * 100
    streams: list[AnswerStream] = []
    with EchoVLMClient(address, waiting=lambda error: streams[0].cancel()) as client:
        streams.append(client.stream(b"x"))
        with pytest.raises(UnavailableError):
            next(streams[0])
    assert servicer.calls == 1


def test_a_caller_may_want_to_hear_at_once(servicer: ScriptedEchoVLM, address: str) -> None:
    servicer.failures = [UNAVAILABLE] * 20
    with EchoVLMClient(address, retry=False) as client, pytest.raises(UnavailableError):
        client.generate(b"x")
    assert servicer.calls == 1


def test_what_is_not_lost_is_not_sent_again(servicer: ScriptedEchoVLM, address: str) -> None:
    servicer.failures = [status(grpc.StatusCode.INTERNAL, "broken")]
    with EchoVLMClient(address) as client, pytest.raises(InternalServerError):
        client.generate(b"x")
    assert servicer.calls == 1


def test_a_server_that_starts_late_is_waited_for(servicer: ScriptedEchoVLM) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    found: list[str] = []
    with EchoVLMClient(f"127.0.0.1:{port}") as client:
        caller = threading.Thread(target=lambda: found.append(client.model_info().name))
        caller.start()
        time.sleep(0.3)
        with serving(servicer, port=port):
            caller.join(10)
    assert found == ["echovlm-test"]


def test_a_deadline_ends_the_call_on_both_sides(servicer: ScriptedEchoVLM, address: str) -> None:
    servicer.delay_s = 60
    started = time.monotonic()
    with EchoVLMClient(address, timeout_s=0.3) as client, pytest.raises(DeadlineExceededError):
        client.generate(b"x")
    assert 0.25 < time.monotonic() - started < 5
    assert servicer.cancelled.wait(5)


def test_a_call_may_have_its_own_deadline(servicer: ScriptedEchoVLM, address: str) -> None:
    servicer.delay_s = 60
    with EchoVLMClient(address, timeout_s=60) as client, pytest.raises(DeadlineExceededError):
        list(client.stream(b"x", timeout_s=0.3))
    assert servicer.cancelled.wait(5)


def test_leaving_a_stream_cancels_it_on_the_server(servicer: ScriptedEchoVLM, address: str) -> None:
    servicer.wait_after = 1
    with EchoVLMClient(address) as client:
        with client.stream(b"x") as stream:
            next(stream)
            next(stream)
            assert not servicer.cancelled.is_set()
        assert servicer.cancelled.wait(5)
        with pytest.raises(CallCancelledError):
            next(stream)


def test_a_forgotten_stream_is_cancelled(servicer: ScriptedEchoVLM, address: str) -> None:
    servicer.wait_after = 1
    with EchoVLMClient(address) as client:
        stream = client.stream(b"x")
        next(stream)
        next(stream)
        del stream
        gc.collect()
        assert servicer.cancelled.wait(5)


def test_a_stream_without_an_end_is_an_error(servicer: ScriptedEchoVLM, address: str) -> None:
    servicer.omit_summary = True
    with EchoVLMClient(address) as client, pytest.raises(InternalServerError, match="without a summary"):
        list(client.stream(b"x"))


def test_the_request_id_and_the_token_travel(servicer: ScriptedEchoVLM, address: str) -> None:
    with EchoVLMClient(address, token="s3cret") as client:
        client.generate(b"x", request_id="case-1")
        stream = client.stream(b"x")
        list(stream)
    assert servicer.metadata[0]["x-request-id"] == "case-1"
    assert servicer.metadata[1]["x-request-id"] == stream.request_id
    assert len(stream.request_id) >= 16
    assert all(metadata["authorization"] == "Bearer s3cret" for metadata in servicer.metadata)


@pytest.mark.parametrize("request_id", ["", "with space", "line\nbreak", "é", "a;b", "x" * 129])
def test_a_request_id_that_cannot_travel_is_refused(address: str, request_id: str) -> None:
    with EchoVLMClient(address) as client, pytest.raises(ValueError, match="request_id"):
        client.generate(b"x", request_id=request_id)


def test_a_token_never_crosses_a_network_unencrypted() -> None:
    with pytest.raises(ValueError, match="in the clear"):
        EchoVLMClient("gateway.example:50051", token="s3cret")
    with pytest.raises(ValueError, match="in the clear"):
        # A name that only begins like loopback.
        EchoVLMClient("127.0.0.1.example:50051", token="s3cret")
    for local in ("127.0.0.1:1", "localhost:1", "[::1]:1", "unix:/tmp/socket"):
        EchoVLMClient(local, token="s3cret").close()
    EchoVLMClient("gateway.example:50051", token="s3cret", tls=TLS()).close()


@pytest.mark.parametrize("token", ["", "two words", "line\n"])
def test_a_token_that_cannot_travel_is_refused(token: str) -> None:
    with pytest.raises(ValueError, match="one line"):
        EchoVLMClient(token=token)


@pytest.mark.parametrize("address", ["", "http://127.0.0.1:50051"])
def test_an_address_that_is_none_is_refused(address: str) -> None:
    with pytest.raises(ValueError, match="host:port"):
        EchoVLMClient(address)


def test_one_client_serves_many_threads(servicer: ScriptedEchoVLM, address: str) -> None:
    answers: list[str] = []
    with EchoVLMClient(address) as client:
        threads = [threading.Thread(target=lambda: answers.append(client.generate(b"x").text)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
    assert answers == ["".join(PIECES)] * 8
    assert len({metadata["x-request-id"] for metadata in servicer.metadata}) == 8


def test_tls_checks_the_server_and_shows_the_client(servicer: ScriptedEchoVLM, certificates: Path) -> None:
    read = {name: (certificates / name).read_bytes() for name in ("ca.pem", "server.pem", "server.key")}
    credentials = grpc.ssl_server_credentials(
        [(read["server.key"], read["server.pem"])], read["ca.pem"], require_client_auth=True
    )
    ours = TLS(
        authority=certificates / "ca.pem", certificate=certificates / "client.pem", key=certificates / "client.key"
    )
    with serving(servicer, credentials) as address:
        with EchoVLMClient(address, tls=ours, token="s3cret") as client:
            assert client.model_info().name == "echovlm-test"
        # Without a certificate of its own, and with an authority that signed nothing here.
        for wrong in (TLS(authority=certificates / "ca.pem"), TLS(authority=certificates / "other.pem")):
            with EchoVLMClient(address, tls=wrong, retry=False) as client, pytest.raises(UnavailableError) as caught:
                client.model_info()
            assert not caught.value.reached


def test_a_certificate_needs_its_key() -> None:
    with pytest.raises(ValueError, match="give both or neither"):
        EchoVLMClient("127.0.0.1:1", tls=TLS(certificate="client.pem"))
