"""A request's results have the same bits in every batch, and for every chunking of its prompt."""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from echovlm_ray.engine import engine as engine_module
from echovlm_ray.engine.engine import Engine
from echovlm_ray.engine.sampler import next_tokens
from echovlm_ray.engine.sequence import SequenceRequest
from tests.engines import Answer, local_experts, run_together, running_engine
from tests.split_golden import split_golden

GROUPS = {"breast": (0, 1), "liver": (3, 2)}
SHARES = ((("breast", 1.0),), (("liver", 1.0),), (("breast", 0.25), ("liver", 0.75)))
LONGEST = 70
NEW_TOKENS = 10
# The room of nearly three of the longest, so that some give their blocks and are computed again.
TIGHT = 14 * 16
KINDS: dict[str, dict[str, Any]] = {
    "whole prompts": {"max_prefill_tokens": 10 * LONGEST, "prefix_reuse": False},
    "pieces": {"max_prefill_tokens": 16, "prefix_reuse": False},
    "pieces, operators of torch": {"max_prefill_tokens": 40, "prefix_reuse": False, "compiled": False},
    "pieces with reuse": {"max_prefill_tokens": 40},
    "tight": {"max_prefill_tokens": 48, "prefix_reuse": False, "kv_cache_tokens": TIGHT},
    "two micro-batches": {"max_prefill_tokens": 40, "micro_batches": 2},
}


@dataclass(frozen=True)
class Drawn:
    """A request: prompts of the same seed begin alike."""

    seed: int
    length: int
    shares: tuple[tuple[str, float], ...]
    new_tokens: int


@dataclass
class World:
    """Engines of one checkpoint, one for each kind, and what is computed by one that has one request at a time."""

    expert_set_id: str
    engines: dict[str, Engine]
    # Logits of every token, by sequence.
    seen: dict[int, list[torch.Tensor]]
    alone: dict[tuple[bool, Drawn], torch.Tensor] = field(default_factory=dict)

    def request(self, drawn: Drawn) -> SequenceRequest:
        token_ids = torch.randint(0, 980, (LONGEST,), generator=torch.Generator().manual_seed(drawn.seed))
        return SequenceRequest(
            input_ids=tuple(token_ids[: drawn.length].tolist()),
            position_ids_3T=torch.arange(drawn.length).expand(3, -1),
            position_delta=0,
            expert_set_id=self.expert_set_id,
            shares=drawn.shares,
            max_new_tokens=drawn.new_tokens,
        )

    def run(self, kind: str, batch: list[Drawn]) -> list[torch.Tensor]:
        """The logits of all their tokens: tokens × vocabulary, for each."""
        answers = run_together(self.engines[kind], [self.request(drawn) for drawn in batch])
        return [self._logits(answer) for answer in answers]

    def reference(self, drawn: Drawn, compiled: bool) -> torch.Tensor:
        if (compiled, drawn) not in self.alone:
            (logits_TV,) = self.run("alone" if compiled else "alone, operators of torch", [drawn])
            self.alone[compiled, drawn] = logits_TV
        return self.alone[compiled, drawn]

    def _logits(self, answer: Answer) -> torch.Tensor:
        return torch.stack(self.seen.pop(id(answer.sequence)))


@pytest.fixture(scope="module", params=["base", "bf16"])
def world(
    request: pytest.FixtureRequest, golden_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[World]:
    split = split_golden(
        golden_dir / request.param / "checkpoint", tmp_path_factory.mktemp("invariance"), GROUPS, "organs"
    )
    seen: dict[int, list[torch.Tensor]] = defaultdict(list)
    # Before the first engine's experts are packed: their layout depends on it.
    torch.set_num_threads(1)

    def noting(rows: Any) -> Any:
        for sequence, logits_V in rows:
            seen[id(sequence)].append(logits_V.clone())
        return next_tokens(rows)

    kinds = {
        **KINDS,
        "alone": KINDS["whole prompts"],
        "alone, operators of torch": {**KINDS["whole prompts"], "compiled": False},
    }
    with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
        patch.setattr(engine_module, "next_tokens", noting)
        engines = {
            kind: stack.enter_context(running_engine(split, local_experts(split, "cpu_packed"), **options))
            for kind, options in kinds.items()
        }
        yield World(split.expert_set.id, engines, seen)


drawn_requests = st.builds(
    Drawn, st.integers(0, 2), st.integers(1, LONGEST), st.sampled_from(SHARES), st.integers(1, NEW_TOKENS)
)


@pytest.mark.parametrize("kind", list(KINDS))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(batch=st.lists(drawn_requests, min_size=2, max_size=8))
@example(batch=[Drawn(0, 62, SHARES[0], NEW_TOKENS)] * 5)
def test_logits_are_those_of_the_request_alone(world: World, kind: str, batch: list[Drawn]) -> None:
    compiled = KINDS[kind].get("compiled", True)
    for drawn, logits_TV in zip(batch, world.run(kind, batch), strict=True):
        assert torch.equal(logits_TV, world.reference(drawn, compiled))


def test_the_engines_did_what_they_were_there_for(world: World) -> None:
    assert world.engines["pieces with reuse"].prefix_hits
    assert world.engines["tight"].preemptions
