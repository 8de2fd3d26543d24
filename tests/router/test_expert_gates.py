from pathlib import Path

import pytest
import torch

from experts.registry import Registry
from router.expert_gates import BundleGates, ExpertGates
from router.expert_set import ExpertSet, ExpertSetMember, Routing
from router.organ_gate import OrganProfile
from tests.split_golden import split_golden


def gates(organ: str, num_experts: int = 4, layers: int = 2, hidden: int = 8, backbone: str = "b") -> BundleGates:
    rows = tuple(torch.randn(num_experts, hidden) for _ in range(layers))
    return BundleGates(organ, "1.0.0", backbone, rows, OrganProfile(organ))


def expert_set(*organs: str, routing: Routing = "organs") -> ExpertSet:
    members = tuple(ExpertSetMember(organ=organ, bundle_digest=organ) for organ in organs)
    return ExpertSet(backbone_digest="b", routing=routing, members=members)


def test_sets_share_the_rows_of_their_bundles() -> None:
    parts = {"liver": gates("liver"), "heart": gates("heart", 3)}
    one, other = ExpertGates.of(expert_set("liver"), parts), ExpertGates.of(expert_set("heart", "liver"), parts)
    assert one.rows_of("liver", 1) is other.rows_of("liver", 1) is parts["liver"].rows[1]
    assert [other.expert_range(organ) for organ in ("heart", "liver")] == [(0, 3), (3, 7)]


def test_a_flat_set_has_one_gate_in_the_order_of_its_organs() -> None:
    parts = {"liver": gates("liver", 2), "heart": gates("heart", 3)}
    flat = ExpertGates.of(expert_set("heart", "liver", routing="flat"), parts)
    assert torch.equal(flat.flat_rows(0), torch.cat([parts["heart"].rows[0], parts["liver"].rows[0]]))


@pytest.mark.parametrize(
    ("parts", "text"),
    [
        ({"liver": gates("liver")}, "the bundle of 'heart', heart, was not given"),
        ({"liver": gates("liver"), "heart": gates("liver")}, "is of 'liver', not of 'heart'"),
        ({"liver": gates("liver"), "heart": gates("heart", backbone="c")}, "made for backbone c"),
        ({"liver": gates("liver"), "heart": gates("heart", layers=3)}, "differ in"),
        ({"liver": gates("liver"), "heart": gates("heart", hidden=4)}, "differ in"),
    ],
)
def test_what_does_not_fit_is_refused(parts: dict[str, BundleGates], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        ExpertGates.of(expert_set("liver", "heart"), parts)


def test_what_is_read_of_a_bundle_outlives_its_files(golden_dir: Path, tmp_path: Path) -> None:
    split = split_golden(
        golden_dir / "base" / "checkpoint",
        tmp_path,
        {"liver": (2, 0)},
        "organs",
        synonyms={"liver": ("hepatic",)},
        prototypes={"liver": torch.arange(64.0)},
    )
    bundle = Registry(split.registry).open(split.expert_set.bundle_digest("liver"))
    layers = int(str(split.config["num_hidden_layers"]))
    with pytest.raises(ValueError, match=f"has {layers} layers and the backbone {layers + 1}"):
        BundleGates.read(bundle, num_layers=layers + 1, dtype=torch.float32)
    read = BundleGates.read(bundle, num_layers=layers, dtype=torch.bfloat16)
    for path in bundle.locations.values():
        path.unlink()
    assert (read.organ, read.version, read.profile.synonyms) == ("liver", "1.0.0", ("hepatic",))
    assert read.profile.prototype_D is not None
    assert read.profile.prototype_D.tolist() == list(range(64))
    for layer, rows in enumerate(read.rows):
        released = split.tensors[f"model.layers.{layer}.moe.gate.weight"][[2, 0]]
        assert torch.equal(rows, released.to(torch.bfloat16))
