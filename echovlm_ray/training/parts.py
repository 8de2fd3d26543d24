"""The parameters of each part of a model, and how a stage makes them trainable."""

import re
from collections.abc import Iterator
from typing import Any

from torch import nn

from echovlm_ray.model.modeling import EchoVLMForConditionalGeneration
from echovlm_ray.training.recipe import AdaptedPart, Part, Stage

# By the names of the modules; the first that matches.
_PATTERNS: tuple[tuple[Part, str], ...] = (
    ("projector", r"model\.visual\.merger\."),
    ("vision", r"model\.visual\."),
    ("embeddings", r"model\.language_model\.embed_tokens\."),
    ("head", r"lm_head\."),
    ("gates", r".*\.moe\.gate\."),
    ("experts", r".*\.moe\.experts\."),
    ("shared_expert", r".*\.moe\.shared_expert"),
    ("coefficient", r".*\.coefficient\."),
    ("attention", r".*\.self_attn\."),
    ("dense_mlp", r".*\.mlp\."),
    ("norms", r".*norm\."),
)


def part_of(name: str) -> Part:
    """The part that a tensor of the model belongs to, by its name in the module."""
    found = next((part for part, pattern in _PATTERNS if re.match(pattern, name)), None)
    assert found is not None, f"{name} belongs to no part"
    return found


def prepare_stage(model: EchoVLMForConditionalGeneration, stage: Stage) -> None:
    """Makes a stage's parts learn and freezes the others; puts adapters into the model if the stage has any."""
    if stage.adapters is not None:
        from peft import LoraConfig, inject_adapter_in_model

        targets = list(_linear_names(model, stage.adapters.parts))
        config = LoraConfig(
            r=stage.adapters.rank, lora_alpha=stage.adapters.alpha, target_modules=targets, lora_dropout=0.0
        )
        inject_adapter_in_model(config, model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name or part_of(_plain_name(name)) in stage.train)


def merge_adapters(model: nn.Module) -> None:
    """Merges every adapter into its layer and removes it from the model."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            # PEFT leaves its methods untyped.
            layer: Any = module
            layer.merge(safe_merge=True)
            model.set_submodule(name, layer.get_base_layer())
    if hasattr(model, "peft_config"):
        del model.peft_config


def _linear_names(model: nn.Module, parts: tuple[AdaptedPart, ...]) -> Iterator[str]:
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and part_of(f"{name}.weight") in parts:
            yield name


def _plain_name(name: str) -> str:
    return name.replace(".base_layer.", ".")
