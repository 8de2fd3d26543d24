"""P1 and P2 on the golden cases, below the router's service."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from echovlm_ray.engine.sequence import SequenceRequest
from router.gating.expert_set import Routing
from tests.engines import Answer, engine_request, local_experts, remote_experts, run_together, running_engine
from tests.expert_servers import server_thread
from tests.golden_cases import GoldenRow, golden_rows
from tests.split_golden import SplitGolden, split_golden

ALL = (0, 1, 2, 3)
CLONES = {"breast": ALL, "liver": ALL, "heart": ALL}
PARTITION = {"breast": (2, 0), "liver": (3,), "heart": (1,)}
# With identical copies every π gives the released model.
SHARES = ((("breast", 1.0),), (("liver", 1.0),), (("heart", 1.0),), (("breast", 0.25), ("heart", 0.75)))


@dataclass(frozen=True)
class Case:
    """A split checkpoint, its golden rows, and what the engine with local experts made of them in one batch."""

    split: SplitGolden
    rows: list[GoldenRow]
    answers: list[Answer]
    compiled: bool


@pytest.fixture(
    scope="module",
    params=[
        ("base", "organs", "compiled"),
        ("base", "flat", "compiled"),
        ("base", "organs", "operators"),
        ("bf16", "organs", "compiled"),
        ("bf16", "flat", "compiled"),
        ("bf16", "flat", "operators"),
    ],
    ids="-".join,
)
def case(request: pytest.FixtureRequest, golden_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    variant, routing, arithmetic = request.param
    checkpoint = golden_dir / variant / "checkpoint"
    groups = CLONES if routing == "organs" else PARTITION
    split = split_golden(checkpoint, tmp_path_factory.mktemp("split"), groups, routing)
    rows = list(golden_rows(golden_dir, variant))
    compiled = arithmetic == "compiled"
    with running_engine(split, local_experts(split), compiled=compiled) as engine:
        assert engine._runner.cache.compiled == compiled
        yield Case(split, rows, run_together(engine, requests(rows, split, checkpoint)), compiled)
        assert engine.free_blocks == 4096 // 16


def requests(rows: list[GoldenRow], split: SplitGolden, checkpoint: Path) -> list[SequenceRequest]:
    flat = split.expert_set.routing == "flat"
    return [
        engine_request(row, split, checkpoint, () if flat else SHARES[index % len(SHARES)])
        for index, row in enumerate(rows)
    ]


def test_golden_logits_and_tokens(case: Case) -> None:
    rows, answers = case.rows, case.answers
    for row, answer in zip(rows, answers, strict=True):
        row.check_logits(answer.logits_TV[: len(row.input_ids)])
        row.check_tokens(answer.token_ids)
        assert len(answer.logits_TV) == len(row.input_ids) + len(answer.token_ids) - 1


def test_routed_pairs_are_counted_per_organ(case: Case) -> None:
    split, rows, answers = case.split, case.rows, case.answers
    for index, (row, answer) in enumerate(zip(rows, answers, strict=True)):
        assert answer.last is not None
        pairs = answer.last.routed_pairs
        assert pairs is not None
        computed = len(row.input_ids) + len(answer.token_ids) - 1
        organs = 1 if split.expert_set.routing == "flat" else len(SHARES[index % len(SHARES)])
        assert sum(pairs.values()) == computed * 4 * 2 * organs
        if split.expert_set.routing == "organs":
            assert set(pairs) == {organ for organ, _ in SHARES[index % len(SHARES)]}


def test_experts_behind_grpc_give_the_same_bits(case: Case, golden_dir: Path) -> None:
    split, rows, local = case.split, case.rows, case.answers
    checkpoint = golden_dir / rows[0].variant / "checkpoint"
    with (
        server_thread() as servers,
        running_engine(split, remote_experts(split, servers), compiled=case.compiled) as engine,
    ):
        remote = run_together(engine, requests(rows, split, checkpoint))
    for row, here, there in zip(rows, local, remote, strict=True):
        assert here.token_ids == there.token_ids, str(row)
        assert torch.equal(here.logits_TV, there.logits_TV), str(row)


@pytest.mark.parametrize("max_prefill_tokens", [16, 37])
def test_prefill_in_small_pieces_changes_nothing(golden_dir: Path, tmp_path: Path, max_prefill_tokens: int) -> None:
    checkpoint = golden_dir / "base" / "checkpoint"
    routing: Routing = "organs"
    split = split_golden(checkpoint, tmp_path, {"breast": ALL}, routing)
    rows = list(golden_rows(golden_dir, "base"))
    with running_engine(split, local_experts(split), max_prefill_tokens=max_prefill_tokens) as engine:
        wanted = [engine_request(row, split, checkpoint, (("breast", 1.0),)) for row in rows]
        for row, answer in zip(rows, run_together(engine, wanted), strict=True):
            row.check_logits(answer.logits_TV[: len(row.input_ids)])
            row.check_tokens(answer.token_ids)
