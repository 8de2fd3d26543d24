"""The plan of one forward pass: which rows go to which organs. It is the same for all layers."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch

from router.gating.expert_gates import ExpertGates
from router.gating.expert_set import ExpertSetMember
from router.gating.flat_split import FlatSplit


@dataclass(frozen=True, slots=True)
class TokenAssignment:
    """Rows [start, end) of a forward pass: one sequence's tokens.

    Attributes:
        expert_set_id: the sequence's expert set.
        shares: organ and π, which add up to 1; empty for flat sets.
    """

    start: int
    end: int
    expert_set_id: str
    shares: tuple[tuple[str, float], ...]


@dataclass(frozen=True, slots=True, eq=False)
class RowGroup:
    """The rows that one expert set's sequences send to one organ, in ascending order.

    Attributes:
        row_R: the rows; None for all rows of the pass.
        share_R1: the shares in float32; None if all are 1.
    """

    organ: str
    digest: str
    row_R: torch.Tensor | None
    share_R1: torch.Tensor | None


@dataclass(frozen=True, slots=True, eq=False)
class OrganRows:
    """One set routed by organ: its row groups, and the concatenation of their rows.

    Attributes:
        gates: the set's gates.
        row_groups: in the order of the set's organs.
        sizes: the number of rows of each row group.
        row_M: the concatenated rows.
        organ_M: the index of each row's organ in the set. None if experts are not chosen for all organs at once,
            because the organs differ in their number of experts or there is only one row group.
    """

    gates: ExpertGates
    row_groups: tuple[RowGroup, ...]
    sizes: tuple[int, ...]
    row_M: torch.Tensor
    organ_M: torch.Tensor | None


@dataclass(frozen=True, slots=True, eq=False)
class FlatRows:
    """One flat set: its rows (None for all rows of the pass) and their split by organ."""

    gates: ExpertGates
    row_S: torch.Tensor | None
    split: FlatSplit


@dataclass(frozen=True, slots=True)
class StepPlan:
    """The plan of one pass, without failed sequences.

    Attributes:
        disjoint: every row goes to at most one organ with a share of 1, so outputs need not be added.
        complete: every row goes to at least one organ.
    """

    organ_sets: tuple[OrganRows, ...]
    flat_sets: tuple[FlatRows, ...]
    disjoint: bool
    complete: bool


def plan_step(
    assignments: Sequence[TokenAssignment],
    failed: Collection[int],
    gates_of: Mapping[str, ExpertGates],
    device: torch.device,
) -> StepPlan:
    """Plans a pass.

    Args:
        assignments: all rows of the pass, ascending and without gaps.
        failed: indices of assignments that send nothing.
        gates_of: expert set id → gates.
        device: the device of the rows.
    """
    by_set = _by_set([each for index, each in enumerate(assignments) if index not in failed], gates_of)
    num_rows = assignments[-1].end if assignments else 0
    organ_sets, flat_sets = [], []
    for set_id, own in by_set.items():
        gates = gates_of[set_id]
        if gates.expert_set.routing == "flat":
            ranges = [gates.expert_range(organ) for organ in gates.expert_set.organs]
            flat_sets.append(FlatRows(gates, _rows(own, num_rows, device), FlatSplit(ranges, device)))
        else:
            organ_sets.append(_organ_rows(own, gates, num_rows, device))
    whole = all(len(assignment.shares) == 1 for own in by_set.values() for assignment in own)
    plain = all(row_group.share_R1 is None for planned in organ_sets for row_group in planned.row_groups)
    disjoint = not flat_sets and whole and plain
    return StepPlan(tuple(organ_sets), tuple(flat_sets), disjoint, complete=not failed)


def _by_set(
    assignments: Sequence[TokenAssignment], gates_of: Mapping[str, ExpertGates]
) -> dict[str, list[TokenAssignment]]:
    """Expert set id → its sequences, and those of other sets with the same experts.

    During a rollout, most sequences use organs whose experts are the same in both sets. These are grouped and gated as
    one set.
    """
    several = len({assignment.expert_set_id for assignment in assignments}) > 1
    set_of: dict[tuple[ExpertSetMember, ...], str] = {}
    by_set: dict[str, list[TokenAssignment]] = {}
    for assignment in assignments:
        set_id = assignment.expert_set_id
        expert_set = gates_of[set_id].expert_set
        # The counts of flat sets are stored by the set's id.
        if several and expert_set.routing != "flat":
            set_id = set_of.setdefault(expert_set.used(assignment.shares), set_id)
        by_set.setdefault(set_id, []).append(assignment)
    return by_set


def _organ_rows(own: Sequence[TokenAssignment], gates: ExpertGates, num_rows: int, device: torch.device) -> OrganRows:
    row_groups, sizes, rows, places = [], [], [], []
    for place, organ in enumerate(gates.expert_set.organs):
        users = [(each, share) for each in own if (share := dict(each.shares).get(organ, 0.0))]
        if not users:
            continue
        counts = [each.end - each.start for each, _ in users]
        row_R = torch.cat([torch.arange(each.start, each.end) for each, _ in users])
        share_R1 = None
        if any(share != 1.0 for _, share in users):
            shares = torch.tensor([share for _, share in users], dtype=torch.float32)
            share_R1 = torch.repeat_interleave(shares, torch.tensor(counts))[:, None].to(device)
        all_rows = len(row_R) == num_rows
        row_R = row_R.to(device)
        row_groups.append(RowGroup(organ, gates.expert_set.bundle_digest(organ), None if all_rows else row_R, share_R1))
        sizes.append(len(row_R))
        rows.append(row_R)
        places.append(place)
    stackable = len(row_groups) > 1 and len({gates.num_experts(organ) for organ in gates.expert_set.organs}) == 1
    organ_M = None
    if stackable:
        organ_M = torch.repeat_interleave(torch.tensor(places), torch.tensor(sizes)).to(device)
    row_M = torch.cat(rows) if rows else torch.empty(0, dtype=torch.int64, device=device)
    return OrganRows(gates, tuple(row_groups), tuple(sizes), row_M, organ_M)


def _rows(own: Sequence[TokenAssignment], num_rows: int, device: torch.device) -> torch.Tensor | None:
    if sum(each.end - each.start for each in own) == num_rows:
        return None
    return torch.cat([torch.arange(each.start, each.end) for each in own]).to(device)
