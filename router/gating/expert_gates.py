"""The token gates of an expert set, built from its bundles' gate rows."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch

from experts.bundles.bundle import Bundle
from experts.bundles.convert import convert
from router.gating.expert_set import ExpertSet
from router.gating.organ_gate import OrganProfile
from router.gating.token_gate import GateProduct


@dataclass(frozen=True, slots=True, eq=False)
class BundleGates:
    """What a router keeps of one bundle; its experts stay where they are.

    Attributes:
        version: for people; the digest is the identity.
        rows: the gate's rows, one matrix per layer, experts × hidden.
        profile: by what the bundle's organ is recognised.
    """

    organ: str
    version: str
    backbone_digest: str
    rows: tuple[torch.Tensor, ...]
    profile: OrganProfile

    @classmethod
    def read(
        cls, bundle: Bundle, *, num_layers: int, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> "BundleGates":
        """Copies them out of the bundle's files, which need not stay.

        Args:
            bundle: the bundle.
            num_layers: decoder layers of the backbone.
            dtype: the backbone's; rows are converted to it.
            device: where the gates are computed.

        Raises:
            ValueError: the bundle has another number of layers, is damaged, or has a row too large for the dtype.
        """
        manifest = bundle.manifest
        if manifest.num_layers != num_layers:
            raise ValueError(
                f"the bundle of {manifest.organ!r} has {manifest.num_layers} layers and the backbone {num_layers}"
            )
        rows = tuple(
            convert(bundle.gate_ED(layer), dtype, f"layer {layer}, gate rows", device).clone()
            for layer in range(num_layers)
        )
        prototype = bundle.prototype()
        profile = OrganProfile(
            manifest.organ, manifest.organ_synonyms, None if prototype is None else prototype.clone()
        )
        return cls(manifest.organ, manifest.version, manifest.backbone_digest, rows, profile)


class ExpertGates:
    """Every layer's gate matrices for one expert set. Organs may differ in their number of experts."""

    def __init__(self, expert_set: ExpertSet, gate_rows: Mapping[str, tuple[torch.Tensor, ...]]) -> None:
        """
        Args:
            expert_set: whose gates these are.
            gate_rows: organ → one matrix per layer, experts × hidden.

        Raises:
            ValueError: an organ's rows are missing, or organs differ in layers, hidden size or dtype.
        """
        if missing := [organ for organ in expert_set.organs if organ not in gate_rows]:
            raise ValueError(f"there are no gate rows for {', '.join(missing)}")
        self.expert_set = expert_set
        self._by_organ = {organ: tuple(gate_rows[organ]) for organ in expert_set.organs}
        kinds = {(len(rows), rows[0].shape[1], rows[0].dtype) for rows in self._by_organ.values()}
        if len(kinds) != 1:
            raise ValueError(f"the organs' gates differ in (layers, hidden size, dtype): {sorted(map(str, kinds))}")
        self.num_layers = len(next(iter(self._by_organ.values())))
        self._ranges: dict[str, tuple[int, int]] = {}
        end = 0
        for organ, rows in self._by_organ.items():
            start, end = end, end + rows[0].shape[0]
            self._ranges[organ] = start, end
        self._products = tuple(GateProduct(torch.cat(layer)) for layer in zip(*self._by_organ.values(), strict=True))

    @classmethod
    def from_bundles(
        cls,
        expert_set: ExpertSet,
        bundles: Mapping[str, Bundle],
        *,
        num_layers: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> Self:
        """Reads the gate rows of a set's bundles; their experts stay where they are.

        Args:
            expert_set: the set.
            bundles: bundle digest → bundle, for every member.
            num_layers: decoder layers of the backbone.
            dtype: the backbone's; rows are converted to it.
            device: where the gates are computed.

        Raises:
            ValueError: a bundle is missing, was trained against another backbone, or does not fit the others.
        """
        gates = {
            digest: BundleGates.read(bundle, num_layers=num_layers, dtype=dtype, device=device)
            for digest, bundle in bundles.items()
        }
        return cls.of(expert_set, gates)

    @classmethod
    def of(cls, expert_set: ExpertSet, gates: Mapping[str, BundleGates]) -> Self:
        """Joins what was read of a set's bundles, whose rows all sets share; the products are the set's own.

        Args:
            expert_set: the set.
            gates: bundle digest → what was read, for every member.

        Raises:
            ValueError: see `from_bundles`, or a bundle is another organ's.
        """
        gate_rows = {}
        for member in expert_set.members:
            own = gates.get(member.bundle_digest)
            if own is None:
                raise ValueError(f"the bundle of {member.organ!r}, {member.bundle_digest}, was not given")
            if own.organ != member.organ:
                raise ValueError(f"the bundle {member.bundle_digest} is of {own.organ!r}, not of {member.organ!r}")
            if own.backbone_digest != expert_set.backbone_digest:
                raise ValueError(
                    f"the bundle of {member.organ!r} was made for backbone {own.backbone_digest}, "
                    f"and the expert set is for {expert_set.backbone_digest}"
                )
            gate_rows[member.organ] = own.rows
        return cls(expert_set, gate_rows)

    def rows_of(self, organ: str, layer: int) -> torch.Tensor:
        """One organ's rows of one layer: its experts × hidden."""
        return self._by_organ[organ][layer]

    def logits(self, layer: int, x_TD: torch.Tensor) -> torch.Tensor:
        """What a layer's gates give to the experts of all organs, in the set's order.

        Also where only one organ's experts are chosen from: a product of so few columns takes as long for one organ.

        Args:
            layer: from 0.
            x_TD: tokens × hidden, after the post-attention norm, in the rows' dtype.

        Returns:
            tokens × experts, in x's dtype; `expert_range` says which are an organ's.
        """
        return self._products[layer](x_TD)

    def warm_up(self) -> None:
        """Makes ready for every number of tokens, so that no step stops to compile; see `GateProduct.warm_up`."""
        self._products[0].warm_up()

    def expert_range(self, organ: str) -> tuple[int, int]:
        """Which columns of the logits are an organ's: [start, end)."""
        return self._ranges[organ]

    def num_experts(self, organ: str) -> int:
        """How many experts an organ has."""
        start, end = self._ranges[organ]
        return end - start
