"""The traps of the reference that are not repeated, and the seams of the model."""

from typing import Any

import pytest
import torch
from torch import nn

from echovlm_ray import EchoVLMForConditionalGeneration
from echovlm_ray.model.experts import EchoVLMSparseMoe
from echovlm_ray.model.positions import PlaceholderMismatchError
from experts.kernels.base import ExpertWeights
from experts.kernels.registry import get_kernel
from router.gating.token_gate import route_tokens
from tests.model.support import IMAGE, START, TEXT, image_prompt, logits_of, small_model


@pytest.fixture(scope="module")
def model() -> EchoVLMForConditionalGeneration:
    return small_model()


def test_no_state_stays_on_the_module_between_calls(model: EchoVLMForConditionalGeneration) -> None:
    other = image_prompt((1, 8, 4))
    fresh = [logits_of(small_model(), **inputs) for inputs in (TEXT, other)]
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    logits_of(model, **image_prompt())
    model.generate(**image_prompt(), max_new_tokens=3, do_sample=False)
    after = {name: set(vars(module)) for name, module in model.named_modules()}
    assert after == before
    assert not hasattr(model.model, "rope_deltas")
    for inputs, expected in zip((TEXT, other), fresh, strict=True):
        assert torch.equal(logits_of(model, **inputs), expected)


def test_generation_computes_the_head_for_the_last_position_only(model: EchoVLMForConditionalGeneration) -> None:
    lengths = []
    handle = model.lm_head.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    try:
        model.generate(**image_prompt(), max_new_tokens=3, do_sample=False)
        model.generate(**image_prompt(), max_new_tokens=2, do_sample=False, use_cache=False)
    finally:
        handle.remove()
    assert lengths == [1] * 5


def test_a_sliding_window_that_is_not_used_is_not_applied() -> None:
    ids = {"input_ids": torch.arange(1, 31)[None]}
    wide = logits_of(small_model(use_sliding_window=False, sliding_window=4096), **ids)
    assert torch.equal(logits_of(small_model(use_sliding_window=False, sliding_window=4), **ids), wide)
    narrow = logits_of(small_model(use_sliding_window=True, sliding_window=4, max_window_layers=0), **ids)
    assert not torch.allclose(narrow, wide)


def test_missing_rope_scaling_is_the_default() -> None:
    inputs = image_prompt()
    assert torch.equal(logits_of(small_model(rope_scaling=None), **inputs), logits_of(small_model(), **inputs))


@pytest.mark.parametrize("generate", [False, True])
@pytest.mark.parametrize("found", [4, 7])
def test_wrong_placeholder_counts_are_named(model: EchoVLMForConditionalGeneration, found: int, generate: bool) -> None:
    inputs = image_prompt()
    inputs["input_ids"] = torch.tensor([[5, START, *[IMAGE] * found, 6]])
    with pytest.raises(PlaceholderMismatchError, match=rf"{found} image placeholder tokens.*fill 6"):
        model.generate(**inputs, max_new_tokens=1) if generate else model(**inputs)


def test_placeholders_without_images_are_refused(model: EchoVLMForConditionalGeneration) -> None:
    with pytest.raises(PlaceholderMismatchError, match=r"6 image placeholder tokens.*the 0 image"):
        model(input_ids=image_prompt()["input_ids"])


def test_a_cache_is_continued_with_the_deltas_that_came_with_it(model: EchoVLMForConditionalGeneration) -> None:
    inputs = image_prompt()
    whole = {**inputs, "input_ids": torch.cat([inputs["input_ids"], torch.tensor([[21, 22, 23]])], dim=1)}
    expected = logits_of(model, **whole)[:, -3:]
    with torch.inference_mode():
        first = model(**inputs, use_cache=True)
        with pytest.raises(ValueError, match="rope_deltas"):
            model(input_ids=torch.tensor([[21]]), past_key_values=first.past_key_values)
        rest = model(
            input_ids=torch.tensor([[21, 22, 23]]), past_key_values=first.past_key_values, rope_deltas=first.rope_deltas
        )
    torch.testing.assert_close(rest.logits, expected, rtol=0, atol=1e-4)


def test_a_prompt_may_end_in_an_image(model: EchoVLMForConditionalGeneration) -> None:
    inputs = image_prompt((1, 4, 8), tail=())
    sequence = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    ids = inputs["input_ids"]
    for _ in range(4):
        logits = logits_of(model, **{**inputs, "input_ids": ids})
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(sequence, ids)


def test_several_answers_to_one_prompt(model: EchoVLMForConditionalGeneration) -> None:
    inputs = image_prompt()
    alone = model.generate(**inputs, max_new_tokens=5, num_beams=3, do_sample=False)
    beams = model.generate(**inputs, max_new_tokens=5, num_beams=3, num_return_sequences=3, do_sample=False)
    assert torch.equal(beams[:1], alone)
    assert len({tuple(beam.tolist()) for beam in beams}) == 3
    # The score of a beam is what a plain forward pass gives it.
    scored = model.generate(
        **inputs, max_new_tokens=5, num_beams=3, do_sample=False, output_scores=True, return_dict_in_generate=True
    )
    start = inputs["input_ids"].shape[1]
    log_probability = logits_of(model, **{**inputs, "input_ids": alone}).log_softmax(-1)[0, start - 1 : -1]
    chosen = log_probability.gather(1, alone[0, start:, None]).mean()
    torch.testing.assert_close(scored.sequences_scores[0], chosen, rtol=0, atol=1e-4)


def test_token_types_are_not_needed_and_do_no_harm(model: EchoVLMForConditionalGeneration) -> None:
    inputs = image_prompt()
    types = (inputs["input_ids"] == IMAGE).int()
    assert torch.equal(logits_of(model, **inputs, mm_token_type_ids=types), logits_of(model, **inputs))
    assert torch.equal(
        model.generate(**inputs, mm_token_type_ids=types, max_new_tokens=3, do_sample=False),
        model.generate(**inputs, max_new_tokens=3, do_sample=False),
    )


class ElsewhereExperts:
    """The model's own experts, called as an expert group would be; notes the order of events."""

    def __init__(self, layers: list[EchoVLMSparseMoe], events: list[tuple[str, int]]) -> None:
        self.layers, self.events = layers, events

    def begin(self, layer: int, x_TD: torch.Tensor) -> "ElsewhereExperts.Pending":
        self.events.append(("begin", layer))
        moe = self.layers[layer]
        routing = route_tokens(x_TD, moe.gate.weight, 2, False)
        gate_EFD, up_EFD = moe.experts.gate_up_proj.chunk(2, dim=1)
        weights = ExpertWeights(gate_EFD.contiguous(), up_EFD.contiguous(), moe.experts.down_proj)
        prepared = get_kernel("reference").load(weights)
        return self.Pending(self, layer, prepared.forward(x_TD, routing.index_TK.int(), routing.weight_TK))

    class Pending:
        def __init__(self, owner: "ElsewhereExperts", layer: int, output_TD: torch.Tensor) -> None:
            self.owner, self.layer, self.output_TD = owner, layer, output_TD

        def result(self) -> torch.Tensor:
            self.owner.events.append(("result", self.layer))
            return self.output_TD


def test_experts_elsewhere_overlap_and_change_nothing(model: EchoVLMForConditionalGeneration) -> None:
    layers = model.model.language_model.layers
    events: list[tuple[str, int]] = []
    elsewhere = ElsewhereExperts([layer.moe for layer in layers], events)
    handles = []
    for number, layer in enumerate(layers):
        for name, module in (("dense", layer.mlp), ("shared", layer.moe.shared_expert)):

            def note(_module: nn.Module, _args: Any, _output: Any, event: tuple[str, int] = (name, number)) -> None:
                events.append(event)

            handles.append(module.register_forward_hook(note))
    inputs = image_prompt()
    try:
        outputs = logits_of(model, **inputs, routed_experts=elsewhere)
    finally:
        for handle in handles:
            handle.remove()
    order = ["begin", "dense", "shared", "result"]
    assert events == [(event, number) for number in range(len(layers)) for event in order]
    assert torch.equal(outputs, logits_of(model, **inputs))
    with pytest.raises(ValueError, match="without routed_experts"):
        model(**inputs, routed_experts=elsewhere, output_router_logits=True)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_parameter_learns(checkpointing: bool) -> None:
    model = small_model(output_router_logits=True, norm_topk_prob=True).train()
    if checkpointing:
        model.activation_checkpointing_enable()
    inputs = image_prompt(tail=tuple(range(20, 60)))
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    dead = [name for name, value in model.named_parameters() if value.grad is None or not value.grad.abs().max() > 0]
    assert dead == []


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
def test_transformers_experts_functions_agree(model: EchoVLMForConditionalGeneration, implementation: str) -> None:
    inputs = image_prompt()
    expected = logits_of(model, **inputs)
    other = small_model()
    other.set_experts_implementation(implementation)
    torch.testing.assert_close(logits_of(other, **inputs), expected, rtol=0, atol=1e-4)
    assert model.get_experts_implementation()["text_config"] == "eager"


def test_norm_topk_prob_is_honoured() -> None:
    plain, normed = small_model(), small_model(norm_topk_prob=True)
    assert not torch.allclose(logits_of(plain, **TEXT), logits_of(normed, **TEXT))
