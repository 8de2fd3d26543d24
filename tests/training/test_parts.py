"""What a stage trains, and adapters that come out as they went in."""

from pathlib import Path

import torch

from echovlm_ray.training.batches import collate
from echovlm_ray.training.objective import TrainingObjective
from echovlm_ray.training.parts import merge_adapters, part_of, prepare_stage
from echovlm_ray.training.recipe import PARTS, Stage
from echovlm_ray.training.recipe_file import load_recipe
from tests.training.support import encoded, tiny_model


def learning(model: torch.nn.Module) -> set[str]:
    return {name for name, value in model.named_parameters() if value.requires_grad}


def test_every_tensor_belongs_to_a_part_and_every_part_has_one(start: Path) -> None:
    names = [name for name, _ in tiny_model(start).named_parameters()]
    # The head is tied here.
    assert {part_of(name) for name in (*names, "lm_head.weight")} == set(PARTS)


def test_a_stage_trains_what_it_names(start: Path) -> None:
    model = tiny_model(start)
    prepare_stage(model, Stage(train=("gates", "experts")))
    expected = {
        f"model.language_model.layers.{layer}.moe.{name}"
        for layer in range(2)
        for name in ("gate.weight", "experts.gate_up_proj", "experts.down_proj")
    }
    assert learning(model) == expected


def test_the_papers_stages(start: Path) -> None:
    first, second = load_recipe("paper").stages
    model = tiny_model(start)
    prepare_stage(model, first)
    assert {part_of(name) for name in learning(model)} == {
        "projector",
        "gates",
        "experts",
        "shared_expert",
        "coefficient",
    }
    model = tiny_model(start)
    prepare_stage(model, second)
    adapted = {name for name in learning(model) if "lora_" in name}
    assert {part_of(name) for name in learning(model) - adapted} == {"gates", "experts", "shared_expert", "coefficient"}
    layers = {name.split(".lora_")[0] for name in adapted}
    visual = {f"model.visual.blocks.0.{name}" for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")}
    attention = {f"model.language_model.layers.{layer}.self_attn.{name}_proj" for layer in range(2) for name in "qkvo"}
    assert layers == visual | attention | {"model.visual.merger.mlp.0", "model.visual.merger.mlp.2"}
    assert (second.adapters.rank, second.adapters.alpha) == (8, 16)  # type: ignore[union-attr]
    assert (first.learning_rate, second.learning_rate) == (1e-3, 2e-5)


def test_merged_adapters_compute_what_unmerged_ones_do(start: Path, records: Path) -> None:
    batch = collate(encoded(start, records)[:3])
    model = tiny_model(start)
    before = set(model.state_dict())
    prepare_stage(model, load_recipe("paper").stages[1])
    objective = TrainingObjective(model, balancing=0.1)
    untrained = objective.eval()(**batch)["logits"]
    optimizer = torch.optim.SGD([value for value in model.parameters() if value.requires_grad], lr=1.0)
    objective.train()
    for _ in range(2):
        objective(**batch)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    unmerged = objective.eval()(**batch)["logits"]
    assert not torch.allclose(unmerged, untrained, atol=1e-2)
    merge_adapters(model)
    torch.testing.assert_close(objective(**batch)["logits"], unmerged, rtol=1e-4, atol=1e-4)
    assert set(model.state_dict()) == before
