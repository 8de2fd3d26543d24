"""Every kernel of ours computes a plain model's experts through transformers' interface."""

import copy

import pytest
import torch
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from echovlm_ray.model import expert_kernels
from echovlm_ray.model.modeling import EchoVLMForConditionalGeneration
from experts.kernels.base import PreparedExperts
from experts.kernels.registry import get_kernel, kernel_names
from tests.model.support import TEXT, logits_of, small_model

TRAINABLE = ("reference", "torch_grouped")


def usable(name: str) -> bool:
    # A build of torch for CUDA brings Triton along, with or without a GPU.
    if name.startswith(("megablocks_", "triton_")) and not torch.cuda.is_available():
        return False
    try:
        get_kernel(name)
    except ValueError:
        return False
    return True


KERNELS = [pytest.param(n, marks=() if usable(n) else pytest.mark.skip(reason="not here")) for n in kernel_names()]


@pytest.fixture
def model() -> EchoVLMForConditionalGeneration:
    return small_model()


def test_all_are_registered_and_none_of_transformers_is_hidden() -> None:
    assert {*kernel_names(), "grouped_mm", "batched_mm"} <= set(ALL_EXPERTS_FUNCTIONS)
    assert ALL_EXPERTS_FUNCTIONS["grouped_mm"].__module__ == "transformers.integrations.moe"


@pytest.mark.parametrize("name", KERNELS)
def test_the_model_computes_the_same_with_every_kernel(model: EchoVLMForConditionalGeneration, name: str) -> None:
    expected = logits_of(model, **TEXT)
    model.set_experts_implementation(name)
    torch.testing.assert_close(logits_of(model, **TEXT), expected, rtol=0, atol=1e-4)


def test_prepared_weights_are_kept_until_the_weights_change(
    model: EchoVLMForConditionalGeneration, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[nn.Module] = []
    load = expert_kernels._load

    def counted(module: nn.Module, name: str) -> PreparedExperts:
        loads.append(module)
        return load(module, name)

    monkeypatch.setattr(expert_kernels, "_load", counted)
    model.set_experts_implementation("cpu_packed")
    layers = model.config.text_config.num_hidden_layers
    before = logits_of(model, **TEXT)
    assert torch.equal(logits_of(model, **TEXT), before)
    assert len(loads) == layers
    changed = model.model.language_model.layers[0].moe.experts
    with torch.no_grad():
        changed.down_proj.mul_(2.0)
    after = logits_of(model, **TEXT)
    assert loads[layers:] == [changed]
    assert not torch.allclose(after, before)
    model.set_experts_implementation("eager")
    torch.testing.assert_close(logits_of(model, **TEXT), after, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", TRAINABLE)
def test_training_goes_through_kernels_that_have_gradients(model: EchoVLMForConditionalGeneration, name: str) -> None:
    other = copy.deepcopy(model)
    other.set_experts_implementation(name)
    for each in (model, other):
        each(**TEXT, labels=TEXT["input_ids"]).loss.backward()
    for (path, expected), (_, found) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        if expected.grad is not None:
            torch.testing.assert_close(found.grad, expected.grad, rtol=1e-3, atol=1e-5, msg=path)


def test_training_without_gradients_is_refused(model: EchoVLMForConditionalGeneration) -> None:
    model.set_experts_implementation("cpu_packed")
    with pytest.raises(ValueError, match="gradients"):
        model(**TEXT, labels=TEXT["input_ids"])
