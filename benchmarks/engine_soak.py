"""Whether the engine ever loses a cache block: `python -m benchmarks.engine_soak`.

Sends thousands of random requests to an engine with the demo model in this process, whose cache is far too small for
them: they are sent back for room, begin with what others left behind, are cancelled while they wait or speak, run out
of time, and lose their experts now and then. At the end every block must be back. Writes
`benchmarks/results/engine_soak.md`.
"""

import argparse
import logging
import random
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress

from benchmarks.machine import describe
from benchmarks.measure_table import table_head
from echovlm_ray.checkpoint.demo import make_demo
from echovlm_ray.checkpoint.layout import backbone_directory, read_index, registry_root
from echovlm_ray.engine.block_pool import BLOCK_SIZE
from echovlm_ray.engine.engine import Engine
from echovlm_ray.engine.runner import ModelRunner
from echovlm_ray.engine.sequence import SamplingParams, Sequence, SequenceRequest, StepOutput, VisionDigest
from echovlm_ray.errors import DeadlineError, OverloadedError
from echovlm_ray.model.checkpoint import load_backbone
from echovlm_ray.model.configuration import EchoVLMConfig
from experts.group import ExpertGroup
from experts.kernels.registry import get_kernel
from experts.registry.registry import Registry
from router.dispatch.dispatcher import Dispatcher
from router.dispatch.local import LocalExperts
from router.errors import ExpertsFailedError, ExpertsUnavailableError
from router.gating.expert_gates import ExpertGates
from router.gating.expert_set import ExpertSet

RESULT = Path(__file__).resolve().parent / "results" / "engine_soak.md"
KV_CACHE_TOKENS = 512
MAX_QUEUE = 64
LONGEST_PART, LONGEST_ANSWER = 40, 24
# Of every hundred requests so many come in a row that ask little and want long answers, for which there is no room.
TALKATIVE, TALKATIVE_PART, TALKATIVE_ANSWER = 25, 6, (40, 80)
NUM_BEGINNINGS, NUM_PICTURES, VISUAL_TOKENS = 6, 4, 20
RUSH, RUSH_EVERY = 16, 500
UNAVAILABLE_RATE, FAILURE_RATE = 0.001, 0.0002
TIMEOUT_S = 120


class UnreliableExperts(LocalExperts):
    """Experts that are sometimes unavailable for an exchange, and sometimes fail."""

    chance = random.Random(3)

    def send(self, organ: str, *arguments: Any) -> Any:
        drawn = self.chance.random()
        if drawn < UNAVAILABLE_RATE:
            raise ExpertsUnavailableError(organ, "lost on purpose")
        if drawn < UNAVAILABLE_RATE + FAILURE_RATE:
            raise ExpertsFailedError(organ, "failed on purpose")
        return super().send(organ, *arguments)


@dataclass
class Report:
    """What a soak found.

    Attributes:
        outcomes: how many requests ended in which way.
        tokens: of all answers.
        leaked: blocks that did not come back when all had ended.
        still_held: blocks that are not free after the prefix cache is emptied too.
        peak_cached: the peak number of cached prefix blocks.
    """

    outcomes: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    leaked: int = 0
    still_held: int = 0
    peak_cached: int = 0


class Caller:
    """Who sent one request: hears it, may leave early, and ends once."""

    def __init__(self, engine: Engine, leaves_after: int | None, ended: Callable[["Caller", str], None]) -> None:
        """Takes after how many tokens it leaves (None: never), and what is called with how it ended."""
        self.heard = 0
        self._engine = engine
        self._leaves_after = leaves_after
        self._ended = ended
        self._sequence: Sequence | None = None
        self._leaving = ""

    def send(self, request: SequenceRequest) -> None:
        """Submits the request."""
        try:
            self._sequence = self._engine.submit(request, self._sink)
        except OverloadedError:
            self._ended(self, "refused")
            return
        if self._leaves_after == 0:
            self._leaving = "cancelled at once"
        # It may have received enough before its id was known.
        if self._leaving:
            self._leave()

    def _sink(self, output: StepOutput | Exception) -> None:
        if isinstance(output, Exception):
            known = {DeadlineError: "expired", ExpertsFailedError: "experts failed"}
            self._ended(self, known.get(type(output), repr(output)))
            return
        self.heard += 1
        if output.finish is not None:
            self._ended(self, "complete")
        elif self.heard == self._leaves_after:
            self._leaving = "cancelled while it spoke"
            self._leave()

    def _leave(self) -> None:
        if self._sequence is not None:
            self._engine.cancel(self._sequence)
            self._ended(self, self._leaving)


class RandomRequests:
    """Prompts with few beginnings and few pictures, so that many begin alike."""

    def __init__(self, expert_set: ExpertSet, config: EchoVLMConfig, seed: int) -> None:
        self.chance = random.Random(seed)
        self._number = 0
        text = config.text_config
        # Below the special tokens, whose positions would need images.
        self._vocabulary = min(config.image_token_id, config.video_token_id, text.vocab_size)
        self._image_token_id = config.image_token_id
        self._set = expert_set
        generator = torch.Generator().manual_seed(seed)
        self._pictures = torch.randn(NUM_PICTURES, VISUAL_TOKENS, text.hidden_size, generator=generator)
        self._beginnings = torch.randint(0, self._vocabulary, (NUM_BEGINNINGS, LONGEST_PART), generator=generator)

    def next(self) -> SequenceRequest:
        """Another request."""
        chance = self.chance
        self._number += 1
        talkative = self._number % 100 < TALKATIVE
        longest, answer = (TALKATIVE_PART, TALKATIVE_ANSWER) if talkative else (LONGEST_PART, (1, LONGEST_ANSWER))
        input_ids = self._beginnings[chance.randrange(NUM_BEGINNINGS), : chance.randint(1, longest)].tolist()
        vision: dict[str, Any] = {}
        if not talkative and chance.random() < 0.5:
            picture = chance.randrange(NUM_PICTURES)
            vision = {
                "vision_rows_V": torch.arange(len(input_ids), len(input_ids) + VISUAL_TOKENS),
                "vision_embeddings_VD": self._pictures[picture],
                "vision_digests": (VisionDigest(0, VISUAL_TOKENS, f"picture {picture}"),),
            }
            input_ids += [self._image_token_id] * VISUAL_TOKENS
        input_ids += [chance.randrange(self._vocabulary) for _ in range(chance.randint(1, longest))]
        organs = chance.sample(self._set.organs, chance.choice([1, 1, 2]))
        sampling = SamplingParams()
        if chance.random() < 0.3:
            sampling = SamplingParams(
                temperature=0.8, top_k=20, top_p=0.9, repetition_penalty=1.1, seed=chance.randrange(100)
            )
        return SequenceRequest(
            input_ids=tuple(input_ids),
            position_ids_3T=torch.arange(len(input_ids)).expand(3, -1),
            position_delta=0,
            expert_set_id=self._set.id,
            shares=tuple((organ, 1.0 / len(organs)) for organ in organs),
            max_new_tokens=chance.randint(*answer),
            sampling=sampling,
            return_logits=chance.random() < 0.05,
            deadline=time.monotonic() + chance.random() * 0.3 if chance.random() < 0.15 else None,
            **vision,
        )


def soak(engine: Engine, requests: RandomRequests, num_requests: int, progress: Callable[[], None]) -> Report:
    """Sends random requests, waits for their ends, and counts blocks.

    Raises:
        TimeoutError: not all of them ended.
    """
    report = Report()
    still_open: set[Caller] = set()
    lock = threading.Lock()

    def ended(caller: Caller, how: str) -> None:
        with lock:
            if caller in still_open:
                still_open.remove(caller)
                report.outcomes[how] += 1
                report.tokens += caller.heard

    for number in range(num_requests):
        # Now and then a rush, which finds the queue full.
        while engine.queue_length >= MAX_QUEUE and number % RUSH_EVERY >= RUSH:
            time.sleep(0.001)
        leaves_after = requests.chance.choice([None, None, None, 0, requests.chance.randint(1, TALKATIVE_ANSWER[1])])
        caller = Caller(engine, leaves_after, ended)
        with lock:
            still_open.add(caller)
        caller.send(requests.next())
        report.peak_cached = max(report.peak_cached, engine.cached_blocks)
        progress()
    deadline = time.monotonic() + TIMEOUT_S
    while still_open or engine.queue_length:
        if time.monotonic() > deadline:
            raise TimeoutError(f"{len(still_open)} requests have not ended after {TIMEOUT_S} seconds")
        time.sleep(0.01)
    report.leaked = engine.num_blocks - engine.free_blocks
    engine.evict_prefixes()
    report.still_held = engine.num_blocks - engine.free_blocks + engine.cached_blocks
    return report


@contextmanager
def soaking_engine(checkpoint: Path, seed: int) -> Iterator[tuple[Engine, RandomRequests]]:
    """An engine over a split checkpoint with too small a cache and unreliable experts, and requests for it."""
    index = read_index(checkpoint)
    expert_set = index.expert_set()
    registry = Registry(registry_root(checkpoint))
    backbone = load_backbone(backbone_directory(checkpoint))
    config = backbone.config
    text = config.text_config
    groups = {}
    for member in expert_set.members:
        group = groups[member.organ] = ExpertGroup(
            member.organ, registry, get_kernel("auto"), device="cpu", max_resident_bytes=1024**3
        )
        group.load(member.bundle_digest)
    experts = UnreliableExperts(groups)
    dispatcher = Dispatcher(experts, top_k=text.num_experts_per_tok, norm_topk_prob=text.norm_topk_prob)
    bundles = {member.bundle_digest: registry.open(member.bundle_digest) for member in expert_set.members}
    dispatcher.add_set(
        ExpertGates.from_bundles(expert_set, bundles, num_layers=text.num_hidden_layers, dtype=backbone.dtype)
    )
    engine = Engine(
        ModelRunner(backbone, dispatcher, kv_cache_tokens=KV_CACHE_TOKENS),
        max_batch_size=16,
        max_queue=MAX_QUEUE,
        max_prefill_tokens=256,
        max_request_s=TIMEOUT_S,
    )
    engine.start()
    try:
        yield engine, RandomRequests(expert_set, config, seed)
    finally:
        engine.stop()


def main() -> None:
    """Soaks, prints and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=10_000, help="how many (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of the requests (default: %(default)s)")
    options = parser.parse_args()
    # Experts that fail on purpose would fill the screen.
    logging.getLogger("echovlm_ray.engine").setLevel(logging.CRITICAL)
    torch.set_num_threads(1)
    console = Console()
    with (
        tempfile.TemporaryDirectory() as directory,
        Progress(*Progress.get_default_columns(), MofNCompleteColumn(), console=console) as bar,
    ):
        make_demo(Path(directory) / "demo")
        task = bar.add_task("soaking", total=options.requests)
        with soaking_engine(Path(directory) / "demo", options.seed) as (engine, requests):
            started = time.monotonic()
            report = soak(engine, requests, options.requests, lambda: bar.advance(task))
            seconds = time.monotonic() - started
    lines = [
        "# Random requests against a cache that is too small",
        "",
        describe(),
        f"{options.requests:,} requests of seed {options.seed} in {seconds:.0f} seconds; demo, experts in process, "
        f"a batch of 16, a cache of {engine.num_blocks} blocks of {BLOCK_SIZE} tokens, prefix reuse on.",
        "",
        *table_head("| measure | value | target |"),
        f"| blocks that did not come back | {report.leaked} | 0 |",
        f"| blocks that are not free when the kept prefixes are dropped too | {report.still_held} | 0 |",
        f"| requests sent back to be computed again | {engine.preemptions:,} | |",
        f"| tokens not computed because another prompt began alike | {engine.prefix_hits:,} | |",
        f"| most blocks kept for such prompts | {report.peak_cached} | |",
        f"| tokens said | {report.tokens:,} | |",
        *(f"| requests that ended: {how} | {count:,} | |" for how, count in sorted(report.outcomes.items())),
    ]
    text = "\n".join(lines) + "\n"
    RESULT.write_text(text)
    console.print(text, markup=False)


if __name__ == "__main__":
    main()
