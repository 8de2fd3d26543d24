"""P1 through the plain model: every golden case, intermediates in the order in which they are computed."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

from echovlm_ray import EchoVLMForConditionalGeneration
from tests.model.support import ALL_CASES, FullCases, GoldenCase

Models = dict[str, EchoVLMForConditionalGeneration]
# Their second row continues from a pad token: only logits are compared.
NOT_GENERATED = {"batch_rightpad"}
GENERATED = [key for key in ALL_CASES if key[1] not in NOT_GENERATED]


@contextmanager
def captured(model: EchoVLMForConditionalGeneration) -> Iterator[dict[str, torch.Tensor]]:
    """Collects intermediates under the golden files' names, in the order of computation."""
    seen: dict[str, torch.Tensor] = {}
    handles = []

    def watch(module: nn.Module, name: str, pick: Callable[[Any], torch.Tensor] = lambda output: output) -> None:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            seen[name] = pick(output)

        handles.append(module.register_forward_hook(hook))

    def watch_start(_module: nn.Module, _args: Any, kwargs: dict[str, torch.Tensor]) -> None:
        # Row 0 is the plain index when there are four.
        seen["position_ids"] = kwargs["position_ids"][-3:]
        seen["inputs_embeds"] = kwargs["inputs_embeds"]

    visual, language_model = model.model.visual, model.model.language_model
    watch(visual.patch_embed, "vis.patch_embed")
    for number, block in enumerate(visual.blocks):
        watch(block, f"vis.block.{number}")
    watch(visual.merger, "vis.merger")
    handles.append(language_model.register_forward_pre_hook(watch_start, with_kwargs=True))
    for number, layer in enumerate(language_model.layers):
        name = f"layer.{number}"
        watch(layer.self_attn, f"{name}.attn_out", lambda output: output[0])
        watch(layer.post_attention_layernorm, f"{name}.ffn_in")
        watch(layer.moe.gate, f"{name}.router_logits", lambda output: output[0])
        watch(layer.moe.gate, f"{name}.topk_weights", lambda output: output[1])
        watch(layer.moe.gate, f"{name}.topk_index", lambda output: output[2])
        watch(layer.moe.experts, f"{name}.routed")
        watch(layer.mlp, f"{name}.mlp_out")
        watch(layer.moe.shared_expert_gate, f"{name}.shared_gate_logit")
        watch(layer.moe.shared_expert, f"{name}.shared")
        watch(layer.coefficient, f"{name}.coef_logits")
        watch(layer, f"{name}.output")
    watch(language_model.norm, "lm.final_norm")
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def completed(seen: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Adds what no module returns by itself, behind what it is computed from."""
    whole: dict[str, torch.Tensor] = {}
    for name, value in seen.items():
        layer = name.rpartition(".")[0]
        match name.rpartition(".")[2]:
            case "shared":
                # The files hold the shared expert's own output, before its gate.
                whole[f"{layer}.shared_out"] = value
                moe = seen[f"{layer}.routed"] + seen[f"{layer}.shared_gate_logit"].sigmoid() * value
                whole[f"{layer}.moe_out"] = moe.view_as(seen[f"{layer}.ffn_in"])
            case "coef_logits":
                whole[name] = value
                whole[f"{layer}.coef_softmax"] = value.softmax(dim=-1)
            case "routed":
                pass
            case _:
                whole[name] = value
    return whole


def compare(case: GoldenCase, name: str, actual: torch.Tensor) -> str | None:
    """What is wrong with an intermediate, where attention_mask is 1."""
    expected = case.tensors[f"mid.{name}"]
    assert actual.shape == expected.shape, f"{name}: {actual.shape} != {expected.shape}"
    mask = case.mask
    if name == "position_ids":
        actual, expected = actual[:, mask], expected[:, mask]
    elif not name.startswith("vis."):
        rows = mask if actual.ndim == 3 else mask.reshape(-1)
        actual, expected = actual[rows], expected[rows]
    if not expected.is_floating_point():
        return None if torch.equal(actual, expected) else f"{name}: {actual.tolist()} != {expected.tolist()}"
    difference = (actual.float() - expected.float()).abs().max().item()
    allowed = case.tolerance(expected)
    return None if difference <= allowed else f"{name}: differs by {difference}, allowed is {allowed}"


@pytest.mark.parametrize(("variant", "name"), ALL_CASES)
def test_forward_matches_the_reference(golden_models: Models, golden_cases: FullCases, variant: str, name: str) -> None:
    case, model = golden_cases[variant, name], golden_models[variant]
    with captured(model) as seen, torch.inference_mode():
        outputs = model(**case.inputs, output_router_logits=True)
    names = {key.removeprefix("mid.") for key in case.tensors if key.startswith("mid.")}
    whole = completed(seen)
    checked = set()
    for key, value in whole.items():
        if key in names:
            checked.add(key)
            wrong = compare(case, key, value)
            assert wrong is None, f"{variant}/{name}, first difference: {wrong}"
    # A layer's input is the output of the one before it, or inputs_embeds.
    assert names - checked <= {f"layer.{layer}.input" for layer in range(4)}
    for layer, logits in enumerate(outputs.router_logits):
        rows = case.mask.reshape(-1)
        expected = case.tensors[f"out.router_logits.{layer}"][rows]
        torch.testing.assert_close(logits[rows].float(), expected.float(), rtol=0, atol=case.tolerance(expected))
    assert torch.equal(outputs.rope_deltas, case.tensors["out.rope_deltas"])
    expected = case.tensors["out.logits"][case.mask]
    torch.testing.assert_close(
        outputs.logits[case.mask].float(), expected.float(), rtol=0, atol=case.tolerance(expected)
    )


@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no-cache"])
@pytest.mark.parametrize(("variant", "name"), GENERATED)
def test_generate_matches_the_reference(
    golden_models: Models, golden_cases: FullCases, variant: str, name: str, use_cache: bool
) -> None:
    case, model = golden_cases[variant, name], golden_models[variant]
    result = model.generate(
        **case.inputs,
        max_new_tokens=16,
        do_sample=False,
        use_cache=use_cache,
        eos_token_id=case.eos,
        output_logits=True,
        return_dict_in_generate=True,
    )
    expected = case.tensors["gen.sequences" if use_cache else "gen.sequences_nocache"]
    start = case.inputs["input_ids"].shape[1]
    assert result.sequences.shape == expected.shape
    steps = torch.stack(result.logits, dim=1).float()
    for row, step_logits in enumerate(case.tensors["gen.step_logits"].float()):
        ended = False
        for step, chosen in enumerate(expected[row, start:].tolist()):
            allowed = case.tolerance(step_logits)
            if not ended:
                assert (steps[row, step] - step_logits[step]).abs().max() <= allowed, f"row {row}, step {step}: logits"
                first, second = step_logits[step].topk(2).values.tolist()
                if variant == "bf16" and first - second <= allowed:
                    break
            assert result.sequences[row, start + step] == chosen, f"row {row}, step {step}"
            ended = ended or chosen == case.eos
