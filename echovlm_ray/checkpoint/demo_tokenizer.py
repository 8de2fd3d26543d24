"""The demo's tokenizer and processor files: byte-level BPE with Qwen2-VL's special tokens, trained in seconds."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from echovlm_ray.checkpoint.demo_text import CHINESE, ENGLISH

# In Qwen2-VL's order; their ids follow the learnt pieces.
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
# Pixels per visual token: a patch of 14 and a merge of 2 in both directions.
_PIXELS_PER_TOKEN = 28 * 28
# The paper's limit for an image.
MAX_VISUAL_TOKENS = 196
MODEL_MAX_LENGTH = 32768

# Qwen2's pre-tokenization: contractions, letters with one leading sign, single digits, signs, line ends, blanks.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LARGEST_VOCABULARY = 8000

# ChatML; within a message images come before text, in any order of the caller.
CHAT_TEMPLATE = """\
{%- if messages[0]['role'] != 'system' -%}
<|im_start|>system
You are a helpful assistant.<|im_end|>
{% endif -%}
{%- for message in messages -%}
<|im_start|>{{ message['role'] }}
{% if message['content'] is string -%}
{{ message['content'] }}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}
<|vision_start|><|image_pad|><|vision_end|>
{%- elif part['type'] == 'video' -%}
<|vision_start|><|video_pad|><|vision_end|>
{%- endif -%}
{%- endfor -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'text' -%}
{{ part['text'] }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}
"""


def train_tokenizer(lines: Iterable[str] | None = None, *, vocab_size: int = _LARGEST_VOCABULARY) -> Tokenizer:
    """Trains the tokenizer on a text. Deterministic.

    Args:
        lines: the text; None for the built-in one.
        vocab_size: the most pieces, including the 256 bytes, without special tokens.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=1,
        # All 256 bytes, so that any text can be encoded.
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*ENGLISH.splitlines(), *CHINESE.splitlines()] if lines is None else lines, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return tokenizer


def special_token_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """The ids of the special tokens, by their text."""
    vocabulary = tokenizer.get_vocab()
    return {token: vocabulary[token] for token in SPECIAL_TOKENS}


def write_text_files(directory: Path, tokenizer: Tokenizer, *, visual_tokens: tuple[int, int] | None = None) -> None:
    """Writes the files of tokenizer, image processor, generation and chat template, as Qwen2-VL has them.

    Args:
        directory: where to.
        tokenizer: of `train_tokenizer`.
        visual_tokens: the fewest and the most that a picture is scaled to; None: from 4 to the paper's limit.
    """
    (directory / "tokenizer.json").write_text(_pretty(json.loads(tokenizer.to_str())), encoding="utf-8")
    bpe = json.loads(tokenizer.to_str())["model"]
    (directory / "vocab.json").write_text(json.dumps(bpe["vocab"], ensure_ascii=False), encoding="utf-8")
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in bpe["merges"]]
    (directory / "merges.txt").write_text("\n".join(merges) + "\n", encoding="utf-8")
    added = {
        str(number): {
            "content": token,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": True,
        }
        for token, number in special_token_ids(tokenizer).items()
    }
    config = {
        "add_prefix_space": False,
        "added_tokens_decoder": added,
        "additional_special_tokens": list(SPECIAL_TOKENS[1:]),
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": MODEL_MAX_LENGTH,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    (directory / "tokenizer_config.json").write_text(_pretty(config), encoding="utf-8")
    generation = {
        "bos_token_id": special_token_ids(tokenizer)["<|endoftext|>"],
        "eos_token_id": [special_token_ids(tokenizer)[token] for token in ("<|im_end|>", "<|endoftext|>")],
        "pad_token_id": special_token_ids(tokenizer)["<|endoftext|>"],
    }
    (directory / "generation_config.json").write_text(_pretty(generation), encoding="utf-8")
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    (directory / "preprocessor_config.json").write_text(
        _pretty(_preprocessor_config(*visual_tokens or (4, MAX_VISUAL_TOKENS))), encoding="utf-8"
    )


def _preprocessor_config(fewest: int, most: int) -> dict[str, Any]:
    min_pixels, max_pixels = fewest * _PIXELS_PER_TOKEN, most * _PIXELS_PER_TOKEN
    return {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_processor_type": "Qwen2VLImageProcessor",
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "max_pixels": max_pixels,
        "merge_size": 2,
        "min_pixels": min_pixels,
        "patch_size": 14,
        "processor_class": "Qwen2VLProcessor",
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"longest_edge": max_pixels, "shortest_edge": min_pixels},
        "temporal_patch_size": 2,
    }


def _pretty(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
