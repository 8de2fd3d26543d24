"""The load generator: arrivals, what counts as good, and that it never waits, against real gRPC servers."""

import asyncio
import json
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.goodput import Targets, rate_table, result_of
from benchmarks.load import Questions
from benchmarks.open_loop import Outcome, Question, Trial, offer, poisson_arrivals
from echovlm_ray.client import AsyncEchoVLMClient, GenerateOptions
from protos import echovlm_pb2, echovlm_pb2_grpc
from tests.running_system import RunningSystem

ROOT = Path(__file__).resolve().parents[2]
TARGETS = Targets(first_text_s=1.0, per_token_s=0.1)
ANSWER_SECONDS = 0.6


@given(rate=st.floats(0.1, 200.0), seconds=st.floats(0.1, 20.0), seed=st.integers(0, 2**32))
@settings(max_examples=50, deadline=None)
def test_arrivals_are_ascending_and_repeat_with_the_seed(rate: float, seconds: float, seed: int) -> None:
    arrivals = poisson_arrivals(rate, seconds, seed)
    assert arrivals == sorted(arrivals) == poisson_arrivals(rate, seconds, seed)
    assert all(0 <= moment < seconds for moment in arrivals)


def test_arrivals_are_a_poisson_process() -> None:
    arrivals = poisson_arrivals(50.0, 400.0, 7)
    assert len(arrivals) == pytest.approx(20_000, rel=0.03)
    # In a Poisson process the counts of equal spans have a variance equal to their mean; an even clock's have none.
    counts = [sum(1 for moment in arrivals if second <= moment < second + 1) for second in range(400)]
    assert statistics.variance(counts) == pytest.approx(50.0, rel=0.25)


@pytest.mark.parametrize(("rate", "seconds"), [(0.0, 1.0), (1.0, 0.0), (-1.0, 1.0)])
def test_a_rate_or_time_of_nothing_is_refused(rate: float, seconds: float) -> None:
    with pytest.raises(ValueError, match="above 0"):
        poisson_arrivals(rate, seconds, 0)


def outcome(first_s: float, end_s: float, tokens: int, error: str = "") -> Outcome:
    return Outcome(lag_s=0.001, pieces=[first_s], end_s=end_s, tokens=tokens, error=error)


@pytest.mark.parametrize(
    ("found", "good"),
    [
        (outcome(1.0, 1.9, 10), True),
        (outcome(1.01, 1.1, 10), False),
        (outcome(0.1, 1.1, 10), False),
        (outcome(0.1, 5.0, 1), True),
        (outcome(0.1, 0.2, 10, error="UnavailableError"), False),
        (outcome(0.1, 0.2, 0), False),
        # All of its text was held back until the end.
        (Outcome(lag_s=0.0, end_s=0.9, tokens=10), True),
    ],
)
def test_what_is_good(found: Outcome, good: bool) -> None:
    assert TARGETS.met_by(found) == good


def test_a_trial_is_summed_up() -> None:
    trial = Trial(2.0, arrived=5, open_s=4.0, whole_s=8.0)
    trial.outcomes += [outcome(0.5, 0.95, 10), outcome(0.7, 1.42, 10), outcome(2.0, 3.0, 21)]
    trial.outcomes.append(outcome(0.1, 0.2, 0, error="OverloadedError"))
    result = result_of(trial, TARGETS)
    assert (result.arrived, result.attained, result.goodput, result.good_share) == (1.25, 3 / 8, 0.5, 0.5)
    assert result.errors == {"OverloadedError": 1}
    assert result.latencies_ms["first text"]["p50"] == pytest.approx(700)
    assert result.latencies_ms["per token"]["p50"] == pytest.approx(50)
    assert result.lag_ms == pytest.approx(1.0)
    row = rate_table([result])[-1]
    assert "1 OverloadedError" in row
    assert "**0.50**" in row
    json.dumps(result.to_json())


def test_nothing_answered_is_no_error() -> None:
    trial = Trial(1.0, [outcome(0.0, 0.1, 0, error="UnavailableError")], arrived=1, open_s=1.0, whole_s=1.0)
    result = result_of(trial, TARGETS)
    assert (result.goodput, result.latencies_ms) == (0.0, {})
    assert "1 UnavailableError" in rate_table([result])[-1]


def test_questions_differ_and_repeat() -> None:
    questions = Questions("1, 0", words=10, new_tokens=5, organs=("heart", "liver"), images=())
    asked = [questions(index) for index in range(50)]
    assert asked == [questions(index) for index in range(50)]
    assert len({question.options["prompt"] for question in asked}) == 50
    assert {tuple(question.options["organs"]) for question in asked} == {("heart",), ("liver",)}


class SlowService(echovlm_pb2_grpc.EchoVLMServicer):
    """Answers in two pieces, after a while; refuses what asks it to."""

    def __init__(self) -> None:
        self.cancelled = 0

    async def GenerateStream(
        self, request: echovlm_pb2.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[echovlm_pb2.GenerateEvent]:
        if request.prompt == "refuse":
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "full")
        try:
            await asyncio.sleep(ANSWER_SECONDS / 2)
            yield echovlm_pb2.GenerateEvent(text="one ")
            await asyncio.sleep(ANSWER_SECONDS / 2)
            yield echovlm_pb2.GenerateEvent(text="two")
            yield echovlm_pb2.GenerateEvent(summary=echovlm_pb2.GenerateSummary(completion_tokens=7))
        except asyncio.CancelledError:
            self.cancelled += 1
            raise


async def offer_to_slow(
    trial: Trial, arrivals: list[float], prompts: list[str], *, seconds: float, stop_after_s: float | None = None
) -> SlowService:
    server = grpc.aio.server()
    service = SlowService()
    echovlm_pb2_grpc.add_EchoVLMServicer_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    stopping = asyncio.Event()
    if stop_after_s is not None:
        asyncio.get_running_loop().call_later(stop_after_s, stopping.set)
    try:
        async with AsyncEchoVLMClient(f"127.0.0.1:{port}", retry=False) as client:
            await offer(
                client,
                trial,
                arrivals,
                lambda index: Question(GenerateOptions(task="free", prompt=prompts[index])),
                seconds=seconds,
                timeout_s=30.0,
                stopping=stopping,
            )
    finally:
        await server.stop(1.0)
    return service


async def test_arrivals_never_wait_for_answers() -> None:
    arrivals = [0.02 * index for index in range(20)]
    trial = Trial(50.0)
    await offer_to_slow(trial, arrivals, ["ask"] * 20, seconds=0.5)
    assert (trial.arrived, len(trial.outcomes), trial.cut_short) == (20, 20, False)
    assert trial.open_s == pytest.approx(0.5)
    # One after the other they would take twelve seconds.
    assert arrivals[-1] + ANSWER_SECONDS <= trial.whole_s < 5.0
    for found in trial.outcomes:
        assert (found.tokens, found.error, len(found.pieces)) == (7, "", 2)
        assert ANSWER_SECONDS / 2 <= found.first_text_s < found.end_s
        assert found.per_token_s == pytest.approx((found.end_s - found.pieces[0]) / 6)


async def test_refusals_are_counted_by_kind() -> None:
    trial = Trial(50.0)
    await offer_to_slow(trial, [0.0, 0.01, 0.02], ["refuse", "ask", "refuse"], seconds=0.1)
    result = result_of(trial, TARGETS)
    assert result.errors == {"OverloadedError": 2}
    assert result.good_share == pytest.approx(1 / 3)


async def test_stopping_cancels_what_is_under_way_and_keeps_what_has_ended() -> None:
    trial = Trial(10.0)
    arrivals = [0.0, 0.9, 1.0, 30.0]
    service = await offer_to_slow(trial, arrivals, ["ask"] * 4, seconds=60.0, stop_after_s=1.2)
    assert (trial.arrived, len(trial.outcomes), trial.cut_short) == (3, 1, True)
    assert 1.1 < trial.open_s < 5.0
    assert trial.whole_s == pytest.approx(trial.open_s, abs=0.2)
    assert service.cancelled == 2


def command(system: RunningSystem, output: Path, *more: str) -> list[str]:
    options = ["--server", system.gateway_address, "--new-tokens", "4", "--prompt-words", "5"]
    return [sys.executable, "-m", "benchmarks.load", *options, "--output", str(output), "--json", *more]


def test_a_sweep_against_a_gateway(running_system: RunningSystem, tmp_path: Path) -> None:
    line = command(running_system, tmp_path, "--rate", "2,6", "--seconds", "2", "--target-ttft-ms", "60000")
    done = subprocess.run([*line, "--target-itl-ms", "60000"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    values = json.loads(done.stdout)
    assert [rate["offered"] for rate in values["rates"]] == [2.0, 6.0]
    for seed, rate in enumerate(values["rates"]):
        assert rate["requests"] == len(poisson_arrivals(rate["offered"], 2.0, seed)) > 0
        assert (rate["errors"], rate["good_share"], rate["cut_short"]) == ({}, 1.0, False)
        assert rate["goodput"] == pytest.approx(rate["requests"] / 2)
    assert json.loads((tmp_path / "load.json").read_text()) == values
    assert "**goodput/s**" in (tmp_path / "load.md").read_text()
    assert (tmp_path / "load.png").read_bytes().startswith(b"\x89PNG")


def test_interrupting_reports_what_there_is(running_system: RunningSystem, tmp_path: Path) -> None:
    line = command(running_system, tmp_path, "--rate", "5,5", "--seconds", "100")
    process = subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    # It warms up first.
    assert "5 requests/s for 100 s" in process.stderr.readline()
    time.sleep(3)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=30)
    assert process.returncode == 0, errors
    (rate,) = json.loads(output)["rates"]
    assert rate["cut_short"]
    assert 0 < rate["seconds"] < 30
    assert rate["requests"] > 0
    assert not list(tmp_path.iterdir())


def test_a_server_that_is_away_is_named(tmp_path: Path) -> None:
    line = [sys.executable, "-m", "benchmarks.load", "--server", "127.0.0.1:1", "--output", str(tmp_path)]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "the system failed" in done.stderr
    assert "Traceback" not in done.stderr
