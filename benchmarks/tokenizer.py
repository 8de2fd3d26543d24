"""The demo's tokenizer, stretched to another vocabulary: its special tokens get the ids that a configuration names."""

import json
from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken, Tokenizer

from echovlm_ray.checkpoint.demo_tokenizer import SPECIAL_TOKENS, train_tokenizer

# Qwen2-VL's token → the field of config.json that names its id.
FIELDS = {
    "<|image_pad|>": "image_token_id",
    "<|video_pad|>": "video_token_id",
    "<|vision_start|>": "vision_start_token_id",
    "<|vision_end|>": "vision_end_token_id",
    "<|im_start|>": "bos_token_id",
    "<|im_end|>": "eos_token_id",
    "<|endoftext|>": "pad_token_id",
}
# No text is tokenized into these pieces, but a random model generates them. "Ġ" is how byte-level BPE writes a blank.
FILLER = "Ġword{}"


class UnsuitableVocabularyError(ValueError):
    """A configuration's special tokens cannot be given to the tokenizer. The text names them."""


def stretched_tokenizer(config: Mapping[str, Any]) -> Tokenizer:
    """The demo's tokenizer with special tokens at a configuration's ids, and pieces without a use below them.

    Args:
        config: a config.json in the released layout.

    Raises:
        UnsuitableVocabularyError: the seven ids do not follow one another, leave no room, or exceed the vocabulary.
    """
    tokens = {int(config[field]): token for token, field in FIELDS.items()}
    first = min(tokens)
    if sorted(tokens) != list(range(first, first + len(SPECIAL_TOKENS))) or max(tokens) >= config["vocab_size"]:
        raise UnsuitableVocabularyError(
            f"the ids of {', '.join(FIELDS.values())} must be {len(SPECIAL_TOKENS)} in a row, below vocab_size "
            f"{config['vocab_size']}; they are {sorted(tokens)}"
        )
    description = json.loads(train_tokenizer().to_str())
    vocabulary = {token: index for token, index in description["model"]["vocab"].items() if token not in FIELDS}
    if len(vocabulary) > first:
        raise UnsuitableVocabularyError(
            f"the tokenizer has {len(vocabulary)} pieces, and the special tokens begin at {first}: move them up"
        )
    vocabulary |= {FILLER.format(index): index for index in range(len(vocabulary), first)}
    description["model"]["vocab"] = vocabulary
    description["added_tokens"] = []
    tokenizer = Tokenizer.from_str(json.dumps(description))
    # They get the next free ids, one after the other.
    ordered = [tokens[index] for index in sorted(tokens)]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in ordered])
    return tokenizer
