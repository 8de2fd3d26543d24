"""What the engine promises while things go wrong: cancellation, deadlines, lost experts, bad steps."""

import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from echovlm_ray.engine.engine import Engine
from echovlm_ray.engine.scheduler import Chunk
from echovlm_ray.engine.sequence import Finish, SequenceRequest, StepOutput
from echovlm_ray.engine.sequence import Sequence as EngineSequence
from echovlm_ray.errors import DeadlineError, OverloadedError, ShuttingDownError
from router.dispatch.local import LocalExperts
from router.dispatch.remote import RemoteExperts
from router.errors import ExpertsFailedError, ExpertsUnavailableError, ExpertsUnusableError
from tests.engines import Answer, engine_request, local_experts, remote_experts, run_together, running_engine, submit
from tests.expert_servers import expert_process, server_thread
from tests.golden_cases import golden_rows
from tests.split_golden import SplitGolden, split_golden
from tests.waiting import until

ALL = (0, 1, 2, 3)


@pytest.fixture(scope="module")
def split(golden_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> SplitGolden:
    groups = {"breast": ALL, "liver": ALL}
    return split_golden(golden_dir / "base" / "checkpoint", tmp_path_factory.mktemp("split"), groups, "organs")


@pytest.fixture(scope="module")
def engine(split: SplitGolden) -> Iterator[Engine]:
    with running_engine(split, local_experts(split)) as running:
        yield running


@pytest.fixture(scope="module")
def prompt(split: SplitGolden, golden_dir: Path) -> SequenceRequest:
    row = next(iter(golden_rows(golden_dir, "base")))
    return engine_request(row, split, golden_dir / "base" / "checkpoint", (("breast", 1.0),))


def of(request: SequenceRequest, organ: str, **changes: Any) -> SequenceRequest:
    return replace(request, shares=((organ, 1.0),), **changes)


def test_a_cancelled_request_frees_its_blocks_and_says_nothing_more(engine: Engine, prompt: SequenceRequest) -> None:
    free = engine.free_blocks
    answer = submit(engine, of(prompt, "breast", max_new_tokens=1500, stop_token_ids=frozenset()))
    assert answer.started.wait(10)
    assert engine.free_blocks < free
    assert answer.sequence is not None
    engine.cancel(answer.sequence)
    until(lambda: engine.free_blocks == free)
    made = len(answer.token_ids)
    assert made < 1500
    time.sleep(0.05)
    assert len(answer.token_ids) == made
    assert answer.error is None
    engine.cancel(answer.sequence)


def test_an_expired_request_ends_with_a_deadline_error(engine: Engine, prompt: SequenceRequest) -> None:
    free = engine.free_blocks
    deadline = time.monotonic() + 0.2
    answer = submit(
        engine, of(prompt, "breast", max_new_tokens=3000, stop_token_ids=frozenset(), deadline=deadline)
    ).wait()
    assert isinstance(answer.error, DeadlineError)
    assert time.monotonic() - deadline < 1.0
    until(lambda: engine.free_blocks == free)


def test_a_request_without_a_deadline_still_has_an_end(split: SplitGolden, prompt: SequenceRequest) -> None:
    with running_engine(split, local_experts(split), max_request_s=0.2) as engine:
        answer = submit(engine, of(prompt, "breast", max_new_tokens=3000, stop_token_ids=frozenset())).wait()
        assert isinstance(answer.error, DeadlineError)


def test_stop_tokens_and_length_end_a_request(engine: Engine, prompt: SequenceRequest) -> None:
    whole, short = run_together(engine, [of(prompt, "breast"), of(prompt, "breast", max_new_tokens=3)])
    assert short.token_ids == whole.token_ids[:3]
    assert short.last is not None
    assert short.last.finish is Finish.LENGTH
    stop = whole.token_ids[5]
    (stopped,) = run_together(engine, [of(prompt, "breast", stop_token_ids=frozenset({stop}))])
    assert stopped.token_ids == whole.token_ids[: whole.token_ids.index(stop) + 1]
    assert stopped.last is not None
    assert stopped.last.finish is Finish.STOP


def test_a_full_queue_refuses_and_nothing_else_happens(split: SplitGolden, prompt: SequenceRequest) -> None:
    with running_engine(split, local_experts(split), max_batch_size=1, max_queue=2) as engine:
        long = of(prompt, "breast", max_new_tokens=200, stop_token_ids=frozenset())
        running = submit(engine, long)
        assert running.started.wait(10)
        waiting = [submit(engine, of(prompt, "breast")) for _ in range(2)]
        with pytest.raises(OverloadedError, match=r"router\.max_queue"):
            submit(engine, prompt)
        assert len(running.wait_well().token_ids) == 200
        assert waiting[0].wait_well().token_ids == waiting[1].wait_well().token_ids


def test_random_submissions_and_cancellations_leak_no_block(engine: Engine, prompt: SequenceRequest) -> None:
    chance = random.Random(5)
    answers: list[Answer] = []
    for _ in range(150):
        request = of(prompt, chance.choice(["breast", "liver"]), max_new_tokens=chance.randint(1, 12))
        if chance.random() < 0.2:
            request = replace(request, deadline=time.monotonic() + chance.random() * 0.02)
        try:
            answers.append(submit(engine, request))
        except OverloadedError:
            time.sleep(0.01)
        if answers and chance.random() < 0.4:
            victim = chance.choice(answers).sequence
            assert victim is not None
            engine.cancel(victim)
    until(lambda: engine.queue_length == 0, timeout_s=60)
    assert engine.free_blocks == 4096 // 16


def test_stopping_ends_all_requests(split: SplitGolden, prompt: SequenceRequest) -> None:
    with running_engine(split, local_experts(split), max_batch_size=1) as engine:
        answers = [submit(engine, of(prompt, "breast", max_new_tokens=3000)) for _ in range(3)]
        engine.stop()
        assert all(isinstance(answer.wait().error, ShuttingDownError) for answer in answers)
        with pytest.raises(ShuttingDownError):
            submit(engine, prompt)


def test_a_sink_that_fails_affects_no_other_request(engine: Engine, prompt: SequenceRequest) -> None:
    def bad_sink(output: object) -> None:
        raise RuntimeError("gone")

    free = engine.free_blocks
    engine.submit(of(prompt, "breast"), bad_sink)
    assert len(submit(engine, prompt).wait_well().token_ids) == 16
    until(lambda: engine.free_blocks == free)


@pytest.mark.parametrize("fails", [False, True])
def test_whoever_listens_is_woken_after_every_token(engine: Engine, prompt: SequenceRequest, fails: bool) -> None:
    """Soon after, when other threads keep the engine least; and whatever that does, the request goes on."""
    events: list[str] = []
    ended = threading.Event()

    def ready() -> None:
        if events and events[-1] == "token":
            events.append("ready")
        if events.count("token") == 5 and events[-1] == "ready":
            ended.set()
        if fails:
            raise RuntimeError("the loop is closed")

    request = of(prompt, "breast", max_new_tokens=5, stop_token_ids=frozenset())
    engine.submit(request, lambda _: events.append("token"), on_outputs_ready=ready)
    assert ended.wait(10)
    assert events == ["token", "ready"] * 5


def test_an_error_is_told_at_once(engine: Engine, prompt: SequenceRequest) -> None:
    events: list[object] = []
    ready = threading.Event()
    request = of(prompt, "breast", deadline=time.monotonic())
    engine.submit(request, events.append, on_outputs_ready=lambda: ready.set() if events else None)
    assert ready.wait(10)
    assert isinstance(events[0], DeadlineError)


def recorded_steps(engine: Engine) -> list[tuple[float, set[EngineSequence]]]:
    """When each step of an engine that has not started yet begins, and for whom."""
    steps: list[tuple[float, set[EngineSequence]]] = []
    step = engine._runner.step

    def recording(chunks: list[Chunk], *others: Any) -> Any:
        steps.append((time.monotonic(), {chunk.sequence for chunk in chunks}))
        return step(chunks, *others)

    engine._runner.step = recording  # type: ignore[method-assign, assignment]
    return steps


def test_the_step_after_a_cancellation_is_without_the_request(engine: Engine, prompt: SequenceRequest) -> None:
    steps = recorded_steps(engine)
    own: list[EngineSequence] = []
    outputs = []

    def sink(output: StepOutput | Exception) -> None:
        outputs.append(output)
        if len(outputs) == 3:
            engine.cancel(own[0])

    try:
        with engine._condition:
            own.append(engine.submit(of(prompt, "breast", max_new_tokens=1500, stop_token_ids=frozenset()), sink))
            other = submit(engine, of(prompt, "breast", max_new_tokens=10, stop_token_ids=frozenset()))
        other.wait_well()
    finally:
        del engine._runner.step
    assert len(outputs) == 3
    assert sum(own[0] in sequences for _, sequences in steps) == 3 + (len(prompt.input_ids) - 1) // 64
    assert not own[0].block_table


def test_no_step_begins_for_an_expired_request(engine: Engine, prompt: SequenceRequest) -> None:
    steps = recorded_steps(engine)
    deadline = time.monotonic() + 0.15
    try:
        endless = of(prompt, "breast", max_new_tokens=3000, stop_token_ids=frozenset(), deadline=deadline)
        answer = submit(engine, endless).wait()
    finally:
        del engine._runner.step
    assert isinstance(answer.error, DeadlineError)
    begun = [begun for begun, sequences in steps if answer.sequence in sequences]
    assert len(begun) > 2
    # One may have been looked at just before and begun just after.
    assert sum(each > deadline for each in begun) <= 1


class FaultyExperts(LocalExperts):
    """Local experts whose liver fails in a chosen way."""

    failure: Exception | None = None

    def send(self, organ: str, *arguments: Any) -> Any:
        if organ == "liver" and self.failure is not None:
            raise self.failure
        return super().send(organ, *arguments)


def test_failures_of_one_organ_leave_the_others_bits_alone(split: SplitGolden, prompt: SequenceRequest) -> None:
    experts = FaultyExperts(local_experts(split).groups)
    with running_engine(split, experts) as engine:
        good, lost = run_together(engine, [of(prompt, "breast"), of(prompt, "liver")])
        experts.failure = ExpertsFailedError("liver", "a kernel failed")
        with engine._condition:
            other, failed = submit(engine, of(prompt, "breast")), submit(engine, of(prompt, "liver"))
        assert isinstance(failed.wait().error, ExpertsFailedError)
        assert other.wait_well().token_ids == good.token_ids
        torch.testing.assert_close(other.logits_TV, good.logits_TV, atol=1e-5, rtol=0)

        experts.failure = ExpertsUnavailableError("liver", "gone")
        with engine._condition:
            other = submit(engine, of(prompt, "breast"))
            late = submit(engine, of(prompt, "liver", deadline=time.monotonic() + 0.5))
            patient = submit(engine, of(prompt, "liver"))
        assert other.wait_well().token_ids == good.token_ids
        error = late.wait().error
        assert isinstance(error, ExpertsUnavailableError)
        assert error.organ == "liver"
        assert 0 <= time.monotonic() - error.since < 30
        assert not patient.ended.is_set()
        experts.failure = None
        assert patient.wait_well().token_ids == lost.token_ids
        torch.testing.assert_close(patient.logits_TV, lost.logits_TV, atol=1e-5, rtol=0)
        # What was computed for nothing does not count.
        assert patient.last is not None
        assert lost.last is not None
        assert patient.last.routed_pairs == lost.last.routed_pairs


def test_experts_that_no_replica_could_load_end_their_requests_at_once(
    split: SplitGolden, prompt: SequenceRequest
) -> None:
    experts = FaultyExperts(local_experts(split).groups)
    with running_engine(split, experts) as engine:
        experts.failure = ExpertsUnavailableError("liver", "gone")
        waiting = submit(engine, of(prompt, "liver"))
        assert not waiting.ended.wait(0.3)
        experts.failure = ExpertsUnusableError("liver", "d" * 64, "the registry does not have the bundle")
        # Neither has a deadline.
        for doomed in (waiting, submit(engine, of(prompt, "liver"))):
            assert isinstance(doomed.wait().error, ExpertsUnusableError)
        assert submit(engine, of(prompt, "breast")).wait_well()
        assert engine.free_blocks == 4096 // 16


def test_a_bug_in_a_step_ends_its_requests_and_the_engine_lives(split: SplitGolden, prompt: SequenceRequest) -> None:
    experts = FaultyExperts(local_experts(split).groups)
    with running_engine(split, experts) as engine:
        experts.failure = KeyError("a bug")
        assert isinstance(submit(engine, of(prompt, "liver")).wait().error, KeyError)
        experts.failure = None
        assert engine.alive
        assert len(submit(engine, of(prompt, "liver")).wait_well().token_ids) == 16
        assert engine.free_blocks == 4096 // 16


def test_experts_that_compute_nan_end_their_own_request_only(split: SplitGolden, prompt: SequenceRequest) -> None:
    class Poisoned(LocalExperts):
        def send(self, organ: str, *arguments: Any) -> Any:
            computed = super().send(organ, *arguments)
            if organ == "liver":
                computed.output_TD.fill_(torch.nan)
            return computed

    with running_engine(split, Poisoned(local_experts(split).groups)) as engine:
        with engine._condition:
            good, bad = submit(engine, of(prompt, "breast")), submit(engine, of(prompt, "liver"))
        assert "not a number" in str(bad.wait().error)
        assert bool(good.wait_well().logits_TV.isfinite().all())


def test_a_killed_replica_harms_its_organ_only_and_its_requests_resume(
    split: SplitGolden, prompt: SequenceRequest
) -> None:
    digest = split.expert_set.bundle_digest("liver")
    with (
        server_thread() as servers,
        expert_process("liver", split.registry, digest) as victim,
        expert_process("liver", split.registry, digest) as successor,
    ):
        experts = remote_experts(split, servers)
        # The liver of the thread only helps to start; from here on it is the process that can be killed.
        servers.live["liver"] = [victim.address]
        experts.wait_until_connected(["liver"], 10)
        wanted: dict[str, Any] = {"max_new_tokens": 150, "stop_token_ids": frozenset(), "return_logits": False}
        with running_engine(split, experts) as engine:
            breast, liver = run_together(engine, [of(prompt, "breast", **wanted), of(prompt, "liver", **wanted)])
            with engine._condition:
                other = submit(engine, of(prompt, "breast", **wanted))
                hurt = submit(engine, of(prompt, "liver", **wanted))
            assert hurt.started.wait(10)
            os.kill(victim.process.pid, signal.SIGKILL)
            assert other.wait_well().token_ids == breast.token_ids
            assert not hurt.ended.is_set()
            assert len(hurt.token_ids) < 150
            doomed = submit(engine, of(prompt, "liver", deadline=time.monotonic() + 0.3)).wait()
            assert isinstance(doomed.error, ExpertsUnavailableError)
            assert doomed.error.organ == "liver"
            servers.live["liver"] = [successor.address]
            assert hurt.wait_well().token_ids == liver.token_ids


def test_a_replica_that_hangs_is_left_after_the_timeout_and_used_again_when_it_answers(
    split: SplitGolden, prompt: SequenceRequest
) -> None:
    digest = split.expert_set.bundle_digest("liver")
    with server_thread() as servers, expert_process("liver", split.registry, digest) as process:
        experts: RemoteExperts = remote_experts(split, servers, exchange_timeout_s=2.0)
        servers.live["liver"] = [process.address]
        experts.wait_until_connected(["liver"], 10)
        with running_engine(split, experts) as engine:
            whole = submit(engine, of(prompt, "liver")).wait_well()
            os.kill(process.process.pid, signal.SIGSTOP)
            try:
                hurt = submit(engine, of(prompt, "liver"))
                # One timeout for everybody, then the others are not held up any more.
                time.sleep(2.2)
                started = time.monotonic()
                for _ in range(3):
                    submit(engine, of(prompt, "breast")).wait_well()
                assert time.monotonic() - started < 2.0
                assert not hurt.ended.is_set()
            finally:
                os.kill(process.process.pid, signal.SIGCONT)
            assert hurt.wait_well().token_ids == whole.token_ids
