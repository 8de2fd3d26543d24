"""Little room and shared beginnings change what is computed when, and never an answer."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from echovlm_ray.engine.sequence import SamplingParams, SequenceRequest
from router.dispatch.local import LocalExperts
from router.errors import ExpertsFailedError
from router.gating.expert_set import Routing
from tests.engines import Answer, engine_request, local_experts, run_together, running_engine, submit, vision_digests
from tests.golden_cases import GoldenRow, golden_rows
from tests.split_golden import SplitGolden, split_golden

ALL = (0, 1, 2, 3)
NEVER: frozenset[int] = frozenset()


@pytest.fixture(scope="module", params=["organs", "flat"])
def split(request: pytest.FixtureRequest, golden_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> SplitGolden:
    routing: Routing = request.param
    groups = {"breast": ALL, "liver": ALL} if routing == "organs" else {"breast": (2, 0), "liver": (3, 1)}
    return split_golden(golden_dir / "base" / "checkpoint", tmp_path_factory.mktemp("split"), groups, routing)


@pytest.fixture(scope="module")
def rows(golden_dir: Path) -> list[GoldenRow]:
    return list(golden_rows(golden_dir, "base"))


@pytest.fixture(scope="module")
def requests(split: SplitGolden, rows: list[GoldenRow], golden_dir: Path) -> list[SequenceRequest]:
    """Every golden row behind some text, every other row behind the same, continued for 40 tokens."""
    checkpoint = golden_dir / "base" / "checkpoint"
    shares: list[tuple[tuple[str, float], ...]] = [(("breast", 1.0),), (("breast", 0.25), ("liver", 0.75))]
    flat = split.expert_set.routing == "flat"
    return [
        behind_text(
            replace(
                engine_request(row, split, checkpoint, () if flat else shares[index % 2], return_logits=False),
                max_new_tokens=40,
                stop_token_ids=NEVER,
            ),
            seed=index % 2,
        )
        for index, row in enumerate(rows)
    ]


def behind_text(request: SequenceRequest, seed: int) -> SequenceRequest:
    text = torch.randint(0, 900, (36,), generator=torch.Generator().manual_seed(seed))
    return replace(
        request,
        input_ids=(*text.tolist(), *request.input_ids),
        position_ids_3T=torch.cat([torch.arange(36).expand(3, -1), request.position_ids_3T + 36], dim=1),
        vision_rows_V=None if request.vision_rows_V is None else request.vision_rows_V + 36,
    )


@pytest.fixture(scope="module")
def expected(split: SplitGolden, requests: list[SequenceRequest]) -> list[Answer]:
    """Answers with all the room there is, and nothing shared."""
    with running_engine(split, local_experts(split), prefix_reuse=False) as engine:
        answers = run_together(engine, requests)
        assert engine.preemptions == engine.prefix_hits == engine.cached_blocks == 0
        return answers


def same(answers: list[Answer], expected: list[Answer]) -> None:
    for answer, wanted in zip(answers, expected, strict=True):
        assert answer.token_ids == wanted.token_ids
        assert answer.last is not None
        assert wanted.last is not None
        assert answer.last.routed_pairs == wanted.last.routed_pairs


@pytest.mark.parametrize("prefix_reuse", [False, True])
def test_preemption_changes_no_answer(
    split: SplitGolden, requests: list[SequenceRequest], expected: list[Answer], prefix_reuse: bool
) -> None:
    # Room for two or three of them, and no more than the longest needs.
    tokens = max(len(request.input_ids) for request in requests) + 48
    with running_engine(split, local_experts(split), kv_cache_tokens=tokens, prefix_reuse=prefix_reuse) as engine:
        same(run_together(engine, requests), expected)
        assert engine.preemptions
        assert engine.free_blocks == -(-tokens // 16)
        engine.evict_prefixes()
        assert engine.cached_blocks == 0
        assert engine.free_blocks == -(-tokens // 16)


def test_preemption_gives_no_logits_twice(split: SplitGolden, requests: list[SequenceRequest]) -> None:
    wanted = [replace(request, return_logits=True) for request in requests]
    with running_engine(split, local_experts(split)) as engine:
        roomy = run_together(engine, wanted)
    tokens = max(len(request.input_ids) for request in requests) + 48
    with running_engine(split, local_experts(split), kv_cache_tokens=tokens, max_prefill_tokens=20) as engine:
        tight = run_together(engine, wanted)
        assert engine.preemptions
        assert not engine.prefix_hits
    same(tight, roomy)
    for one, other in zip(tight, roomy, strict=True):
        torch.testing.assert_close(one.logits_TV, other.logits_TV, atol=2e-5, rtol=0)


def test_draws_with_a_seed_survive_preemption(split: SplitGolden, requests: list[SequenceRequest]) -> None:
    wanted = [
        replace(request, sampling=SamplingParams(temperature=0.9, top_k=40, top_p=0.95, seed=number))
        for number, request in enumerate(requests)
    ]
    with running_engine(split, local_experts(split)) as engine:
        roomy = run_together(engine, wanted)
    tokens = max(len(request.input_ids) for request in requests) + 48
    with running_engine(split, local_experts(split), kv_cache_tokens=tokens) as engine:
        same(run_together(engine, wanted), roomy)
        assert engine.preemptions


@pytest.mark.parametrize("max_prefill_tokens", [64, 16])
def test_a_known_beginning_changes_no_answer_and_no_provenance(
    split: SplitGolden, requests: list[SequenceRequest], expected: list[Answer], max_prefill_tokens: int
) -> None:
    known = [with_digests(request) for request in requests]
    with running_engine(split, local_experts(split), max_prefill_tokens=max_prefill_tokens) as engine:
        same(run_together(engine, known), expected)
        before = engine.prefix_hits
        same(run_together(engine, known), expected)
        reusable = sum((len(request.input_ids) - 1) // 16 * 16 for request in known)
        assert engine.prefix_hits - before == reusable
        # A next turn begins with the answer too.
        turn = next(request for request in known if request.vision_rows_V is None)
        answer = expected[known.index(turn)].token_ids
        longer = continued(turn, answer[:-1])
        before = engine.prefix_hits
        again = submit(engine, longer).wait_well()
        assert engine.prefix_hits - before == (len(longer.input_ids) - 1) // 16 * 16
        assert again.token_ids[0] == answer[-1]
        assert engine.free_blocks == 4096 // 16


def continued(request: SequenceRequest, answer: list[int]) -> SequenceRequest:
    start = len(request.input_ids) + request.position_delta
    positions = torch.arange(start, start + len(answer)).expand(3, -1)
    return replace(
        request,
        input_ids=(*request.input_ids, *answer),
        position_ids_3T=torch.cat([request.position_ids_3T, positions], dim=1),
        max_new_tokens=2,
    )


def with_digests(request: SequenceRequest) -> SequenceRequest:
    """Names its pictures by what they embed to, as the vision encoder does by what they show."""
    return replace(request, vision_digests=vision_digests(request))


def test_other_pictures_organs_and_sets_share_nothing(split: SplitGolden, requests: list[SequenceRequest]) -> None:
    picture = next(with_digests(request) for request in requests if request.vision_rows_V is not None)
    assert picture.vision_embeddings_VD is not None
    other_picture = with_digests(replace(picture, vision_embeddings_VD=picture.vision_embeddings_VD.flip(0)))
    # Nothing tells what this one shows.
    unknown = replace(picture, vision_digests=())
    changed = [other_picture, unknown]
    if split.expert_set.routing == "organs":
        changed.append(replace(picture, shares=(("liver", 1.0),)))
    assert picture.vision_rows_V is not None
    before_picture = int(picture.vision_rows_V[0]) // 16 * 16
    with running_engine(split, local_experts(split), prefix_reuse=False) as engine:
        wanted = run_together(engine, changed)
    with running_engine(split, local_experts(split)) as engine:
        submit(engine, picture).wait_well()
        for each, right in zip(changed, wanted, strict=True):
            before = engine.prefix_hits
            same([submit(engine, each).wait_well()], [right])
            assert engine.prefix_hits - before == (before_picture if each.shares == picture.shares else 0)


def test_a_bundle_that_goes_takes_its_blocks_along(split: SplitGolden, requests: list[SequenceRequest]) -> None:
    text = next(request for request in requests if request.vision_rows_V is None)
    with running_engine(split, local_experts(split)) as engine:
        submit(engine, text).wait_well()
        engine.evict_bundle("another")
        assert engine.cached_blocks >= 2
        engine.evict_bundle(split.expert_set.used(text.shares)[0].bundle_digest)
        assert engine.cached_blocks == 0
        submit(engine, text).wait_well()
        assert engine.prefix_hits == 0
        submit(engine, text).wait_well()
        assert engine.prefix_hits


class FaultyExperts(LocalExperts):
    """Experts that compute infinity, or fail, when a test says so."""

    poisoned = False
    failure: Exception | None = None

    def send(self, organ: str, *arguments: Any) -> Any:
        if self.failure is not None:
            raise self.failure
        computed = super().send(organ, *arguments)
        if self.poisoned:
            computed.output_TD[0] = torch.nan
        return computed


@pytest.fixture
def faulty(split: SplitGolden) -> FaultyExperts:
    return FaultyExperts(local_experts(split).groups)


@pytest.mark.parametrize("kind", ["poison", "failure"])
def test_what_failed_is_never_where_another_begins(
    split: SplitGolden, requests: list[SequenceRequest], expected: list[Answer], faulty: FaultyExperts, kind: str
) -> None:
    text = with_digests(requests[0])
    with running_engine(split, faulty, max_prefill_tokens=20) as engine:
        if kind == "poison":
            faulty.poisoned = True
        else:
            faulty.failure = ExpertsFailedError("breast", "a kernel failed")
        assert submit(engine, text).wait().error is not None
        faulty.poisoned, faulty.failure = False, None
        assert engine.cached_blocks == 0
        same([submit(engine, text).wait_well()], [expected[0]])
        assert engine.prefix_hits == 0
