"""The loss: micro-batches add up, padding does not count, gates stay in float32, and every gate keeps its gradient."""

from pathlib import Path

import pytest
import torch

from echovlm_ray.model.experts import EchoVLMTokenGate
from echovlm_ray.model.load_balancing import load_balancing_loss
from echovlm_ray.model.modeling import EchoVLMForConditionalGeneration
from echovlm_ray.training.balancing import RoutingCounts, sequence_balancing_loss
from echovlm_ray.training.objective import StepTotals, TrainingObjective
from tests.training.support import collator_of, encoded, tiny_model


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
    collator = collator_of(start)
    whole = collator(examples)
    loss = objective(**whole)["loss"]
    loss.backward()
    expected = gradients(objective)
    totals = StepTotals(float(whole["target_weights"].sum()), 4)
    parts = [objective(**collator([example]), totals=totals)["loss"] for example in examples]
    for part in parts:
        part.backward()
    torch.testing.assert_close(sum(parts), loss)
    found = gradients(objective)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=name)


def test_the_answers_loss_is_what_the_model_says_it_is(
    model: EchoVLMForConditionalGeneration, start: Path, records: Path
) -> None:
    batch = collator_of(start)(encoded(start, records)[:3])
    objective = TrainingObjective(model, balancing=0.0)
    # The last target of a row has no place in labels that are shifted afterwards; so one more token is needed.
    longer = {name: torch.nn.functional.pad(batch[name], (0, 1)) for name in ("input_ids", "attention_mask")}
    labels = torch.nn.functional.pad(batch["targets"], (1, 0), value=-100)
    longer |= {name: batch[name] for name in ("pixel_values", "image_grid_thw")}
    expected = model(**longer, labels=labels).loss
    torch.testing.assert_close(objective(**batch)["loss"], expected)


def test_weights_of_targets_are_a_weighted_mean(
    model: EchoVLMForConditionalGeneration, start: Path, records: Path
) -> None:
    batch = collator_of(start)(encoded(start, records)[:2])
    objective = TrainingObjective(model, balancing=0.0)
    batch["target_weights"] = batch["target_weights"] * torch.tensor([[1.0], [3.0]])
    alone = [objective(**collator_of(start)([each]))["loss"] for each in encoded(start, records)[:2]]
    counts = (batch["targets"] != -100).sum(dim=1)
    expected = (counts[0] * alone[0] + 3 * counts[1] * alone[1]) / (counts[0] + 3 * counts[1])
    torch.testing.assert_close(objective(**batch)["loss"], expected)


def test_padding_does_not_count_for_the_balance() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 4, generator=generator)
    padding = torch.tensor([[50.0, 0, 0, 0]] * 3)
    mask = torch.tensor([[1] * 5, [1, 1, 0, 0, 0]])
    padded = torch.cat([logits, logits[:2], padding])
    alone = sequence_balancing_loss([logits], 2, torch.ones(1, 5)) + sequence_balancing_loss(
        [logits[:2]], 2, torch.ones(1, 2)
    )
    torch.testing.assert_close(sequence_balancing_loss([padded], 2, mask), alone)
    counts, expected = RoutingCounts(), RoutingCounts()
    counts.add([padded], 2, mask)
    expected.add([torch.cat([logits, logits[:2]])], 2, torch.ones(1, 7))
    assert counts.take() == expected.take()


def test_of_one_sequence_and_layer_it_is_the_known_loss() -> None:
    logits = torch.randn(9, 4, generator=torch.Generator().manual_seed(1))
    found = sequence_balancing_loss([logits], 2, torch.ones(1, 9))
    torch.testing.assert_close(found, load_balancing_loss([logits], 2))


def test_counts_say_load_entropy_and_dead_experts() -> None:
    counts = RoutingCounts()
    even = torch.zeros(4, 4)
    skewed = torch.tensor([[9.0, 8.0, 0.0, 0.0]] * 4)
    counts.add([even + torch.eye(4) * 1e-6, skewed], 2, torch.ones(1, 4))
    numbers = counts.take()
    assert [numbers[f"load/layer_1/expert_{expert}"] for expert in range(4)] == [0.5, 0.5, 0, 0]
    assert numbers["dead_experts"] == 2
    assert numbers["gate_entropy/layer_0"] == pytest.approx(1.0, abs=1e-5)
    assert numbers["gate_entropy/layer_1"] < 0.5
    assert counts.take() == {}


def test_gates_are_float32_under_autocast(model: EchoVLMForConditionalGeneration, start: Path, records: Path) -> None:
    batch = collator_of(start)(encoded(start, records)[:2])
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
    batch = collator_of(start)(encoded(start, records)[:2])
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
    batch = collator_of(start)(encoded(start, records)[:2])
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
    batch = collator_of(start)([encoded(start, records)[3]])
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
