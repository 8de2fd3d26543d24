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
    """The parts of a bundle that a router needs: gate rows and organ profile, without the experts.

    Attributes:
        version: for display; the digest is the identity.
        rows: the gate rows, one matrix per layer, experts × hidden.
        profile: how the bundle's organ is recognised.
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
        """Copies them from the bundle's files, which may be deleted afterwards.

        Args:
            bundle: the bundle.
            num_layers: decoder layers of the backbone.
            dtype: the backbone's dtype, to which rows are converted.
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
    """The gate matrices of every layer for one expert set. Organs may differ in their number of experts."""

    def __init__(self, expert_set: ExpertSet, gate_rows: Mapping[str, tuple[torch.Tensor, ...]]) -> None:
        """
        Args:
            expert_set: the expert set.
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
        """Reads the gate rows of a set's bundles, without their experts.

        Args:
            expert_set: the set.
            bundles: bundle digest → bundle, for every member.
            num_layers: decoder layers of the backbone.
            dtype: the backbone's dtype, to which rows are converted.
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
        """Builds the gates of a set from the rows of its bundles. All sets share the rows; each has its own products.

        Args:
            expert_set: the set.
            gates: bundle digest → its gate rows, for every member.

        Raises:
            ValueError: as in `from_bundles`, or a bundle belongs to another organ.
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
        """One organ's gate rows of one layer: experts × hidden."""
        return self._by_organ[organ][layer]

    def logits(self, layer: int, x_TD: torch.Tensor) -> torch.Tensor:
        """The logits of the experts of all organs in one layer, in the set's order.

        Computed for all organs even if only one is used: a product with so few columns takes as long for one organ.

        Args:
            layer: from 0.
            x_TD: tokens × hidden, after the post-attention norm, in the rows' dtype.

        Returns:
            tokens × experts, in x's dtype; `expert_range` has the columns of an organ.
        """
        return self._products[layer](x_TD)

    def warm_up(self) -> None:
        """Compiles the products for every number of tokens; see `GateProduct.warm_up`."""
        self._products[0].warm_up()

    def expert_range(self, organ: str) -> tuple[int, int]:
        """The columns of an organ in the logits: [start, end)."""
        return self._ranges[organ]

    def num_experts(self, organ: str) -> int:
        """The number of an organ's experts."""
        start, end = self._ranges[organ]
        return end - start
