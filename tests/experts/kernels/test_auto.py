"""The choice of a kernel: by what the machine can do on a CPU, by trial elsewhere."""

import json
import logging
import os
import stat
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from experts.kernels import auto
from experts.kernels.auto import AutoExperts, AutoKernel
from experts.kernels.base import ExpertWeights, kernel_in_use
from experts.kernels.calibration import PROBE_PAIRS, Plan, PlanFile, choose, default_plan_file, time_kernel
from experts.kernels.reference import ReferenceKernel
from experts.kernels.registry import get_kernel
from tests.experts.kernels.conformance import Case, make_exchange, make_weights

FLAT = dict.fromkeys((2, 16, 64), 1.0)


class TrialOnCpu(AutoKernel):
    """Measures here as on a GPU: nothing but the decision by device is left out."""

    def _plan_on_cpu(self, weights: ExpertWeights) -> Plan:
        return self._plan_by_trial(weights, auto._key(weights))


def test_on_a_cpu_the_packed_kernel_is_chosen_without_a_trial(tmp_path: Path) -> None:
    kernel = AutoKernel(plan_file=tmp_path / "plans.json")
    weights = make_weights(3, 64, 48, torch.bfloat16)
    prepared = kernel.load(weights)
    packed = get_kernel("cpu_packed").load(weights)
    exchange = make_exchange(Case("any", experts=3), torch.bfloat16)
    assert kernel_in_use(kernel, prepared) == "auto: cpu_packed"
    assert prepared.nbytes == packed.nbytes
    assert torch.equal(prepared.forward(*exchange), packed.forward(*exchange))
    assert not (tmp_path / "plans.json").exists()


def test_on_a_cpu_that_cannot_pack_it_is_the_reference() -> None:
    kernel = AutoKernel()
    assert kernel_in_use(kernel, kernel.load(make_weights(2, 8, 8, torch.float64))) == "auto: reference"


def test_the_choice_is_logged_once_for_each_shape(caplog: pytest.LogCaptureFixture) -> None:
    kernel = AutoKernel()
    with caplog.at_level(logging.INFO, logger=auto.__name__):
        for _ in range(3):
            kernel.load(make_weights(2, 8, 8, torch.float32))
        kernel.load(make_weights(2, 8, 16, torch.float32))
    assert [record.getMessage().split(" for ")[0] for record in caplog.records] == [
        "the expert kernel auto uses cpu_packed"
    ] * 2


def test_a_trial_is_made_once_and_remembered_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "cache" / "plans.json"
    trials: list[str] = []

    def counting(prepared: object, weights: ExpertWeights) -> dict[int, float]:
        trials.append(type(prepared).__name__)
        fast_below = 64 if len(trials) == 1 else 0
        return {pairs: 1.0 if pairs <= fast_below else 2.0 + len(trials) % 2 for pairs in PROBE_PAIRS}

    monkeypatch.setattr(auto, "time_kernel", counting)
    weights = make_weights(2, 32, 16, torch.float32)
    candidates = ("torch_grouped", "reference", "not_there")
    with pytest.raises(ValueError, match="not_there"):
        TrialOnCpu(candidates, path).load(weights)
    kernel = TrialOnCpu(candidates[:2], path)
    first, again = kernel.load(weights), kernel.load(weights)
    assert kernel_in_use(kernel, first) == "auto: torch_grouped up to 64 pairs, then reference"
    assert kernel_in_use(kernel, again) == kernel_in_use(kernel, first)
    assert trials == ["GroupedExperts", "ReferenceExperts"]
    other_process = TrialOnCpu(candidates[:2], path)
    assert kernel_in_use(other_process, other_process.load(weights)) == kernel_in_use(kernel, first)
    assert len(trials) == 2
    assert [entry.name for entry in path.parent.iterdir()] == ["plans.json"], "nothing is left of writing"
    # Other candidates are another question.
    TrialOnCpu(candidates[:1], path).load(weights)
    assert len(trials) == 3
    assert len(json.loads(path.read_text())) == 2


def test_a_real_trial_is_short_and_its_plan_computes(tmp_path: Path) -> None:
    weights = make_weights(4, 64, 48, torch.float32)
    kernel = TrialOnCpu(("reference", "torch_grouped"), tmp_path / "plans.json")
    exchange = make_exchange(Case("any", tokens=90), torch.float32)
    expected = ReferenceKernel().load(weights).forward(*exchange)
    torch.testing.assert_close(kernel.load(weights).forward(*exchange), expected)
    timings = time_kernel(ReferenceKernel().load(weights), weights)
    assert tuple(timings) == PROBE_PAIRS
    assert timings[4096] > timings[2] > 0


def test_a_candidate_that_fails_on_trial_is_done_without(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    kernel = TrialOnCpu(("torch_grouped", "reference"), tmp_path / "plans.json")
    with caplog.at_level(logging.WARNING):
        prepared = kernel.load(make_weights(2, 8, 8, torch.float64))
    assert kernel_in_use(kernel, prepared) == "auto: reference"
    assert "does without torch_grouped, which failed on trial" in caplog.text


def test_no_candidate_at_all_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no expert kernel of torch_grouped works for .* configure reference"):
        TrialOnCpu(("torch_grouped",), tmp_path / "plans.json").load(make_weights(2, 8, 8, torch.float64))


def test_pairs_decide_and_one_kernel_is_held_once() -> None:
    weights = make_weights(2, 16, 16, torch.float32)
    small, large = (get_kernel(name).load(weights) for name in ("cpu_packed", "reference"))
    both = AutoExperts("both", small, 8, large)
    assert both.nbytes == small.nbytes + large.nbytes
    assert AutoExperts("one", large, 0, large).nbytes == large.nbytes
    for tokens, chosen in ((4, small), (5, large)):
        exchange = make_exchange(Case("any", experts=2, hidden=16, tokens=tokens), torch.float32)
        assert torch.equal(both.forward(*exchange), chosen.forward(*exchange))


def test_one_kernel_that_is_always_as_fast_is_chosen_alone() -> None:
    nearly = choose({"a": FLAT, "b": {2: 0.99, 16: 1.0, 64: 1.01}})
    assert nearly.small == nearly.large, "a second one must be worth its memory"
    assert choose({"a": FLAT}) == Plan("a", 0, "a")
    with pytest.raises(ValueError, match="no kernel"):
        choose({})


def test_two_kernels_meet_where_the_faster_one_changes() -> None:
    timings = {"a": {2: 1.0, 16: 1.0, 64: 9.0}, "b": {2: 3.0, 16: 2.0, 64: 4.0}, "c": {2: 2.0, 16: 2.0, 64: 5.0}}
    assert choose(timings) == Plan("a", 16, "b")
    assert str(choose(timings)) == "a up to 16 pairs, then b"


@given(st.dictionaries(st.sampled_from("abcd"), st.tuples(*[st.floats(0.1, 10)] * 3), min_size=1))
def test_a_plan_is_never_worse_than_a_single_kernel(measured: dict[str, tuple[float, ...]]) -> None:
    pairs = (2, 16, 64)
    timings = {name: dict(zip(pairs, seconds, strict=True)) for name, seconds in measured.items()}
    plan = choose(timings)
    best = {count: min(timings[name][count] for name in timings) for count in pairs}
    used = {count: timings[plan.small if count <= plan.small_pairs else plan.large][count] for count in pairs}
    worst = max(used[count] / best[count] for count in pairs)
    for name in timings:
        assert worst <= 1e-9 + max(timings[name][count] / best[count] for count in pairs)


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", '"text"', '{"key": 3}', '{"key": ["a", "many", "b"]}', '{"key": ["a", 3, "gone"]}', "\x00\xff"],
)
def test_a_bad_file_is_passed_over_with_a_log_line(
    content: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "plans.json"
    path.write_text(content, encoding="latin-1")
    plans = PlanFile(path)
    with caplog.at_level(logging.WARNING):
        assert plans.read("key", ["a", "b"]) is None
    assert str(path) in caplog.text
    plans.write("key", Plan("a", 3, "b"))
    assert plans.read("key", ["a", "b"]) == Plan("a", 3, "b")


def test_plans_of_others_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "plans.json"
    PlanFile(path).write("one", Plan("a", 0, "a"))
    PlanFile(path).write("two", Plan("a", 8, "b"))
    assert PlanFile(path).read("one", ["a"]) == Plan("a", 0, "a")
    assert PlanFile(path).read("two", ["a", "b"]) == Plan("a", 8, "b")
    assert PlanFile(path).read("three", ["a"]) is None


def test_a_folder_that_cannot_be_written_costs_only_the_memory(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # A file in the folder's place stops root as well, whom permissions do not.
    (tmp_path / "cache").write_text("")
    with caplog.at_level(logging.WARNING):
        PlanFile(tmp_path / "cache" / "plans.json").write("key", Plan("a", 0, "a"))
    assert "not kept" in caplog.text
    PlanFile(None).write("key", Plan("a", 0, "a"))
    assert PlanFile(None).read("key", ["a"]) is None


def test_the_users_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_plan_file() == tmp_path / "echovlm-ray" / "kernels.json"
    PlanFile(default_plan_file()).write("key", Plan("a", 0, "a"))
    assert stat.S_IMODE(os.stat(default_plan_file()).st_mode) & 0o022 == 0, "others cannot change it"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_plan_file() == Path.home() / ".cache" / "echovlm-ray" / "kernels.json"
