"""Prepares a backbone for the engine: paged attention, and fewer products and operators in every layer."""

import logging

from echovlm_ray.engine.attention import PagedSelfAttention
from echovlm_ray.engine.compiled_layers import CompiledAttention, CompiledDensePath, CompiledRMSNorm
from echovlm_ray.engine.dense_path import FusedDensePath
from echovlm_ray.model.decoder_layer import EchoVLMDecoderLayer
from echovlm_ray.model.text_model import EchoVLMTextModel

logger = logging.getLogger(__name__)


def fuse_layers(model: EchoVLMTextModel, *, compiled: bool) -> None:
    """Replaces attention, norms, dense MLP and shared expert of every layer. The model is then for inference only.

    Args:
        model: the model with the layers.
        compiled: whether norms, activations and the final sum are computed by `echovlm_ray.engine.compiled`.

    Raises:
        ValueError: the activation is not silu, the only one in checkpoints of this model.
    """
    if model.config.hidden_act != "silu":
        raise ValueError(f"hidden_act is {model.config.hidden_act!r}; the engine computes only silu")
    for layer in model.layers:
        assert isinstance(layer, EchoVLMDecoderLayer)
        # Replaced by name, because it is not a Qwen2VLAttention.
        layer.set_submodule("self_attn", PagedSelfAttention(layer.self_attn))
        if compiled:
            layer.attention_override = CompiledAttention(layer)
        layer.dense_path_override = (CompiledDensePath if compiled else FusedDensePath)(layer)
        del layer.mlp, layer.coefficient, layer.moe.shared_expert, layer.moe.shared_expert_gate
    if compiled:
        model.set_submodule("norm", CompiledRMSNorm(model.norm))
    logger.info("%d layers are fused for the engine", len(model.layers))
