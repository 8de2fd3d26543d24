"""For any mix of requests, arrival times and cache sizes, every answer equals that of plain `generate`."""

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from echovlm_ray.engine.engine import Engine
from echovlm_ray.engine.sequence import Finish, SamplingParams, SequenceRequest, StepOutput, VisionDigest
from echovlm_ray.engine.sequence import Sequence as EngineSequence
from echovlm_ray.model.modeling import EchoVLMForConditionalGeneration
from echovlm_ray.model.positions import Grid, mrope_positions
from tests.engines import local_experts, running_engine
from tests.golden_cases import FLOAT32_TOLERANCE
from tests.split_golden import split_golden
from tests.waiting import until

IMAGE, VIDEO, VISION_START, VISION_END, EOS, PAD = 990, 991, 992, 993, 995, 996
ALL = (0, 1, 2, 3)
SHARES = ((("breast", 1.0),), (("liver", 1.0),), (("breast", 0.25), ("liver", 0.75)))
NEW_TOKENS = 24
# Three texts, two pictures with their marks, and the answer.
LONGEST = 3 * 40 + 2 * 14 + NEW_TOKENS


@dataclass(frozen=True)
class Picture:
    """Random patches; equal seeds show the same."""

    token_id: int
    grid: Grid
    seed: int

    @property
    def num_tokens(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2] // 4

    def patches(self) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randn(4 * self.num_tokens, 1176, generator=generator)


@dataclass(frozen=True)
class Prompt:
    """Parts of text, as random tokens of a seed, and pictures between them."""

    texts: tuple[tuple[int, int], ...]
    pictures: tuple[Picture, ...]
    penalty: float

    def input_ids(self) -> list[int]:
        token_ids: list[int] = []
        for index, (seed, length) in enumerate(self.texts):
            text = torch.randint(0, 980, (40,), generator=torch.Generator().manual_seed(seed))
            token_ids += text[:length].tolist()
            if index < len(self.pictures):
                picture = self.pictures[index]
                token_ids += [VISION_START, *[picture.token_id] * picture.num_tokens, VISION_END]
        return token_ids

    def grids(self, token_id: int) -> list[Grid]:
        return [picture.grid for picture in self.pictures if picture.token_id == token_id]

    def patches(self, token_id: int) -> torch.Tensor | None:
        own = [picture.patches() for picture in self.pictures if picture.token_id == token_id]
        return torch.cat(own) if own else None


@dataclass(frozen=True)
class Arrival:
    """A request, after how many tokens of the others it comes, and after how many of its own its caller leaves."""

    prompt: Prompt
    shares: tuple[tuple[str, float], ...]
    max_new_tokens: int
    after: int
    leaves_after: int | None


class World:
    """The plain model, and engines with the same experts: with room and without, with reuse and without."""

    def __init__(self, checkpoint: Path, directory: Path, stack: ExitStack) -> None:
        self.split = split_golden(checkpoint, directory, {"breast": ALL, "liver": ALL}, "organs")
        self.model = EchoVLMForConditionalGeneration.from_pretrained(checkpoint).eval()
        self.references: dict[Prompt, tuple[list[int], list[float]]] = {}
        self.embeddings: dict[Picture, torch.Tensor] = {}
        kinds: dict[str, dict[str, Any]] = {
            "roomy": {"prefix_reuse": False, "max_prefill_tokens": 512},
            "reuse": {"max_prefill_tokens": 24},
            "tight": {"prefix_reuse": False, "kv_cache_tokens": LONGEST + 16},
            "tight with reuse": {"kv_cache_tokens": LONGEST + 16, "max_prefill_tokens": 24},
        }
        self.engines: dict[str, Engine] = {
            kind: stack.enter_context(running_engine(self.split, local_experts(self.split), **options))
            for kind, options in kinds.items()
        }

    @cached_property
    def tower(self) -> Any:
        return self.model.model.visual

    @torch.inference_mode()
    def embedding(self, picture: Picture) -> torch.Tensor:
        if picture not in self.embeddings:
            found = self.tower(picture.patches(), grid_thw=torch.tensor([picture.grid])).pooler_output
            self.embeddings[picture] = found
        return self.embeddings[picture]

    def reference(self, prompt: Prompt) -> tuple[list[int], list[float]]:
        """What `generate` answers, and by how much each token won."""
        if prompt not in self.references:
            inputs: dict[str, Any] = {}
            for token_id, patches, grids in (
                (IMAGE, "pixel_values", "image_grid_thw"),
                (VIDEO, "pixel_values_videos", "video_grid_thw"),
            ):
                if prompt.grids(token_id):
                    inputs |= {patches: prompt.patches(token_id), grids: torch.tensor(prompt.grids(token_id))}
            input_ids = torch.tensor([prompt.input_ids()])
            result = self.model.generate(
                input_ids=input_ids,
                attention_mask=torch.ones_like(input_ids),
                **inputs,
                do_sample=False,
                max_new_tokens=NEW_TOKENS,
                repetition_penalty=prompt.penalty,
                eos_token_id=EOS,
                pad_token_id=PAD,
                output_scores=True,
                return_dict_in_generate=True,
            )
            best = torch.cat(result.scores).topk(2).values
            self.references[prompt] = (
                result.sequences[0, input_ids.shape[1] :].tolist(),
                (best[:, 0] - best[:, 1]).tolist(),
            )
        return self.references[prompt]

    def request(self, arrival: Arrival) -> SequenceRequest:
        prompt = arrival.prompt
        input_ids = torch.tensor(prompt.input_ids())
        positions, delta = mrope_positions(input_ids, prompt.grids(IMAGE), prompt.grids(VIDEO), self.model.config)
        rows = embeddings = None
        digests = []
        if prompt.pictures:
            rows = ((input_ids == IMAGE) | (input_ids == VIDEO)).nonzero()[:, 0]
            embeddings = torch.cat([self.embedding(picture) for picture in prompt.pictures])
            end = 0
            for picture in prompt.pictures:
                start, end = end, end + picture.num_tokens
                digests.append(VisionDigest(start, end, repr(picture)))
        return SequenceRequest(
            input_ids=tuple(input_ids.tolist()),
            position_ids_3T=positions,
            position_delta=delta,
            expert_set_id=self.split.expert_set.id,
            shares=arrival.shares,
            max_new_tokens=arrival.max_new_tokens,
            vision_rows_V=rows,
            vision_embeddings_VD=embeddings,
            vision_digests=tuple(digests),
            sampling=SamplingParams(repetition_penalty=prompt.penalty),
            stop_token_ids=frozenset({EOS}),
        )


class Caller:
    """Sends its request when it is its turn, reads, and perhaps leaves."""

    def __init__(self, arrival: Arrival, engine: Engine) -> None:
        self.arrival = arrival
        self.engine = engine
        self.sequence: EngineSequence | None = None
        self.token_ids: list[int] = []
        self.outcome: Finish | Exception | None = None
        self.done = threading.Event()

    def sink(self, output: StepOutput | Exception) -> None:
        if isinstance(output, Exception):
            self.outcome = output
            self.done.set()
            return
        self.token_ids.append(output.token_id)
        if output.finish is not None:
            self.outcome = output.finish
            self.done.set()
        elif len(self.token_ids) == self.arrival.leaves_after:
            assert self.sequence is not None
            self.engine.cancel(self.sequence)
            self.done.set()


pictures = st.builds(
    Picture, st.sampled_from([IMAGE, VIDEO]), st.sampled_from([(1, 4, 6), (1, 10, 4), (2, 4, 6)]), st.integers(0, 1)
)
# Few beginnings, so that many prompts begin alike.
texts = st.tuples(st.integers(0, 2), st.sampled_from([1, 7, 16, 32, 33, 40]))


@st.composite
def prompts(draw: st.DrawFn) -> Prompt:
    between = draw(st.lists(pictures, max_size=2))
    return Prompt(
        texts=tuple(draw(st.lists(texts, min_size=len(between) + 1, max_size=len(between) + 1))),
        pictures=tuple(between),
        penalty=draw(st.sampled_from([1.0, 1.0, 1.3])),
    )


arrivals = st.builds(
    Arrival,
    prompt=prompts(),
    shares=st.sampled_from(SHARES),
    max_new_tokens=st.integers(1, NEW_TOKENS),
    after=st.integers(0, 20),
    leaves_after=st.one_of(st.none(), st.none(), st.integers(1, NEW_TOKENS)),
)


# All at once, and growing far beyond what there is room for; and one after the other, beginning alike.
CROWD = [Arrival(Prompt(((0, 16),), (), 1.0), SHARES[0], NEW_TOKENS, 0, None)] * 7
ALIKE = Prompt(((0, 40), (1, 16)), (Picture(IMAGE, (1, 4, 6), 0),), 1.0)
FAMILY = [Arrival(ALIKE, SHARES[0], NEW_TOKENS, 20 * number, None) for number in range(4)]


@pytest.fixture(scope="module")
def world(golden_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with ExitStack() as stack:
        yield World(golden_dir / "base" / "checkpoint", tmp_path_factory.mktemp("world"), stack)


def check(caller: Caller, token_ids: list[int], margins: list[float]) -> None:
    """The tokens are equal, up to where `generate` itself had two that were as good."""
    expected = token_ids[: caller.arrival.max_new_tokens]
    if caller.arrival.leaves_after is not None:
        expected = expected[: caller.arrival.leaves_after]
    elif not isinstance(caller.outcome, Finish):
        raise AssertionError(f"ended with {caller.outcome!r}")
    if caller.token_ids == expected:
        return
    pairs = enumerate(zip(caller.token_ids, expected, strict=False))
    differs = next((index for index, (one, other) in pairs if one != other), None)
    assert differs is not None, f"{caller.token_ids} instead of {expected}"
    assert margins[differs] <= 2 * FLOAT32_TOLERANCE, f"{caller.token_ids} instead of {expected}"


@pytest.mark.parametrize("kind", ["roomy", "reuse", "tight", "tight with reuse"])
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow], database=None)
@given(batch=st.lists(arrivals, min_size=1, max_size=7))
@example(batch=CROWD)
@example(batch=FAMILY)
def test_the_engine_answers_as_generate_does(world: World, kind: str, batch: list[Arrival]) -> None:
    engine = world.engines[kind]
    callers = [Caller(arrival, engine) for arrival in batch]
    for caller in sorted(callers, key=lambda each: each.arrival.after):
        # Comes when the others have that many tokens, or as many as they get.
        while sum(len(each.token_ids) for each in callers) < caller.arrival.after:
            if all(each.done.is_set() for each in callers if each.sequence is not None):
                break
            time.sleep(0.0005)
        with engine._condition:
            caller.sequence = engine.submit(world.request(caller.arrival), caller.sink)
    for caller in callers:
        assert caller.done.wait(60)
        check(caller, *world.reference(caller.arrival.prompt))
    until(lambda: not engine.queue_length, "a request stayed behind")
    num_blocks = engine._scheduler.pool.num_blocks
    assert engine.free_blocks == num_blocks
    assert not any(engine._scheduler.pool._ref_counts)


def test_the_engines_did_what_they_were_there_for(world: World) -> None:
    assert world.engines["reuse"].prefix_hits
    assert world.engines["tight with reuse"].prefix_hits
    assert world.engines["tight"].preemptions
    assert world.engines["tight with reuse"].preemptions
    assert not world.engines["roomy"].preemptions
    assert not world.engines["roomy"].prefix_hits
