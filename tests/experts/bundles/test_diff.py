from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from experts.bundles.bundle import Bundle
from experts.bundles.diff import diff_bundles
from experts.bundles.layout import expert_tensor, gate_tensor
from experts.bundles.writer import derive_bundle, write_bundle
from tests.experts.bad_bundles import change_tensor

MakeBundle = Callable[..., Path]


def test_a_bundle_and_itself(make_bundle: MakeBundle) -> None:
    bundle = Bundle.open(make_bundle())
    found = diff_bundles(bundle, bundle)
    assert found.same_weights
    assert (found.fields, found.removed, found.added, found.unchanged) == ((), (), (), 3)
    assert found.pairs == ((0, 0), (1, 1), (2, 2))
    assert [(layer.experts, layer.gate) for layer in found.layers] == [(0, 0), (0, 0)]


def test_fields(make_bundle: MakeBundle, tmp_path: Path) -> None:
    before = Bundle.open(make_bundle(eval_metrics={"bleu1": 0.2}))
    derive_bundle(
        tmp_path / "after", before, {"version": "1.1.0", "eval_metrics": {"bleu1": 0.3}, "training_data": "more"}
    )
    found = diff_bundles(before, Bundle.open(tmp_path / "after"))
    assert [(change.field, change.before, change.after) for change in found.fields] == [
        ("version", "1.0.0", "1.1.0"),
        ("training_data", None, "more"),
        ("eval_metrics", {"bleu1": 0.2}, {"bleu1": 0.3}),
    ]
    assert found.same_weights


def test_how_far_each_layer_moved(make_bundle: MakeBundle) -> None:
    before, after = make_bundle("before"), make_bundle("after")
    change_tensor("experts.safetensors", expert_tensor(1, 2, "up"), lambda up: up * 3)(after)
    change_tensor("gate.safetensors", gate_tensor(0), lambda gate: gate * 1.5)(after)
    found = diff_bundles(Bundle.open(before), Bundle.open(after))
    assert not found.same_weights
    assert found.unchanged == 2
    assert found.layers[0].experts == 0
    assert found.layers[0].gate == pytest.approx(0.5)
    assert found.layers[1].gate == 0
    tensors = load_file(before / "experts.safetensors")
    of_expert = [tensors[expert_tensor(1, 2, projection)].norm() for projection in ("gate", "up", "down")]
    moved = 2 * of_expert[1]
    assert found.layers[1].most_changed is not None
    expert, change = found.layers[1].most_changed
    assert expert == 2
    assert change == pytest.approx(float(moved / torch.stack(of_expert).norm()), rel=1e-5)
    layer = torch.cat([tensor.flatten() for name, tensor in tensors.items() if name.startswith("layers.1.")])
    assert found.layers[1].experts == pytest.approx(float(moved / layer.norm()), rel=1e-5)


def with_experts(directory: Path, source: Bundle, describe: Any, chosen: list[int]) -> Bundle:
    """A bundle with some of another one's experts, in another order."""
    description = describe(num_experts=len(chosen))

    def tensor(name: str) -> torch.Tensor:
        if ".gate.weight" in name:
            return source.tensor(name)[chosen]
        parts = name.split(".")
        parts[3] = str(chosen[int(parts[3])])
        return source.tensor(".".join(parts))

    write_bundle(directory, description, tensor)
    return Bundle.open(directory)


def test_experts_are_recognised_wherever_they_are(make_bundle: MakeBundle, describe: Any, tmp_path: Path) -> None:
    before = Bundle.open(make_bundle())
    fewer = with_experts(tmp_path / "fewer", before, describe, [2, 1])
    found = diff_bundles(before, fewer)
    assert (found.pairs, found.removed, found.added, found.unchanged) == (((1, 1), (2, 0)), (0,), (), 2)
    assert all(layer.experts == layer.gate == 0 for layer in found.layers)
    assert not found.same_weights
    back = diff_bundles(fewer, before)
    assert (back.pairs, back.removed, back.added, back.unchanged) == (((0, 2), (1, 1)), (), (0,), 2)


def test_experts_that_are_all_new(make_bundle: MakeBundle) -> None:
    before, after = Bundle.open(make_bundle("a")), Bundle.open(make_bundle("b", seed=1, num_experts=5))
    found = diff_bundles(before, after)
    assert (found.pairs, found.removed, found.added, found.unchanged) == (((0, 0), (1, 1), (2, 2)), (), (3, 4), 0)
    # Two independent random matrices are √2 apart.
    assert all(1.2 < layer.experts < 1.6 for layer in found.layers)


def test_sizes_that_differ(make_bundle: MakeBundle) -> None:
    before, after = Bundle.open(make_bundle("a")), Bundle.open(make_bundle("b", intermediate_size=8))
    found = diff_bundles(before, after)
    assert found.incomparable == "intermediate_size is 24 in the first and 8 in the second"
    assert not found.same_weights
    assert [change.field for change in found.fields] == ["intermediate_size"]


def test_other_dtypes_are_compared_by_value(make_bundle: MakeBundle) -> None:
    before, after = Bundle.open(make_bundle("a")), Bundle.open(make_bundle("b", dtype="bfloat16"))
    found = diff_bundles(before, after)
    assert found.unchanged == 0
    assert all(0 < layer.experts < 0.01 for layer in found.layers)
