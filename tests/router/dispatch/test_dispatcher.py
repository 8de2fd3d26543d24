"""The dispatcher against the formula, on real expert groups."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from experts.kernels.base import NO_EXPERT
from router.dispatch.dispatcher import Dispatcher, TokenAssignment
from router.dispatch.expert_call import ExpertCall
from router.errors import ExpertsUnavailableError
from router.gating.expert_gates import ExpertGates
from router.gating.expert_set import ExpertSet, ExpertSetMember, Routing
from tests.split_golden import split_golden

HIDDEN = 8
# Organs may differ in their number of experts; those that do not are gated together.
SIZES = {"breast": 4, "liver": 2, "heart": 1}
EQUAL_SIZES = {"breast": 3, "liver": 3, "heart": 3}
ORGANS = tuple(SIZES)


class ScalingExperts:
    """Exact experts: expert e of an organ multiplies by a power of two of its own. Remembers what it was sent."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, str, torch.Tensor, torch.Tensor]] = []
        self.lost: set[str] = set()
        self.lost_while_computing: set[str] = set()

    def send(
        self,
        organ: str,
        bundle_digest: str,
        layer: int,
        x_TD: torch.Tensor,
        expert_index_TK: torch.Tensor,
        weight_TK: torch.Tensor,
        row_R: torch.Tensor | None = None,
    ) -> ExpertCall:
        if organ in self.lost:
            raise ExpertsUnavailableError(organ, "lost")
        assert expert_index_TK.dtype in (torch.int32, torch.int64)
        x_TD = x_TD if row_R is None else x_TD[row_R]
        assert weight_TK.dtype == x_TD.dtype
        self.sent.append((organ, bundle_digest, x_TD, expert_index_TK))
        factor_TK = torch.where(expert_index_TK == NO_EXPERT, 0.0, scale(organ, expert_index_TK))
        output_TD = x_TD * (weight_TK.float() * factor_TK).sum(1, keepdim=True)
        return Answered(organ, output_TD.to(x_TD.dtype), organ in self.lost_while_computing)

    def unavailable(self, organ: str) -> ExpertsUnavailableError | None:
        return ExpertsUnavailableError(organ, "lost") if organ in self.lost else None

    def close(self) -> None:
        return


class Answered:
    def __init__(self, organ: str, output_TD: torch.Tensor, lost: bool) -> None:
        self.organ, self.output_TD, self.lost = organ, output_TD, lost
        self.compute_s = 0.0

    def result(self) -> torch.Tensor:
        if self.lost:
            raise ExpertsUnavailableError(self.organ, "lost")
        return self.output_TD


def scale(organ: str, expert: torch.Tensor) -> torch.Tensor:
    return torch.pow(2.0, expert + 4.0 * ORGANS.index(organ))


def gates(
    routing: Routing,
    seed: int = 0,
    layers: int = 2,
    digests: Mapping[str, str] | None = None,
    sizes: Mapping[str, int] = SIZES,
) -> ExpertGates:
    generator = torch.Generator().manual_seed(seed)
    members = tuple(
        ExpertSetMember(organ=organ, bundle_digest=(digests or {}).get(organ, f"{organ}-{seed}")) for organ in ORGANS
    )
    rows = {
        organ: tuple(torch.randn(count, HIDDEN, generator=generator) for _ in range(layers))
        for organ, count in sizes.items()
    }
    return ExpertGates(ExpertSet(backbone_digest="b", routing=routing, members=members), rows)


def expected(own: ExpertGates, layer: int, x_TD: torch.Tensor, shares: Mapping[str, float]) -> torch.Tensor:
    """DESIGN section 2 and 3, token by token."""
    total_TD = torch.zeros_like(x_TD)
    choices = shares or {"": 1.0}
    for organ, share in choices.items():
        experts = [(name, index) for name in ([organ] if organ else ORGANS) for index in range(own.num_experts(name))]
        gate_ED = torch.cat([own.rows_of(name, layer) for name in ([organ] if organ else ORGANS)])
        for token, x_D in enumerate(x_TD):
            probability = F.softmax(gate_ED @ x_D, dim=0)
            for expert in probability.argsort(descending=True)[:2].tolist():
                name, index = experts[expert]
                total_TD[token] += share * probability[expert] * scale(name, torch.tensor(index)) * x_D
    return total_TD


shares = st.one_of(
    st.sampled_from(ORGANS).map(lambda organ: ((organ, 1.0),)),
    st.permutations(ORGANS).map(lambda organs: ((organs[0], 0.25), (organs[1], 0.75))),
)


@settings(max_examples=60, deadline=None)
@given(
    chunks=st.lists(
        st.tuples(st.integers(1, 4), st.sampled_from(["organs", "other", "flat"]), shares), min_size=1, max_size=6
    ),
    seed=st.integers(0, 1000),
    sizes=st.sampled_from([SIZES, EQUAL_SIZES]),
)
def test_every_row_gets_its_own_sets_and_organs_sum(
    chunks: list[tuple[Any, ...]], seed: int, sizes: dict[str, int]
) -> None:
    # Two sets of organs with another gate and other bundles, and a flat one, in one batch.
    own = {
        "organs": gates("organs", sizes=sizes),
        "other": gates("organs", seed=1, sizes=sizes),
        "flat": gates("flat", seed=2, sizes=sizes),
    }
    experts = ScalingExperts()
    dispatcher = Dispatcher(experts, top_k=2, norm_topk_prob=False)
    for each in own.values():
        dispatcher.add_set(each)
    assignments, row = [], 0
    for count, name, organ_shares in chunks:
        set_id = own[name].expert_set.id
        assignments.append(TokenAssignment(row, row + count, set_id, () if name == "flat" else organ_shares))
        row += count
    x_TD = torch.randn(row, HIDDEN, generator=torch.Generator().manual_seed(seed))
    step = dispatcher.step(assignments)
    for layer in range(2):
        experts.sent.clear()
        found_TD = step.begin(layer, x_TD).result()
        for assignment, (_, name, _) in zip(assignments, chunks, strict=True):
            rows = slice(assignment.start, assignment.end)
            wanted_TD = expected(own[name], layer, x_TD[rows], dict(assignment.shares))
            torch.testing.assert_close(found_TD[rows], wanted_TD, rtol=1e-5, atol=1e-5)
        for organ, _, sent_TD, index_TK in experts.sent:
            assert (index_TK != NO_EXPERT).any(1).all(), f"{organ} was sent tokens that it has no expert for"
            assert len(sent_TD)
        kinds = [(organ, digest, index.shape[1]) for organ, digest, _, index in experts.sent]
        assert len(set(kinds)) == len(kinds), "one organ got more than one exchange"
    assert not step.failures
    for index, ((count, name, _), assignment) in enumerate(zip(chunks, assignments, strict=True)):
        pairs = step.pair_counts(index)
        if name == "flat":
            assert sum(pairs.values()) == count * 2 * 2
            by_row = step.row_pair_counts(index)
            assert {organ: sum(counts) for organ, counts in by_row.items()} == pairs
            assert [sum(counts[row] for counts in by_row.values()) for row in range(count)] == [4] * count
        else:
            assert pairs == {organ: count * 2 * min(2, sizes[organ]) for organ, _ in assignment.shares}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_organ_with_share_1_comes_out_bit_for_bit(dtype: torch.dtype) -> None:
    own = gates("organs")
    experts = ScalingExperts()
    dispatcher = Dispatcher(experts, top_k=2, norm_topk_prob=False)
    rows = {organ: tuple(own.rows_of(organ, layer).to(dtype) for layer in range(2)) for organ in ORGANS}
    own = ExpertGates(own.expert_set, rows)
    dispatcher.add_set(own)
    x_TD = torch.randn(6, HIDDEN).to(dtype)
    x_TD[0] = -0.0
    alone = dispatcher.step([TokenAssignment(0, 6, own.expert_set.id, (("breast", 1.0),))]).begin(0, x_TD).result()
    mixed = dispatcher.step(
        [
            TokenAssignment(0, 4, own.expert_set.id, (("breast", 1.0),)),
            TokenAssignment(4, 6, own.expert_set.id, (("liver", 1.0),)),
        ]
    )
    total = mixed.begin(0, x_TD).result()
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(total[:4].view(bits), alone[:4].view(bits)), "not even the sign of a zero may change"


def test_sets_that_share_a_bundle_share_an_exchange() -> None:
    digests = {"breast": "same"}
    first = gates("organs", digests=digests)
    second = ExpertGates(
        gates("organs", seed=5, digests=digests).expert_set,
        {organ: tuple(first.rows_of(organ, layer) for layer in range(2)) for organ in ORGANS},
    )
    experts = ScalingExperts()
    dispatcher = Dispatcher(experts, top_k=2, norm_topk_prob=False)
    dispatcher.add_set(first)
    dispatcher.add_set(second)
    x_TD = torch.randn(5, HIDDEN)
    step = dispatcher.step(
        [
            TokenAssignment(0, 2, first.expert_set.id, (("breast", 1.0),)),
            TokenAssignment(2, 3, first.expert_set.id, (("liver", 1.0),)),
            TokenAssignment(3, 5, second.expert_set.id, (("breast", 1.0),)),
        ]
    )
    found_TD = step.begin(0, x_TD).result()
    assert [(organ, len(x)) for organ, _, x, _ in experts.sent] == [("breast", 4), ("liver", 1)]
    torch.testing.assert_close(found_TD[3:], expected(second, 0, x_TD[3:], {"breast": 1.0}))


def test_sequences_of_another_set_that_use_the_same_experts_are_gated_with_the_rest() -> None:
    first = gates("organs", digests={"breast": "same", "liver": "old"})
    rows = {organ: tuple(first.rows_of(organ, layer) for layer in range(2)) for organ in ORGANS}
    rows["liver"] = tuple(torch.randn_like(each) for each in rows["liver"])
    second = ExpertGates(gates("organs", digests={"breast": "same", "liver": "new"}).expert_set, rows)
    dispatcher = Dispatcher(ScalingExperts(), top_k=2, norm_topk_prob=False)
    dispatcher.add_set(first)
    dispatcher.add_set(second)
    used = [
        (first, (("breast", 1.0),)),
        (second, (("breast", 1.0),)),
        (second, (("liver", 1.0),)),
        (first, (("liver", 1.0),)),
        (second, (("breast", 0.5), ("liver", 0.5))),
    ]
    assignments = [TokenAssignment(row, row + 1, own.expert_set.id, shares) for row, (own, shares) in enumerate(used)]
    plan = dispatcher.plan(assignments, (), torch.device("cpu"))
    sizes = {planned.gates.expert_set.id: planned.sizes for planned in plan.organ_sets}
    assert sizes == {first.expert_set.id: (2, 1), second.expert_set.id: (1, 2)}
    x_TD = torch.randn(5, HIDDEN)
    step = dispatcher.step(assignments)
    found_TD = step.begin(1, x_TD).result()
    for row, (own, shares) in enumerate(used):
        own_TD = x_TD[row : row + 1]
        torch.testing.assert_close(found_TD[row : row + 1], expected(own, 1, own_TD, dict(shares)))
        assert step.pair_counts(row) == {organ: 2 for organ, _ in shares}


@pytest.mark.parametrize("moment", ["lost", "lost_while_computing"])
def test_a_lost_organ_fails_its_rows_only_and_is_asked_once(moment: str) -> None:
    own = gates("organs")
    experts = ScalingExperts()
    getattr(experts, moment).add("liver")
    dispatcher = Dispatcher(experts, top_k=2, norm_topk_prob=True)
    dispatcher.add_set(own)
    x_TD = torch.randn(6, HIDDEN)
    set_id = own.expert_set.id
    step = dispatcher.step(
        [
            TokenAssignment(0, 2, set_id, (("breast", 1.0),)),
            TokenAssignment(2, 4, set_id, (("liver", 1.0),)),
            TokenAssignment(4, 6, set_id, (("liver", 0.5), ("heart", 0.5))),
        ]
    )
    reference = dispatcher.step([TokenAssignment(0, 2, set_id, (("breast", 1.0),))])
    wanted_TD = reference.begin(0, x_TD[:2]).result()
    assert torch.equal(step.begin(0, x_TD).result()[:2], wanted_TD)
    assert set(step.failures) == {1, 2}
    assert {type(error) for error in step.failures.values()} == {ExpertsUnavailableError}
    assert {error.organ for error in step.failures.values()} == {"liver"}
    experts.sent.clear()
    step.begin(1, x_TD).result()
    assert [organ for organ, *_ in experts.sent] == ["breast"], "rows that failed were sent on"
    assert dispatcher.unavailable((("breast", 1.0),)) is None
    assert (dispatcher.unavailable((("liver", 1.0),)) is not None) == (moment == "lost")


@pytest.mark.parametrize("sizes", [SIZES, EQUAL_SIZES], ids=["different", "equal"])
@pytest.mark.parametrize("routing", ["organs", "flat"])
def test_rows_of_a_failed_sequence_are_neither_sent_nor_counted(routing: Routing, sizes: dict[str, int]) -> None:
    own = gates(routing, sizes=sizes)
    experts = ScalingExperts()
    dispatcher = Dispatcher(experts, top_k=2, norm_topk_prob=False)
    dispatcher.add_set(own)
    # Of other tokens there are such that in a flat set none of the middle sequence's goes to the liver.
    x_TD = torch.randn(9, HIDDEN, generator=torch.Generator().manual_seed(0))
    organs = ("breast", "liver", "heart")
    step = dispatcher.step(
        [
            TokenAssignment(3 * n, 3 * n + 3, own.expert_set.id, ((organ, 1.0),) if routing == "organs" else ())
            for n, organ in enumerate(organs)
        ]
    )
    step.begin(0, x_TD).result()
    experts.lost_while_computing.add("liver")
    step.begin(1, x_TD).result()
    assert 1 in step.failures
    failed = set(step.failures)
    experts.lost_while_computing.clear()
    experts.sent.clear()
    found_TD = step.begin(0, x_TD).result()
    for index in set(range(3)) - failed:
        rows = slice(3 * index, 3 * index + 3)
        shares = {organs[index]: 1.0} if routing == "organs" else {}
        torch.testing.assert_close(found_TD[rows], expected(own, 0, x_TD[rows], shares))
        top_k = min(2, sizes[organs[index]]) if routing == "organs" else 2
        assert sum(step.pair_counts(index).values()) == 3 * 3 * top_k
    assert not any(torch.equal(row, x_TD[3 * n]) for _, _, x, _ in experts.sent for row in x for n in failed)


def test_gates_that_do_not_fit_are_refused() -> None:
    own = gates("organs")
    with pytest.raises(ValueError, match="no gate rows for liver, heart"):
        ExpertGates(own.expert_set, {"breast": (torch.zeros(4, HIDDEN),)})
    rows = {organ: (torch.zeros(1, HIDDEN),) for organ in ORGANS}
    with pytest.raises(ValueError, match="differ"):
        ExpertGates(own.expert_set, {**rows, "liver": (torch.zeros(1, HIDDEN + 1),)})


def test_gates_are_read_from_the_bundles(golden_dir: Path, tmp_path: Path) -> None:
    groups = {"breast": (2, 0), "liver": (3,), "heart": (1,)}
    split = split_golden(golden_dir / "base" / "checkpoint", tmp_path, groups, "flat")
    own = ExpertGates.from_bundles(split.expert_set, split.bundles(), num_layers=4, dtype=torch.float32)
    released = split.tensors["model.layers.3.moe.gate.weight"]
    identity = torch.eye(released.shape[1])
    assert torch.equal(own.logits(3, identity), released[[2, 0, 3, 1]].T)
    assert own.expert_range("liver") == (2, 3)
    assert torch.equal(own.rows_of("heart", 3), released[[1]])
    other = split.expert_set.model_copy(update={"backbone_digest": "c" * 64})
    with pytest.raises(ValueError, match="made for backbone"):
        ExpertGates.from_bundles(other, split.bundles(), num_layers=4, dtype=torch.float32)
    with pytest.raises(ValueError, match="was not given"):
        ExpertGates.from_bundles(split.expert_set, {}, num_layers=4, dtype=torch.float32)
