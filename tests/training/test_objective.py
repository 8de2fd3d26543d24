"""The loss: micro-batches add up, padding does not count, gates stay in float32, and every gate keeps its gradient."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from echovlm_ray.model.experts import EchoVLMTokenGate
from echovlm_ray.model.load_balancing import load_balancing_loss
from echovlm_ray.model.modeling import EchoVLMForConditionalGeneration
from echovlm_ray.training import packed_attention
from echovlm_ray.training.balancing import RoutingCounts, sequence_balancing_loss
from echovlm_ray.training.batches import collate
from echovlm_ray.training.encode import IGNORED, EncodedExample
from echovlm_ray.training.objective import StepTotals, TrainingObjective
from tests.training.support import encoded, tiny_model


@pytest.fixture
def model(start: Path) -> EchoVLMForConditionalGeneration:
    model = tiny_model(start)
    model.train()
    return model


def gradients(objective: TrainingObjective) -> dict[str, torch.Tensor]:
    found = {name: value.grad.clone() for name, value in objective.named_parameters() if value.grad is not None}
    objective.zero_grad()
    return found


def test_four_micro_batches_of_one_have_the_gradients_of_one_of_four(
    model: EchoVLMForConditionalGeneration, start: Path, records: Path
) -> None:
    # Of different lengths, one of them without a picture.
    examples = encoded(start, records)[:4]
    objective = TrainingObjective(model, balancing=0.5)
    whole = collate(examples)
    loss = objective(**whole)["loss"]
    loss.backward()
    expected = gradients(objective)
    totals = StepTotals(float(whole["target_weights"].sum()), 4)
    parts = [objective(**collate([example]), totals=totals)["loss"] for example in examples]
    for part in parts:
        part.backward()
    torch.testing.assert_close(sum(parts), loss)
    found = gradients(objective)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=name)


def padded(examples: list[EncodedExample]) -> dict[str, torch.Tensor]:
    """The same examples as rows that are padded on the right, as transformers takes them."""
    # One token more than is read, for labels are shifted by the model.
    length = max(len(each) for each in examples) + 1
    rows = {name: torch.zeros(len(examples), length, dtype=torch.int64) for name in ("input_ids", "attention_mask")}
    labels = torch.full((len(examples), length), IGNORED)
    for row, each in enumerate(examples):
        rows["input_ids"][row, : len(each)] = each.input_ids_T
        rows["attention_mask"][row, : len(each)] = 1
        labels[row, 1 : len(each) + 1] = each.target_T
    pictures = collate(examples)
    return {**rows, "labels": labels, **{name: pictures[name] for name in ("pixel_values", "image_grid_thw")}}


def test_the_answers_loss_is_what_the_released_arithmetic_says_of_padded_rows(start: Path, records: Path) -> None:
    examples = encoded(start, records)[:4]
    model = tiny_model(start)
    expected = model(**padded(examples)).loss
    found = TrainingObjective(model, balancing=0.0)(**collate(examples))["loss"]
    torch.testing.assert_close(found, expected)


def test_a_sliding_window_is_kept(start: Path, records: Path) -> None:
    examples = encoded(start, records)[:2]
    losses = []
    for window in (6, 5000):
        model = tiny_model(start)
        for layer in model.model.language_model.layers:
            layer.self_attn.sliding_window = window
        losses.append(TrainingObjective(model, balancing=0.0)(**collate(examples))["loss"])
    whole = TrainingObjective(tiny_model(start), balancing=0.0)(**collate(examples))["loss"]
    torch.testing.assert_close(losses[1], whole)
    assert (losses[0] - losses[1]).abs().item() > 1e-4


def test_weights_of_targets_are_a_weighted_mean(
    model: EchoVLMForConditionalGeneration, start: Path, records: Path
) -> None:
    examples = encoded(start, records)[:2]
    objective = TrainingObjective(model, balancing=0.0)
    alone = [objective(**collate([each]))["loss"] for each in examples]
    counts = [int((each.target_T != IGNORED).sum()) for each in examples]
    heavier = replace(examples[1], weight_T=examples[1].weight_T * 3)
    expected = (counts[0] * alone[0] + 3 * counts[1] * alone[1]) / (counts[0] + 3 * counts[1])
    torch.testing.assert_close(objective(**collate([examples[0], heavier]))["loss"], expected)


def test_each_sequence_is_balanced_by_itself() -> None:
    logits = torch.randn(7, 4, generator=torch.Generator().manual_seed(0))
    together = sequence_balancing_loss([logits], 2, torch.tensor([5, 2]))
    alone = sequence_balancing_loss([logits[:5]], 2, torch.tensor([5]))
    torch.testing.assert_close(together, alone + sequence_balancing_loss([logits[5:]], 2, torch.tensor([2])))


def test_of_one_sequence_and_layer_it_is_the_known_loss() -> None:
    logits = torch.randn(9, 4, generator=torch.Generator().manual_seed(1))
    found = sequence_balancing_loss([logits], 2, torch.tensor([9]))
    torch.testing.assert_close(found, load_balancing_loss([logits], 2))


def test_counts_say_load_entropy_and_dead_experts() -> None:
    counts = RoutingCounts()
    even = torch.zeros(4, 4)
    skewed = torch.tensor([[9.0, 8.0, 0.0, 0.0]] * 4)
    counts.add([even + torch.eye(4) * 1e-6, skewed], 2)
    numbers = counts.take()
    assert [numbers[f"load/layer_1/expert_{expert}"] for expert in range(4)] == [0.5, 0.5, 0, 0]
    assert numbers["dead_experts"] == 2
    assert numbers["gate_entropy/layer_0"] == pytest.approx(1.0, abs=1e-5)
    assert numbers["gate_entropy/layer_1"] < 0.5
    assert counts.take() == {}


def test_gates_are_float32_under_autocast(model: EchoVLMForConditionalGeneration, start: Path, records: Path) -> None:
    batch = collate(encoded(start, records)[:2])
    seen: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    gates = [module for module in model.modules() if isinstance(module, EchoVLMTokenGate)]
    handles = [
        gate.register_forward_hook(lambda gate, args, output: seen.append((gate.weight, args[0], output[0])))
        for gate in gates
    ]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        TrainingObjective(model, balancing=0.1)(**batch)
    for handle in handles:
        handle.remove()
    assert len(seen) == len(gates)
    for weight, x_TD, logits_TE in seen:
        assert logits_TE.dtype == torch.float32
        assert torch.equal(logits_TE, torch.nn.functional.linear(x_TD.float(), weight))


@pytest.mark.parametrize("autocast", [False, True])
def test_checkpointed_activations_leave_all_gradients_alone(start: Path, records: Path, autocast: bool) -> None:
    batch = collate(encoded(start, records)[:2])
    found = []
    for checkpointing in (False, True):
        model = tiny_model(start).train()
        if checkpointing:
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        objective = TrainingObjective(model, balancing=1.0)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            outputs = objective(**batch)
        outputs["loss"].backward()
        found.append(gradients(objective))
    plain, checkpointed = found
    assert plain.keys() == checkpointed.keys()
    for name, value in plain.items():
        torch.testing.assert_close(checkpointed[name], value, msg=name)


def test_the_balancing_loss_alone_moves_the_gates_under_checkpointing(start: Path, records: Path) -> None:
    batch = collate(encoded(start, records)[:2])
    model = tiny_model(start).train()
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    objective = TrainingObjective(model, balancing=1.0)
    batch["target_weights"] = torch.zeros_like(batch["target_weights"])
    objective(**batch, totals=StepTotals(1.0, 2))["loss"].backward()
    for name, gradient in gradients(objective).items():
        if ".moe.gate." in name:
            assert gradient.abs().max() > 0, name


def test_without_pictures_the_vision_tower_has_gradients_of_zero(
    model: EchoVLMForConditionalGeneration, start: Path, records: Path
) -> None:
    objective = TrainingObjective(model, balancing=0.1)
    batch = collate([encoded(start, records)[3]])
    assert "pixel_values" not in batch
    objective(**batch)["loss"].backward()
    found = gradients(objective)
    assert found.keys() == {name for name, _ in objective.named_parameters()}
    assert all(not value.any() for name, value in found.items() if ".visual." in name)


def test_the_state_is_what_is_trained(model: EchoVLMForConditionalGeneration) -> None:
    for name, value in model.named_parameters():
        value.requires_grad_(".moe.gate." in name)
    objective = TrainingObjective(model, balancing=0.1)
    state = objective.state_dict()
    assert len(state) == 2
    assert all(".moe.gate." in name for name in state)
    objective.load_state_dict({name: torch.zeros_like(value) for name, value in state.items()})
    assert not any(value.any() for value in objective.state_dict().values())
    with pytest.raises(ValueError, match="do not train the same tensors; 1 differ"):
        objective.load_state_dict(dict(list(state.items())[:1]))


@pytest.mark.parametrize("autocast", [False, True])
def test_grouped_products_have_the_gradients_of_the_loop_over_experts(
    start: Path, records: Path, autocast: bool
) -> None:
    batch = collate(encoded(start, records)[:3])
    found = []
    for implementation in ("eager", "torch_grouped"):
        model = tiny_model(start)
        model.set_experts_implementation(implementation)
        objective = TrainingObjective(model, balancing=0.1).train()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = objective(**batch)["loss"]
        loss.backward()
        found.append(gradients(objective))
    loop, grouped = found
    for name, value in loop.items():
        if ".experts." in name or not autocast:
            error = (grouped[name] - value).norm() / value.norm().clamp_min(1e-9)
            assert error < (3e-2 if autocast else 1e-4), name


def test_plain_and_fused_attention_agree(start: Path, records: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = collate(encoded(start, records)[:3])
    found = []
    for plain_tokens in (packed_attention._PLAIN_TOKENS, 0):
        monkeypatch.setattr(packed_attention, "_PLAIN_TOKENS", plain_tokens)
        objective = TrainingObjective(tiny_model(start), balancing=0.1).train()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = objective(**batch)["loss"]
        loss.backward()
        found.append((loss.detach(), gradients(objective)))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-2, atol=1e-2)
    for name, value in found[1][1].items():
        if "self_attn.v_proj.weight" in name or "attn.proj.weight" in name:
            assert (found[0][1][name] - value).norm() < 0.05 * value.norm(), name
