"""Sends the tokens of one forward pass to the organs' experts, layer by layer, and adds up the results.

In each layer, every organ with tokens gets one call with only those tokens. Local and remote experts differ only in the
`ExpertPlacement` that sends the call, so their results are bitwise equal.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from router.dispatch.expert_call import ExpertCall, ExpertPlacement
from router.dispatch.step_plan import FlatRows, OrganRows, RowGroup, StepPlan, TokenAssignment, plan_step
from router.errors import ExpertsFailedError, ExpertsUnavailableError
from router.gating.expert_gates import ExpertGates
from router.gating.token_gate import TokenRouting, choose_experts

__all__ = ["DispatchFailure", "DispatchStep", "Dispatcher", "PendingLayer", "TokenAssignment"]

DispatchFailure = ExpertsUnavailableError | ExpertsFailedError


class Dispatcher:
    """Has the gates of all expert sets in use, and the placement of their experts."""

    def __init__(self, placement: ExpertPlacement, *, top_k: int, norm_topk_prob: bool) -> None:
        """Takes the model's `num_experts_per_tok` and `norm_topk_prob`."""
        self.placement = placement
        self.top_k = top_k
        self.norm_topk_prob = norm_topk_prob
        self._gates: dict[str, ExpertGates] = {}

    def add_set(self, gates: ExpertGates) -> None:
        """Adds a set to which sequences can be pinned from now on. Idempotent."""
        self._gates.setdefault(gates.expert_set.id, gates)

    def remove_set(self, expert_set_id: str) -> None:
        """Removes a set to which no sequence is pinned."""
        self._gates.pop(expert_set_id, None)

    def gates(self, expert_set_id: str) -> ExpertGates:
        """The gates of a set.

        Raises:
            KeyError: the set was not added, or was removed.
        """
        return self._gates[expert_set_id]

    def plan(self, assignments: Sequence[TokenAssignment], failed: Iterable[int], device: torch.device) -> StepPlan:
        """Plans a forward pass with `router.dispatch.step_plan.plan_step`."""
        return plan_step(assignments, set(failed), self._gates, device)

    def unavailable(self, shares: Iterable[tuple[str, float]]) -> ExpertsUnavailableError | None:
        """Why tokens of these organs cannot be computed now, or None. Does not block.

        Always None for flat sets, because their organs are unknown before the gate has run.
        """
        for organ, _ in shares:
            if (error := self.placement.unavailable(organ)) is not None:
                return error
        return None

    def step(self, assignments: Sequence[TokenAssignment]) -> "DispatchStep":
        """The routed experts of one forward pass over the rows of the assignments, in ascending order without gaps."""
        return DispatchStep(self, assignments)


@dataclass(frozen=True, slots=True)
class _RoutedRows:
    """A row group in one layer, with the gate's choices."""

    row_group: RowGroup
    index_RK: torch.Tensor
    weight_RK: torch.Tensor


@dataclass(slots=True)
class _DispatchGroup:
    """The row groups that are sent to one organ in one layer; they use the same bundle."""

    routed: list[_RoutedRows] = field(default_factory=list)
    call: ExpertCall | None = None

    @property
    def row_groups(self) -> list[RowGroup]:
        """The row groups."""
        return [rows.row_group for rows in self.routed]


class DispatchStep:
    """Implements `router.dispatch.routed_experts.RoutedExperts` for one forward pass.

    A sequence whose organ fails is marked and sends nothing more in this pass; its rows are then undefined. Other rows
    are not affected.

    Attributes:
        failures: index of a failed assignment → the error.
    """

    def __init__(self, dispatcher: Dispatcher, assignments: Sequence[TokenAssignment]) -> None:
        """Made by `Dispatcher.step`."""
        self.failures: dict[int, DispatchFailure] = {}
        self._dispatcher = dispatcher
        self._assignments = assignments
        self._num_rows = assignments[-1].end if assignments else 0
        self._plan: StepPlan | None = None
        # Pairs of sets routed by organ follow from how often a layer was begun with a plan; those of flat sets are
        # counted where the tokens are, so that no layer waits for a device: organs of the set by row.
        self._organ_pairs: list[dict[str, int]] = [{} for _ in assignments]
        self._flat_pairs: dict[str, torch.Tensor] = {}
        self._layers_of_plan = 0

    def begin(self, layer: int, x_TD: torch.Tensor) -> "PendingLayer":
        """Computes the gates and sends every organ its tokens; see `RoutedExperts.begin`."""
        assert x_TD.shape[0] == self._num_rows, "the forward pass has other rows than the assignments"
        plan = self._plan
        if plan is None:
            plan = self._plan = self._dispatcher.plan(self._assignments, self.failures, x_TD.device)
        self._layers_of_plan += 1
        dispatch_groups: dict[tuple[str, str, int], _DispatchGroup] = {}
        routed: list[_RoutedRows] = []
        for organ_rows in plan.organ_sets:
            routed += self._gate_organs(organ_rows, layer, x_TD)
        for flat_rows in plan.flat_sets:
            routed += self._gate_flat(flat_rows, layer, x_TD)
        for rows in routed:
            key = (rows.row_group.organ, rows.row_group.digest, rows.index_RK.shape[1])
            dispatch_groups.setdefault(key, _DispatchGroup()).routed.append(rows)
        for dispatch_group in dispatch_groups.values():
            self._send(dispatch_group, layer, x_TD)
        return PendingLayer(self, plan, list(dispatch_groups.values()), [rows.row_group for rows in routed], x_TD)

    def pair_counts(self, index: int) -> dict[str, int]:
        """The number of (token, layer, expert) triples per organ for an assignment, over the layers so far."""
        self._count_organs()
        assignment = self._assignments[index]
        counted = self._flat_pairs.get(assignment.expert_set_id)
        if counted is None:
            return self._organ_pairs[index]
        organs = self._dispatcher.gates(assignment.expert_set_id).expert_set.organs
        pairs_O = counted[assignment.start : assignment.end].sum(0).tolist()
        return {organ: count for organ, count in zip(organs, pairs_O, strict=True) if count}

    def row_pair_counts(self, index: int) -> dict[str, list[int]]:
        """The pairs of each row of an assignment to a flat set, in which rows use different organs."""
        assignment = self._assignments[index]
        counted_TO = self._flat_pairs.get(assignment.expert_set_id)
        if counted_TO is None:
            return {}
        organs = self._dispatcher.gates(assignment.expert_set_id).expert_set.organs
        pairs_OT = counted_TO[assignment.start : assignment.end].T.tolist()
        return {organ: pairs_T for organ, pairs_T in zip(organs, pairs_OT, strict=True) if any(pairs_T)}

    def fail(self, row_groups: Iterable[RowGroup], error: DispatchFailure) -> None:
        """Marks the sequences that have rows in a dispatch group that failed."""
        for row_group in row_groups:
            for index in self._sequences_of(row_group):
                self.failures.setdefault(index, error)
        self._count_organs()
        self._plan = None

    def _gate_organs(self, organ_rows: OrganRows, layer: int, x_TD: torch.Tensor) -> Iterator[_RoutedRows]:
        gates, row_groups = organ_rows.gates, organ_rows.row_groups
        logits_TE = gates.logits(layer, x_TD)
        if organ_rows.organ_M is None:
            for row_group in row_groups:
                start, end = gates.expert_range(row_group.organ)
                own_TE = logits_TE[:, start:end]
                weight_RK, index_RK = self._choose(own_TE if row_group.row_R is None else own_TE[row_group.row_R])
                yield _RoutedRows(row_group, index_RK, weight_RK)
            return
        # One softmax and top-k for all organs; each row then selects its organ's.
        logits_TOE = logits_TE.unflatten(1, (len(gates.expert_set.organs), -1))
        weight_MK, index_MK = self._choose(logits_TOE[organ_rows.row_M, organ_rows.organ_M])
        sizes = organ_rows.sizes
        for rows in zip(row_groups, index_MK.split(sizes), weight_MK.split(sizes), strict=True):
            yield _RoutedRows(*rows)

    def _gate_flat(self, flat_rows: FlatRows, layer: int, x_TD: torch.Tensor) -> Iterator[_RoutedRows]:
        gates, row_S, split = flat_rows.gates, flat_rows.row_S, flat_rows.split
        logits_TE = gates.logits(layer, x_TD)
        logits_SE = logits_TE if row_S is None else logits_TE[row_S]
        routing = TokenRouting(logits_SE, *self._choose(logits_SE))
        organ_SK = split.organ_of(routing)
        self._count_flat(gates, row_S, organ_SK, split.num_organs)
        organs = gates.expert_set.organs
        for organ, (row_R, index_RK, weight_RK) in zip(organs, split.split(routing, organ_SK), strict=True):
            if not len(row_R):
                continue
            in_pass_R = row_R if row_S is None else row_S[row_R]
            # A row group's rows ascend, so a group with as many rows as the pass has all of them in order.
            all_rows = len(row_R) == self._num_rows
            row_group = RowGroup(organ, gates.expert_set.bundle_digest(organ), None if all_rows else in_pass_R, None)
            yield _RoutedRows(row_group, index_RK, weight_RK)

    def _choose(self, logits_RE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # A group may have fewer experts than the model chooses per token.
        top_k = min(self._dispatcher.top_k, logits_RE.shape[1])
        return choose_experts(logits_RE, top_k, self._dispatcher.norm_topk_prob)

    def _send(self, dispatch_group: _DispatchGroup, layer: int, x_TD: torch.Tensor) -> None:
        first = dispatch_group.routed[0]
        row_R, index_RK, weight_RK = first.row_group.row_R, first.index_RK, first.weight_RK
        if len(dispatch_group.routed) > 1:
            # No row group has all rows, because each row belongs to one set.
            row_R = torch.cat(
                [rows.row_group.row_R for rows in dispatch_group.routed if rows.row_group.row_R is not None]
            )
            index_RK = torch.cat([rows.index_RK for rows in dispatch_group.routed])
            weight_RK = torch.cat([rows.weight_RK for rows in dispatch_group.routed])
        try:
            dispatch_group.call = self._dispatcher.placement.send(
                first.row_group.organ, first.row_group.digest, layer, x_TD, index_RK, weight_RK, row_R
            )
        except (ExpertsUnavailableError, ExpertsFailedError) as error:
            self.fail(dispatch_group.row_groups, error)

    def _count_organs(self) -> None:
        if self._plan is None or not self._layers_of_plan:
            return
        for organ_rows in self._plan.organ_sets:
            for row_group in organ_rows.row_groups:
                top_k = min(self._dispatcher.top_k, organ_rows.gates.num_experts(row_group.organ))
                for index in self._sequences_of(row_group):
                    assignment = self._assignments[index]
                    pairs = (assignment.end - assignment.start) * top_k * self._layers_of_plan
                    counted = self._organ_pairs[index]
                    counted[row_group.organ] = counted.get(row_group.organ, 0) + pairs
        self._layers_of_plan = 0

    def _count_flat(
        self, gates: ExpertGates, row_S: torch.Tensor | None, organ_SK: torch.Tensor, num_organs: int
    ) -> None:
        set_id = gates.expert_set.id
        counted_TO = self._flat_pairs.get(set_id)
        if counted_TO is None:
            counted_TO = torch.zeros(self._num_rows, num_organs, dtype=torch.int64, device=organ_SK.device)
            self._flat_pairs[set_id] = counted_TO
        if row_S is None:
            counted_TO.scatter_add_(1, organ_SK, torch.ones_like(organ_SK))
        else:
            own_SO = torch.zeros(len(row_S), num_organs, dtype=torch.int64, device=organ_SK.device)
            counted_TO.index_add_(0, row_S, own_SO.scatter_add_(1, organ_SK, torch.ones_like(organ_SK)))

    def _sequences_of(self, row_group: RowGroup) -> list[int]:
        """The assignments that have rows in a row group."""
        if row_group.row_R is None:
            return list(range(len(self._assignments)))
        ends = torch.tensor([assignment.end for assignment in self._assignments])
        indices: list[int] = torch.searchsorted(ends, row_group.row_R.cpu(), right=True).unique().tolist()
        return indices


@dataclass(frozen=True, slots=True)
class PendingLayer:
    """The running calls of one layer."""

    step: DispatchStep
    plan: StepPlan
    dispatch_groups: list[_DispatchGroup]
    # In the order of the expert set's organs; a row belongs to one set only.
    row_groups: list[RowGroup]
    x_TD: torch.Tensor

    def result(self) -> torch.Tensor:
        """Waits for all calls, and adds the organs' outputs in the order of the expert set.

        The sum is computed in float32 and rounded once, so that the output of a single organ with share 1 is unchanged.

        Returns:
            tokens × hidden in x's dtype; undefined in the rows of failed sequences.
        """
        outputs: dict[RowGroup, torch.Tensor] = {}
        for dispatch_group in self.dispatch_groups:
            if dispatch_group.call is None:
                continue
            try:
                output_RD = dispatch_group.call.result()
            except (ExpertsUnavailableError, ExpertsFailedError) as error:
                self.step.fail(dispatch_group.row_groups, error)
                continue
            if len(dispatch_group.routed) == 1:
                outputs[dispatch_group.routed[0].row_group] = output_RD
            else:
                sizes = [len(rows.index_RK) for rows in dispatch_group.routed]
                outputs.update(zip(dispatch_group.row_groups, output_RD.split(sizes), strict=True))
        return self._sum(outputs)

    def _sum(self, outputs: dict[RowGroup, torch.Tensor]) -> torch.Tensor:
        x_TD, row_groups = self.x_TD, self.row_groups
        if len(row_groups) == len(outputs) == 1 and row_groups[0].row_R is None and row_groups[0].share_R1 is None:
            return outputs[row_groups[0]]
        if self.plan.disjoint and self.plan.complete and len(outputs) == len(row_groups):
            # Every row is written exactly once.
            total_TD = torch.empty_like(x_TD)
            for row_group, output_RD in outputs.items():
                assert row_group.row_R is not None, "a row group with all rows is not the only one"
                total_TD.index_copy_(0, row_group.row_R, output_RD)
            return total_TD
        # Negative zero, because adding to it preserves every bit, also the sign of a zero.
        sum_TD = torch.full(x_TD.shape, -0.0, dtype=torch.float32, device=x_TD.device)
        for row_group in row_groups:
            if row_group not in outputs:
                continue
            part_RD = outputs[row_group].float()
            if row_group.share_R1 is not None:
                part_RD = part_RD * row_group.share_R1
            if row_group.row_R is None:
                sum_TD += part_RD
            else:
                sum_TD.index_add_(0, row_group.row_R, part_RD)
        return sum_TD.to(x_TD.dtype)
