"""What gates cost those who ask: `python -m benchmarks.gate_cost`.

Serves the demo, lets eight callers ask without pause, and evaluates a candidate for its gates again and again: a time
with an evaluation under way, the same time without, in turn, so that both are measured side by side. Two loads: short
answers to short questions, as `benchmarks.swaps` asks them, and reports about pictures. The candidate has the weights
of the stable version under a new one. Writes `benchmarks/results/gate_cost.md`.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Protocol

from rich.console import Console

from benchmarks import demo_swap_callers
from benchmarks.machine import describe
from benchmarks.measure_table import table_head
from benchmarks.swap_operations import ACTOR, ControlWatch, SwapFailedError
from benchmarks.swap_streams import Streams
from benchmarks.systems.protocol import MeasuredSystem, SystemFailedError, exit_on_sigterm
from benchmarks.timings import nearest_rank
from echovlm_ray.checkpoint.demo import make_demo
from echovlm_ray.checkpoint.layout import read_index, registry_root
from echovlm_ray.client import EchoVLMError
from echovlm_ray.client.control import ExpertControlClient
from echovlm_ray.data.phantom.catalogue import all_classes
from echovlm_ray.data.phantom.corpus import Corpus, write_corpus
from experts.bundles.manifest import BundleDescription
from experts.bundles.writer import write_bundle
from experts.registry.registry import Registry
from protos import control_pb2

RESULTS = Path(__file__).resolve().parent / "results" / "gate_cost.md"
ORGAN = "heart"
OTHERS = ("liver", "breast", "kidney", "thyroid")
PROMPTS = ("What is shown?", "Describe the image.", "Is there flow?")
NEW_TOKENS = 32
PICTURES = 32
# Nothing that training or another benchmark uses.
SEED = 170_001
TARGET = 1.2


class Answer(Protocol):
    """One answer to a caller."""

    @property
    def times(self) -> tuple[float, ...]:
        """When its pieces of text arrived, on the monotonic clock."""
        ...


@dataclass(slots=True)
class Load:
    """One load, with the times with and without an evaluation.

    Attributes:
        answered: the number of evaluation questions that were answered.
    """

    name: str
    gated: list[tuple[float, float]] = field(default_factory=list)
    free: list[tuple[float, float]] = field(default_factory=list)
    answered: int = 0
    answers: Sequence[Answer] = ()
    failures: Sequence[str] = ()

    def gaps_ms(self, intervals: Sequence[tuple[float, float]]) -> list[float]:
        """The pauses within answers that lie in some interval."""
        return [
            1e3 * (later - sooner)
            for answer in self.answers
            for sooner, later in pairwise(answer.times)
            if any(begin <= sooner and later <= end for begin, end in intervals)
        ]

    def row(self) -> str:
        """Its line of the table."""
        gated, free = self.gaps_ms(self.gated), self.gaps_ms(self.free)
        cells = [self.name, f"{len(gated):,} and {len(free):,}"]
        for percent in (50, 99, 99.9):
            with_gate, without = nearest_rank(gated, percent), nearest_rank(free, percent)
            cells.append(f"{with_gate:.1f} ÷ {without:.1f} = {with_gate / without:.2f}")
        seconds = sum(end - begin for begin, end in self.gated)
        cells += [f"{self.answered / seconds:.2f}", str(len(self.failures))]
        return f"| {' | '.join(cells)} |"


class Gating:
    """Begins an evaluation of a candidate, and ends it."""

    def __init__(self, control: ExpertControlClient, watch: ControlWatch, digest: str, dataset: Path) -> None:
        """An evaluation of a candidate on records."""
        self._control = control
        self._watch = watch
        self._digest = digest
        gate = {"dataset": str(dataset), "metric": "attribute_f1", "organ": ORGAN, "at_least": 0.0}
        gate |= {"organs": "given", "not_below_incumbent_by": 0.01}
        self._gates = json.dumps([gate])

    @property
    def answered(self) -> int:
        """The number of answered questions of the running evaluation."""
        return self._rollout().gates[0].answered

    def begin(self) -> None:
        """Returns when the evaluation is about to begin."""
        self._control.stage(ORGAN, digest=self._digest, actor=ACTOR)
        self._watch.wait(self._is_warm, "the candidate is warm")
        self._control.promote(ORGAN, digest=self._digest, actor=ACTOR, gates_json=self._gates)

    def end(self) -> None:
        """Takes the candidate back, and returns when nothing is left of it."""
        self._control.rollback(ORGAN, digest=self._digest, actor=ACTOR)
        self._watch.wait(lambda: self._rollout().state == "rolled_back", "the candidate is rolled back")

    def _rollout(self) -> control_pb2.Rollout:
        found = [rollout for rollout in self._control.list(ORGAN).rollouts if rollout.organ == ORGAN]
        return max(found, key=lambda rollout: rollout.created_at)

    def _is_warm(self) -> bool:
        rollout = self._watch.rollout
        return rollout is not None and rollout.digest == self._digest and rollout.state == "warm"


@contextmanager
def text_load(address: str, load: Load, callers: int) -> Iterator[None]:
    """Short questions without pictures, half of them to the organ that has the candidate."""
    organs = [ORGAN if turn % 2 == 0 else OTHERS[turn // 2 % len(OTHERS)] for turn in range(callers)]
    with Streams(address, organs, PROMPTS, NEW_TOKENS) as streams:
        yield
    load.answers, load.failures = streams.heard, streams.failures


@contextmanager
def report_load(address: str, load: Load, callers: int) -> Iterator[None]:
    """Reports about pictures of all organs."""
    questions = demo_swap_callers.draw_questions(SEED + 1, 1, 40, 240)
    with demo_swap_callers.callers(address, questions, callers) as heard:
        yield
    load.answers, load.failures = heard.answers, heard.failures


# Name → what asks until the block ends, and then gives the load its answers.
LOADS: dict[str, Callable[[str, Load, int], AbstractContextManager[None]]] = {
    "text": text_load,
    "reports": report_load,
}


def measure(options: argparse.Namespace, work: Path, console: Console) -> list[Load]:
    """Serves, and measures both loads."""
    checkpoint = work / "checkpoint"
    make_demo(checkpoint)
    registry = Registry(registry_root(checkpoint))
    stable = registry.open(read_index(checkpoint).entry(ORGAN).bundle_digest)
    content = stable.manifest.model_dump(exclude={"format", "files", "probe"}) | {"version": "9.0.0"}
    write_bundle(work / "equal", BundleDescription.model_validate(content), stable.tensor)
    classes = tuple(pair for pair in all_classes() if pair[0] == ORGAN)
    write_corpus(work / "gate", Corpus(SEED, range(options.records), classes, languages=("en",)))
    loads: list[Load] = []
    with MeasuredSystem(["-m", "benchmarks.systems.gateway", "--checkpoint", str(checkpoint)], {}) as system:
        ready = system.wait_until_ready()
        with ExpertControlClient(ready["control"]) as control, ControlWatch(control, ORGAN) as watch:
            gating = Gating(control, watch, control.push(work / "equal").digest, work / "gate" / "records.json")
            for name in options.loads:
                load = Load(name)
                with LOADS[name](ready["address"], load, options.callers):
                    time.sleep(options.settle)
                    for number in range(options.rounds):
                        console.print(f"{name}, round {number + 1} of {options.rounds}")
                        gating.begin()
                        time.sleep(options.skip)
                        before, began = gating.answered, time.monotonic()
                        time.sleep(options.seconds)
                        load.gated.append((began, time.monotonic()))
                        load.answered += gating.answered - before
                        gating.end()
                        time.sleep(2)
                        began = time.monotonic()
                        time.sleep(options.seconds)
                        load.free.append((began, time.monotonic()))
                loads.append(load)
    return loads


def page(loads: Sequence[Load], options: argparse.Namespace) -> str:
    """The result as Markdown."""
    lines = [
        "# What gates cost those who ask",
        "",
        describe(),
        "",
        f"The demo; {options.callers} callers without pause; {options.rounds} times {options.seconds:g} s with an "
        f"evaluation of a candidate of {ORGAN} under way and {options.seconds:g} s without, in turn. Target: p99 with "
        f"÷ p99 without ≤ {TARGET:g}. `python -m benchmarks.gate_cost`.",
        "",
        *table_head("| load | pauses | p50, ms | p99, ms | p99.9, ms | questions of the gate/s | failed requests |"),
        *(load.row() for load in loads),
    ]
    return "\n".join([*lines, ""])


def main() -> None:
    """Measures and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--callers", type=int, default=8, help="that ask without pause (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=6, help="of each load (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=15.0, help="with a gate, and without (default: %(default)s)")
    parser.add_argument("--settle", type=float, default=5.0, help="seconds before the first (default: %(default)s)")
    parser.add_argument("--skip", type=float, default=2.0, help="seconds after the loading that are left out")
    parser.add_argument("--records", type=int, default=400, help="of the gate (default: %(default)s)")
    parser.add_argument("--loads", nargs="+", choices=tuple(LOADS), default=list(LOADS))
    parser.add_argument("--output", type=Path, default=RESULTS, help="file of the result (default: %(default)s)")
    options = parser.parse_args()
    exit_on_sigterm()
    console = Console()
    try:
        with tempfile.TemporaryDirectory(prefix="echovlm-gate-cost-") as name:
            loads = measure(options, Path(name), console)
    except (EchoVLMError, SystemFailedError, SwapFailedError) as error:
        sys.exit(f"the system failed: {error}")
    text = page(loads, options)
    console.print(text, markup=False, soft_wrap=True)
    options.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
