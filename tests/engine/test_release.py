"""The engine reports the release of every request exactly once, after its last output."""

import time
from dataclasses import replace
from pathlib import Path

import pytest

from echovlm_ray.engine.engine import Engine
from echovlm_ray.engine.sequence import SequenceRequest, StepOutput
from echovlm_ray.errors import DeadlineError, ShuttingDownError
from tests.engines import engine_request, local_experts, running_engine
from tests.golden_cases import golden_rows
from tests.split_golden import SplitGolden, split_golden
from tests.waiting import until

ALL = (0, 1, 2, 3)


@pytest.fixture(scope="module")
def split(golden_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> SplitGolden:
    return split_golden(golden_dir / "base" / "checkpoint", tmp_path_factory.mktemp("split"), {"liver": ALL}, "organs")


@pytest.fixture(scope="module")
def endless(golden_dir: Path, split: SplitGolden) -> SequenceRequest:
    row = next(row for row in golden_rows(golden_dir, "base") if not row.vision)
    request = engine_request(row, split, golden_dir / "base" / "checkpoint", (("liver", 1.0),), return_logits=False)
    return replace(request, max_new_tokens=3000, stop_token_ids=frozenset())


class Listener:
    def __init__(self, engine: Engine, request: SequenceRequest) -> None:
        self.heard: list[StepOutput | Exception | str] = []
        self.sequence = engine.submit(request, self.heard.append, lambda: self.heard.append("gone"))

    def wait_for(self, count: int) -> None:
        until(lambda: len(self.heard) >= count)

    def wait_until_gone(self) -> None:
        until(lambda: "gone" in self.heard)


def test_however_a_request_ends_the_engine_lets_go_of_it_once(split: SplitGolden, endless: SequenceRequest) -> None:
    with running_engine(split, local_experts(split)) as engine:
        done = Listener(engine, replace(endless, max_new_tokens=3))
        late = Listener(engine, replace(endless, deadline=time.monotonic() + 0.2))
        left, stopped = Listener(engine, endless), Listener(engine, endless)
        left.wait_for(3)
        engine.cancel(left.sequence)
        for each in (done, late, left):
            each.wait_until_gone()
            engine.cancel(each.sequence)
        before = engine.num_blocks - engine.free_blocks
        assert before > 0
    assert isinstance(late.heard[-2], DeadlineError)
    assert isinstance(stopped.heard[-2], ShuttingDownError)
    assert len(done.heard) == 4
    for each in (done, late, left, stopped):
        assert each.heard[-1] == "gone"
        assert each.heard.count("gone") == 1
