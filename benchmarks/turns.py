"""What turns in a full batch give and cost: `python -m benchmarks.turns`.

The real scheduler over a simulated clock, with and without turns: more callers than places in the batch, each of which
always has one long answer under way, and one that asks short questions now and then. A step takes what
docs/engine.md has for one of bfloat16 with remote experts. Writes `benchmarks/results/turns.md`.
"""

import argparse
import math
import random
import statistics
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.terminal import show_result
from echovlm_ray.engine.block_pool import BLOCK_SIZE, BlockPool
from echovlm_ray.engine.scheduler import Chunk, Scheduler
from echovlm_ray.engine.sequence import Sequence, SequenceRequest
from echovlm_ray.engine.turns import TURN_TOKENS, Turns
from router.gating.expert_set import ExpertSetMember

RESULT = Path(__file__).resolve().parent / "results" / "turns.md"
# Of a step, and of each token in it.
STEP_S, TOKEN_S = 0.013, 0.0006
PREFILL_TOKENS, KV_CACHE_TOKENS = 512, 32_768
# Words and answers of those that ask for long answers.
PROMPT, ANSWER = (50, 600), 1024
QUESTION, REPLY, PAUSE_S = 40, 24, (1.0, 20.0)
ASKER = b"asker"


@dataclass
class Measured:
    """What one simulation came to; times in simulated seconds."""

    seconds: float = 0.0
    tokens: int = 0
    computed_again: int = 0
    preemptions: int = 0
    first_token_s: list[float] = field(default_factory=list)
    long_first_token_s: list[float] = field(default_factory=list)


class Simulation:
    """Callers, a scheduler, and a clock."""

    def __init__(self, callers: int, batch: int, turn_tokens: float, seed: int = 1) -> None:
        self._chance = random.Random(seed)
        self._scheduler = Scheduler(
            BlockPool(KV_CACHE_TOKENS // BLOCK_SIZE),
            lambda sequence: None,
            max_batch_size=batch,
            max_queue=4 * callers,
            max_prefill_tokens=PREFILL_TOKENS,
        )
        self._scheduler.turns = Turns(turn_tokens)
        self._asked: dict[Sequence, float] = {}
        self._again_at = self._chance.uniform(*PAUSE_S)
        self.found = Measured()
        for index in range(callers):
            self._ask(b"%d" % index, self._chance.randint(*PROMPT), self._chance.randint(1, ANSWER))

    def run(self, seconds: float) -> Measured:
        """Simulates for so long."""
        found = self.found
        while found.seconds < seconds:
            if self._again_at <= found.seconds:
                self._again_at = math.inf
                self._ask(ASKER, QUESTION, REPLY)
            chunks = self._scheduler.schedule()
            found.seconds += STEP_S + TOKEN_S * sum(chunk.end - chunk.start for chunk in chunks)
            for chunk in chunks:
                self._computed(chunk)
        found.preemptions = self._scheduler.preemptions
        return found

    def _ask(self, caller: bytes, prompt: int, answer: int) -> None:
        request = SequenceRequest(
            input_ids=tuple(self._chance.randrange(50_000) for _ in range(prompt)),
            position_ids_3T=torch.zeros(3, prompt, dtype=torch.int64),
            position_delta=0,
            expert_set_id="set",
            shares=(("heart", 1.0),),
            max_new_tokens=answer,
            caller=caller,
        )
        sequence = Sequence.start(request, lambda output: None, (ExpertSetMember(organ="heart", bundle_digest="1"),))
        self._asked[sequence] = self.found.seconds
        self._scheduler.add(sequence)

    def _computed(self, chunk: Chunk) -> None:
        own, found = chunk.sequence, self.found
        if own.num_generated:
            found.computed_again += chunk.end - chunk.start - 1
        own.resume()
        own.add_computed(chunk.end, [{}] * ((chunk.end - 1) // BLOCK_SIZE - chunk.start // BLOCK_SIZE + 1))
        if not chunk.reaches_last_token:
            return
        self._scheduler.publish(own)
        own.token_ids.append(self._chance.randrange(50_000))
        found.tokens += 1
        caller = own.request.caller
        if own.num_generated == 1:
            times = found.first_token_s if caller == ASKER else found.long_first_token_s
            times.append(found.seconds - self._asked.pop(own))
        if own.num_generated < own.request.max_new_tokens:
            return
        self._scheduler.finish(own)
        if caller == ASKER:
            self._again_at = found.seconds + self._chance.uniform(*PAUSE_S)
        else:
            self._ask(caller, self._chance.randint(*PROMPT), ANSWER)


def row(callers: int, batch: int, turn_tokens: float, found: Measured, base: Measured) -> str:
    """One line of the table."""
    first, long = sorted(found.first_token_s), sorted(found.long_first_token_s)
    rate = found.tokens / found.seconds
    cells = [
        f"{callers}",
        f"{batch}",
        "no" if turn_tokens == math.inf else f"{turn_tokens:g}",
        f"{statistics.median(first):.1f}",
        f"{first[-1]:.1f}",
        f"{statistics.median(long):.1f}",
        f"{long[-1]:.1f}",
        f"{rate:.0f}",
        f"{rate / (base.tokens / base.seconds):.3f}",
        f"{found.preemptions}",
        f"{found.computed_again / found.tokens:.3f}",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Simulates all situations and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=300.0, help="simulated time of each situation")
    parser.add_argument("--turns", type=float, nargs="*", default=[TURN_TOKENS], help="tokens of a turn")
    arguments = parser.parse_args()
    rows = []
    for callers, batch in ((9, 8), (12, 8), (32, 8), (36, 32), (64, 32)):
        base = Simulation(callers, batch, math.inf).run(arguments.seconds)
        rows.append(row(callers, batch, math.inf, base, base))
        for turn_tokens in arguments.turns:
            rows.append(
                row(callers, batch, turn_tokens, Simulation(callers, batch, turn_tokens).run(arguments.seconds), base)
            )
    text = "\n".join(
        [
            "# What turns in a full batch give and cost",
            "",
            "`python -m benchmarks.turns`: the real scheduler over a simulated clock. Callers with one answer of "
            f"{ANSWER} tokens each, always, and one more that asks short questions now and then; a cache of "
            f"{KV_CACHE_TOKENS} tokens. Seconds to the first token, of the short questions and of the long answers.",
            "",
            "| callers | places | turn, tokens | short: median | worst | long: median | worst | tokens/s | ÷ without |"
            " preemptions | computed again ÷ made |",
            "| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
            *rows,
            "",
        ]
    )
    RESULT.write_text(text)
    show_result(text, {"rows": rows}, Console(), as_json=False)


if __name__ == "__main__":
    main()
