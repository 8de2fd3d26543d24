"""Sends the tokens of one forward pass to the organs' experts, layer by layer, and adds up what comes back.

For each layer, every organ that gets any token is sent one exchange with those tokens alone. Experts in process and
experts behind gRPC differ only in the `ExpertPlacement` that carries the exchange, so their results are the same bits.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch

from experts.kernels.base import NO_EXPERT
from router.errors import ExpertsFailedError, ExpertsUnavailableError
from router.exchange import Exchange, ExpertPlacement
from router.expert_gates import ExpertGates
from router.token_gate import TokenRouting, route_tokens

DispatchFailure = ExpertsUnavailableError | ExpertsFailedError


@dataclass(frozen=True, slots=True)
class TokenAssignment:
    """Rows [start, end) of a forward pass: one sequence's tokens.

    Attributes:
        expert_set_id: the set that the sequence is pinned to.
        shares: organ and π of sets routed by organ, adding up to 1; empty for flat sets.
    """

    start: int
    end: int
    expert_set_id: str
    shares: tuple[tuple[str, float], ...]


class Dispatcher:
    """Knows the gates of all expert sets in use, and where their experts are."""

    def __init__(self, placement: ExpertPlacement, *, top_k: int, norm_topk_prob: bool) -> None:
        """The last two are the model's `num_experts_per_tok` and `norm_topk_prob`."""
        self.placement = placement
        self.top_k = top_k
        self.norm_topk_prob = norm_topk_prob
        self._gates: dict[str, ExpertGates] = {}

    def add_set(self, gates: ExpertGates) -> None:
        """From now on sequences may be pinned to this set; a set that is known already is left alone."""
        self._gates.setdefault(gates.expert_set.id, gates)

    def remove_set(self, expert_set_id: str) -> None:
        """Forgets a set that no sequence is pinned to any more."""
        self._gates.pop(expert_set_id, None)

    def gates(self, expert_set_id: str) -> ExpertGates:
        """The gates of a set.

        Raises:
            KeyError: the set was not added, or was removed.
        """
        return self._gates[expert_set_id]

    def unavailable(self, shares: Iterable[tuple[str, float]]) -> ExpertsUnavailableError | None:
        """Why tokens of these organs cannot be computed now, or None; never waits.

        Flat sets have no shares and give None: which organs their tokens need is not known before the gate has run.
        """
        for organ, _ in shares:
            if (error := self.placement.unavailable(organ)) is not None:
                return error
        return None

    def step(self, assignments: Sequence[TokenAssignment]) -> "DispatchStep":
        """The routed experts of one forward pass over the rows of the assignments, in ascending order without gaps."""
        return DispatchStep(self, assignments)


@dataclass(frozen=True, slots=True, eq=False)
class _Member:
    """The rows that one expert set's sequences send to one organ, in ascending order.

    `share_R1` is float32, or None where every share is 1; `chunk_R` says whose row each is.
    """

    organ: str
    digest: str
    set_id: str
    row_R: torch.Tensor
    chunk_R: torch.Tensor
    share_R1: torch.Tensor | None


@dataclass(slots=True)
class _Parcel:
    """What is sent to one organ in one layer: the tokens of one or more members with the same bundle."""

    organ: str
    digest: str
    members: list[_Member] = field(default_factory=list)
    index_RK: list[torch.Tensor] = field(default_factory=list)
    weight_RK: list[torch.Tensor] = field(default_factory=list)
    exchange: Exchange | None = None


class DispatchStep:
    """Implements `router.routed_experts.RoutedExperts` for one forward pass.

    A sequence whose organ fails is marked and sends nothing more in this pass; its rows then mean nothing. The other
    rows are not touched by that.

    Attributes:
        failures: index of the assignment → why its rows mean nothing.
    """

    def __init__(self, dispatcher: Dispatcher, assignments: Sequence[TokenAssignment]) -> None:
        """See `Dispatcher.step`."""
        self.failures: dict[int, DispatchFailure] = {}
        self._dispatcher = dispatcher
        self._assignments = assignments
        self._num_rows = assignments[-1].end if assignments else 0
        self._members: list[_Member] | None = None
        # The experts that each row was sent to; counted only when asked, so that no layer waits for a device.
        self._sent: list[tuple[_Member, torch.Tensor]] = []
        self._pairs: list[dict[str, int]] | None = None

    def begin(self, layer: int, x_TD: torch.Tensor) -> "PendingLayer":
        """Gates the rows and sends every organ its tokens; see `RoutedExperts.begin`."""
        assert x_TD.shape[0] == self._num_rows, "the forward pass has other rows than the assignments"
        parcels: dict[tuple[str, str, int], _Parcel] = {}
        sending: list[_Member] = []
        flat_routing: dict[str, TokenRouting] = {}
        for member in self._plan(x_TD.device):
            gates = self._dispatcher.gates(member.set_id)
            if gates.expert_set.routing == "organs":
                routing = self._route(self._rows(x_TD, member.row_R), gates.rows_of(member.organ, layer))
                taken, index_RK, weight_RK = member, routing.index_TK, routing.weight_TK
            else:
                if member.set_id not in flat_routing:
                    x_RD = self._rows(x_TD, member.row_R)
                    flat_routing[member.set_id] = self._route(x_RD, gates.flat_rows(layer))
                taken, index_RK, weight_RK = _part_of_organ(member, gates, flat_routing[member.set_id])
            if not len(taken.row_R):
                continue
            sending.append(taken)
            self._sent.append((taken, index_RK))
            key = (member.organ, member.digest, index_RK.shape[1])
            parcel = parcels.setdefault(key, _Parcel(member.organ, member.digest))
            parcel.members.append(taken)
            parcel.index_RK.append(index_RK.to(torch.int32))
            parcel.weight_RK.append(weight_RK)
        for parcel in parcels.values():
            self._send(parcel, layer, x_TD)
        return PendingLayer(self, list(parcels.values()), sending, x_TD)

    def pair_counts(self, index: int) -> dict[str, int]:
        """(token, layer, expert) pairs per organ that the gates chose for an assignment, over the layers so far."""
        if self._pairs is None:
            self._pairs = self._count()
        return self._pairs[index]

    def fail(self, members: Iterable[_Member], error: DispatchFailure) -> None:
        """Marks the sequences that have rows in a parcel that failed."""
        for member in members:
            for chunk in set(member.chunk_R.tolist()):
                self.failures.setdefault(chunk, error)
        self._members = None

    def _route(self, x_RD: torch.Tensor, gate_ED: torch.Tensor) -> TokenRouting:
        # A group may have fewer experts than the model chooses per token.
        top_k = min(self._dispatcher.top_k, gate_ED.shape[0])
        return route_tokens(x_RD, gate_ED, top_k, self._dispatcher.norm_topk_prob)

    def _send(self, parcel: _Parcel, layer: int, x_TD: torch.Tensor) -> None:
        members = parcel.members
        if len(members) == 1:
            x_RD = self._rows(x_TD, members[0].row_R)
        else:
            x_RD = x_TD[torch.cat([member.row_R for member in members])]
        try:
            parcel.exchange = self._dispatcher.placement.send(
                parcel.organ,
                parcel.digest,
                layer,
                x_RD,
                torch.cat(parcel.index_RK),
                torch.cat(parcel.weight_RK),
            )
        except (ExpertsUnavailableError, ExpertsFailedError) as error:
            self.fail(members, error)

    def _count(self) -> list[dict[str, int]]:
        pairs: list[dict[str, int]] = [{} for _ in self._assignments]
        for member, index_RK in self._sent:
            pairs_R = (index_RK != NO_EXPERT).sum(1).cpu()
            for chunk, count in enumerate(torch.bincount(member.chunk_R, pairs_R, len(pairs)).long().tolist()):
                if count:
                    pairs[chunk][member.organ] = pairs[chunk].get(member.organ, 0) + count
        return pairs

    def _rows(self, x_TD: torch.Tensor, row_R: torch.Tensor) -> torch.Tensor:
        # A member's rows ascend, so as many as there are means all of them in order.
        return x_TD if len(row_R) == self._num_rows else x_TD[row_R]

    def _plan(self, device: torch.device) -> list[_Member]:
        if self._members is not None:
            return self._members
        by_set: dict[str, list[int]] = {}
        for chunk, assignment in enumerate(self._assignments):
            if chunk not in self.failures:
                by_set.setdefault(assignment.expert_set_id, []).append(chunk)
        members = []
        for set_id, chunks in by_set.items():
            expert_set = self._dispatcher.gates(set_id).expert_set
            for organ in expert_set.organs:
                users = [(chunk, share) for chunk in chunks if (share := self._share(chunk, organ, expert_set.routing))]
                if users:
                    digest = expert_set.bundle_digest(organ)
                    members.append(self._member(organ, digest, set_id, users, device))
        self._members = members
        return members

    def _share(self, chunk: int, organ: str, routing: str) -> float:
        if routing == "flat":
            return 1.0
        return dict(self._assignments[chunk].shares).get(organ, 0.0)

    def _member(
        self, organ: str, digest: str, set_id: str, users: list[tuple[int, float]], device: torch.device
    ) -> _Member:
        spans = [(self._assignments[chunk], chunk, share) for chunk, share in users]
        row_R = torch.cat([torch.arange(span.start, span.end) for span, _, _ in spans])
        chunk_R = torch.cat([torch.full((span.end - span.start,), chunk) for span, chunk, _ in spans])
        share_R1 = None
        if any(share != 1.0 for _, _, share in spans):
            share_R1 = torch.cat([torch.full((span.end - span.start, 1), share) for span, _, share in spans]).to(device)
        return _Member(organ, digest, set_id, row_R.to(device), chunk_R, share_R1)


@dataclass(frozen=True, slots=True)
class PendingLayer:
    """One layer's exchanges under way."""

    step: DispatchStep
    parcels: list[_Parcel]
    # In the order of the expert set's organs; a row belongs to one set only.
    members: list[_Member]
    x_TD: torch.Tensor

    def result(self) -> torch.Tensor:
        """Waits for all of them, and adds the organs' parts in the order of the expert set.

        The sum is taken in float32 and rounded once, so that one organ's part with share 1 comes out bit for bit.

        Returns:
            tokens × hidden in x's dtype; undefined in the rows of failed sequences.
        """
        parts: dict[_Member, torch.Tensor] = {}
        for parcel in self.parcels:
            if parcel.exchange is None:
                continue
            try:
                output_RD = parcel.exchange.result()
            except (ExpertsUnavailableError, ExpertsFailedError) as error:
                self.step.fail(parcel.members, error)
                continue
            sizes = [len(member.row_R) for member in parcel.members]
            parts.update(zip(parcel.members, torch.split(output_RD, sizes), strict=True))
        if len(self.members) == len(parts) == 1:
            ((member, part_RD),) = parts.items()
            if member.share_R1 is None and part_RD.shape == self.x_TD.shape:
                return part_RD
        # Minus zero, because adding to it changes no bit, not even the sign of a zero.
        total_TD = torch.full(self.x_TD.shape, -0.0, dtype=torch.float32, device=self.x_TD.device)
        for member in self.members:
            if member not in parts:
                continue
            part_RD = parts[member].float()
            total_TD[member.row_R] += part_RD if member.share_R1 is None else part_RD * member.share_R1
        return total_TD.to(self.x_TD.dtype)


def _part_of_organ(
    member: _Member, gates: ExpertGates, routing: TokenRouting
) -> tuple[_Member, torch.Tensor, torch.Tensor]:
    """The rows of a flat set that have an expert of this organ, with indices from its first expert on."""
    start, end = gates.expert_range(member.organ)
    own_RK = (routing.index_TK >= start) & (routing.index_TK < end)
    kept_R = own_RK.any(1).nonzero()[:, 0]
    index_RK = torch.where(own_RK, routing.index_TK - start, NO_EXPERT)
    taken = _Member(
        member.organ, member.digest, member.set_id, member.row_R[kept_R], member.chunk_R[kept_R.cpu()], member.share_R1
    )
    return taken, index_RK[kept_R], routing.weight_TK[kept_R]
