from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from experts.registry.registry import Registry
from router.gating.expert_gates import BundleGates, ExpertGates
from router.gating.expert_set import ExpertSet, ExpertSetMember, Routing
from router.gating.organ_gate import OrganProfile
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
    assert torch.equal(flat.logits(0, torch.eye(8)), torch.cat([parts["heart"].rows[0], parts["liver"].rows[0]]).T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@settings(max_examples=40, deadline=None)
@given(
    hidden=st.sampled_from((8, 64, 100, 768, 1536, 3584)),
    sizes=st.lists(st.integers(1, 24), min_size=1, max_size=9),
    rows=st.integers(1, 70),
    data=st.data(),
)
def test_logits_have_the_same_bits_whoever_is_computed_with_them(
    dtype: torch.dtype, hidden: int, sizes: list[int], rows: int, data: st.DataObject
) -> None:
    generator = torch.Generator().manual_seed(hidden + rows)
    gate_ED = [torch.randn(size, hidden, generator=generator).to(dtype) for size in sizes]
    x_TD = torch.randn(rows, hidden, generator=generator).to(dtype)
    organs = [f"organ{place}" for place in range(len(sizes))]
    all_of_them = ExpertGates(expert_set(*organs), {name: (gate,) for name, gate in zip(organs, gate_ED, strict=True)})
    organ = data.draw(st.sampled_from(organs))
    alone = ExpertGates(expert_set(organ), {organ: (gate_ED[organs.index(organ)],)})
    first = data.draw(st.integers(0, rows - 1))
    end = data.draw(st.integers(first + 1, rows))
    start_column, end_column = all_of_them.expert_range(organ)
    together = all_of_them.logits(0, x_TD)[first:end, start_column:end_column]
    assert torch.equal(alone.logits(0, x_TD[first:end]), together)


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
