"""Plain text to Qwen2-VL's token ids and back, with the tokenizers library alone.

Whatever a caller writes stays text: control tokens are set by id, and never found in a prompt.
"""

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

IMAGE_TOKEN, VIDEO_TOKEN = "<|image_pad|>", "<|video_pad|>"
VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"
CONTROL_TOKENS = (IMAGE_TOKEN, VIDEO_TOKEN, VISION_START, VISION_END, TURN_START, TURN_END)

# What transformers' tokenizer of Qwen2 is made of, whatever tokenizer.json says.
_CLASSES = ("Qwen2Tokenizer", "Qwen2TokenizerFast")
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Takes the place of those that tokenizer_config.json does not name.
_DEFAULT_SPECIAL = "<|endoftext|>"
# Only of the places of tokens in the text, which are not asked for here.
_OF_OFFSETS = "trim_offsets"


class TextTokens:
    """The tokens of one checkpoint.

    Attributes:
        control_ids: control token → its id.
    """

    def __init__(self, tokenizer: Tokenizer, special: Collection[str]) -> None:
        """
        Args:
            tokenizer: of the tokenizers library; its state for special tokens is changed by `encode`.
            special: its special tokens.

        Raises:
            ValueError: a control token is missing, or ordinary text.
        """
        if missing := [token for token in CONTROL_TOKENS if token not in special]:
            raise ValueError(
                f"the tokenizer has no special token {', '.join(missing)}: use the tokenizer of a Qwen2-VL checkpoint"
            )
        self._tokenizer = tokenizer
        vocabulary = tokenizer.get_vocab()
        self.control_ids = {token: vocabulary[token] for token in CONTROL_TOKENS}
        self._never = frozenset(self.control_ids.values())

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text: the name of a special token in it is spelt out, like any other word."""
        if not self._tokenizer.encode_special_tokens:
            self._tokenizer.encode_special_tokens = True
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        assert not self._never.intersection(ids), "plain text became a control token"
        return ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of tokens; special tokens are left out, and halves of characters show as U+FFFD."""
        text: str = self._tokenizer.decode(token_ids, skip_special_tokens=True)
        return text


def special_tokens(tokenizer: Tokenizer) -> set[str]:
    """The tokens that are no text."""
    return {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}


def read_tokenizer(directory: Path) -> Tokenizer | None:
    """The tokenizer of a checkpoint's folder, where transformers would make the same of its files; otherwise None.

    None is no verdict: transformers knows more files, and sets right what these say differently.
    """
    try:
        config, stated = (
            json.loads((directory / name).read_text(encoding="utf-8"))
            for name in ("tokenizer_config.json", "tokenizer.json")
        )
    except (OSError, ValueError):
        return None
    if not isinstance(config, dict) or config.get("tokenizer_class") not in _CLASSES or "auto_map" in config:
        return None
    if not _is_of_qwen2(stated) or not _agree_on_special_tokens(config, stated.get("added_tokens", ())):
        return None
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    # Set by a request's limits alone.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _is_of_qwen2(stated: Mapping[str, Any]) -> bool:
    model, decoder = stated.get("model") or {}, stated.get("decoder") or {}
    cut = stated.get("pre_tokenizer") or {}
    steps = [
        {name: value for name, value in step.items() if name != _OF_OFFSETS} for step in cut.get("pretokenizers", ())
    ]
    plain = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "fuse_unk", "byte_fallback")
    return (
        model.get("type") == "BPE"
        and not any(model.get(name) for name in (*plain, "ignore_merges"))
        and stated.get("normalizer") == {"type": "NFC"}
        and decoder.get("type") == "ByteLevel"
        and cut.get("type") == "Sequence"
        and steps
        == [
            {"type": "Split", "pattern": {"Regex": _WORDS}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
        ]
    )


def _agree_on_special_tokens(config: Mapping[str, Any], added: Sequence[Mapping[str, Any]]) -> bool:
    here = {str(token["id"]): {name: value for name, value in token.items() if name != "id"} for token in added}
    special = {token["content"] for token in added if token["special"]}
    return config.get("added_tokens_decoder", here) == here and special.issuperset(_named(config))


def _named(config: Mapping[str, Any]) -> Iterator[str]:
    """Every token to which tokenizer_config.json gives a part."""
    yield _DEFAULT_SPECIAL
    for name, value in config.items():
        if name.endswith("_token") and not isinstance(value, bool | None):
            yield _content(value)
        if name.endswith("_special_tokens") and value:
            yield from map(_content, value.values() if isinstance(value, dict) else value)


def _content(token: Any) -> str:
    return str(token["content"] if isinstance(token, dict) else token)
