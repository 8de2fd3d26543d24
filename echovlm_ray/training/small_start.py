"""Configuration, tokenizer and processor for training a small model from random weights."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from echovlm_ray.checkpoint.atomic import new_folder
from echovlm_ray.checkpoint.demo_tokenizer import special_token_ids, train_tokenizer, write_text_files
from echovlm_ray.data.phantom.catalogue import all_classes
from echovlm_ray.data.phantom.phantom import attributes_at
from echovlm_ray.data.phantom.records import records
from echovlm_ray.tasks import phantom_tasks
from echovlm_ray.training.recipe import Recipe, UpcyclingSection
from echovlm_ray.training.start import Start

# Every phantom is this large, and other pictures are scaled to about as many pixels.
_PHANTOM_TOKENS = 64
_PHANTOM_VOCABULARY = 2000
# Phantoms of each class whose records the tokenizer reads; enough to see every word often.
_PHANTOMS_EACH = 40


def write_small_start(folder: Path, recipe: Recipe) -> Start:
    """Makes the folder of a fresh start.

    Where the recipe draws phantoms the tokenizer knows their words and pictures have their size; else both are general.

    Raises:
        InvalidCheckpointError: the folder is there already.
    """
    with new_folder(folder) as partial:
        if recipe.data.phantoms is None:
            tokenizer = train_tokenizer()
            write_text_files(partial, tokenizer)
        else:
            tokenizer = train_tokenizer(_phantom_texts(), vocab_size=_PHANTOM_VOCABULARY)
            write_text_files(partial, tokenizer, visual_tokens=(_PHANTOM_TOKENS, _PHANTOM_TOKENS))
        config = small_config(tokenizer.get_vocab_size(), special_token_ids(tokenizer), recipe.upcycling)
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return Start(kind="fresh", folder=folder)


def small_config(vocab_size: int, special_ids: dict[str, int], sizes: UpcyclingSection) -> dict[str, Any]:
    """config.json, in the released layout, of the smallest model that is known to learn phantoms: 4 million parameters.

    Args:
        vocab_size: how many tokens the tokenizer has.
        special_ids: the ids of the special tokens.
        sizes: how many experts, and how large.
    """
    return {
        "architectures": ["Qwen2VLMOEForConditionalGeneration"],
        "attention_dropout": 0.0,
        "bos_token_id": special_ids["<|endoftext|>"],
        "eos_token_id": special_ids["<|im_end|>"],
        "hidden_act": "silu",
        "hidden_size": 192,
        "image_token_id": special_ids["<|image_pad|>"],
        "initializer_range": 0.02,
        "intermediate_size": 384,
        "max_position_embeddings": 32768,
        "max_window_layers": 4,
        "model_type": "qwen2_vl",
        "moe_intermediate_size": sizes.expert_size,
        "norm_topk_prob": False,
        "num_attention_heads": 6,
        "num_experts": sizes.num_experts,
        "num_experts_per_tok": sizes.num_experts_per_tok,
        "num_hidden_layers": 4,
        "num_key_value_heads": 2,
        "output_router_logits": False,
        "pad_token_id": special_ids["<|endoftext|>"],
        "rms_norm_eps": 1e-06,
        "rope_scaling": {"mrope_section": [4, 6, 6], "rope_type": "default", "type": "default"},
        "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.001,
        "shared_expert_intermediate_size": sizes.shared_expert_size,
        "sliding_window": 32768,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "use_cache": True,
        "use_sliding_window": False,
        "video_token_id": special_ids["<|video_pad|>"],
        "vision_config": {
            "depth": 4,
            "embed_dim": 128,
            "hidden_size": 192,
            "model_type": "qwen2_vl",
            "num_heads": 4,
        },
        "vision_end_token_id": special_ids["<|vision_end|>"],
        "vision_start_token_id": special_ids["<|vision_start|>"],
        "vocab_size": vocab_size,
    }


def _phantom_texts() -> Iterator[str]:
    for index in range(_PHANTOMS_EACH * len(all_classes())):
        for record in records(attributes_at(0, index), 0, index, path="-", tasks=phantom_tasks()):
            yield from (turn["value"] for turn in record["conversations"])
