"""Makes a small EchoVLM with random weights, split for the seven organs, for tests that need no sense in its text.

It never ends an answer by itself.

The same bytes come out on every machine: weights are made from integers of a seeded generator by additions and one
multiplication, which leave no room for another processor's rounding.
"""

import json
import math
import tempfile
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from echovlm_ray.checkpoint.demo_tokenizer import special_token_ids, train_tokenizer, write_text_files
from echovlm_ray.checkpoint.groups import clone_groups
from echovlm_ray.checkpoint.layout import ORGANS, CheckpointIndex
from echovlm_ray.checkpoint.schema import ModelShape
from echovlm_ray.checkpoint.split import Labels, split
from echovlm_ray.checkpoint.writer import write_released
from echovlm_ray.training.recipe import UpcyclingSection
from echovlm_ray.training.small_start import small_config

NAME = "echovlm-random"
DESCRIPTION = "Random weights: its text means nothing."
_SEED = 20_250_914
# Sixteen random bits each; four of them added make a bell curve close enough to a normal one.
_DRAWS, _DRAW_RANGE = 4, 1 << 16


def make_random(destination: Path) -> CheckpointIndex:
    """Makes the checkpoint; the same bytes each time."""
    with tempfile.TemporaryDirectory(prefix="echovlm-random-") as work:
        released = Path(work)
        _write_released(released)
        return split(
            released,
            destination,
            groups=lambda num_experts: clone_groups(ORGANS, num_experts),
            routing="organs",
            labels=Labels(name=NAME, description=DESCRIPTION, authors="EchoVLM-Ray", license="Apache-2.0"),
        ).index


def _config(vocab_size: int, special_ids: dict[str, int]) -> dict[str, Any]:
    """config.json of a model with sizes of its own, and an output layer that is not tied."""
    config = small_config(vocab_size, special_ids, UpcyclingSection(expert_size=64, shared_expert_size=512))
    return config | {
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_attention_heads": 8,
        "tie_word_embeddings": False,
        "vision_config": {**config["vision_config"], "embed_dim": 192, "hidden_size": 256},
    }


def _write_released(directory: Path) -> None:
    tokenizer = train_tokenizer()
    special_ids = special_token_ids(tokenizer)
    config = _config(tokenizer.get_vocab_size(), special_ids)
    write_text_files(directory, tokenizer)
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    shape = ModelShape.from_config(config)
    shapes = shape.backbone_tensors() | shape.routed_tensors()
    weights = _Weights(shapes, _readable_tokens(tokenizer))
    write_released(directory, {name: (torch.float32, shapes[name]) for name in sorted(shapes)}, weights.make)


class _Weights:
    """Makes the random tensors, in the order in which they are asked for."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], readable: list[int]) -> None:
        """Args are the name and shape of every tensor, and the tokens that the model may say."""
        self._shapes = shapes
        self._readable = readable
        self._generator = torch.Generator().manual_seed(_SEED)

    def make(self, name: str) -> torch.Tensor:
        """One tensor. Norms are ones, biases zeros, matrices keep the size of what passes through them."""
        shape = self._shapes[name]
        if name.endswith(".bias"):
            return torch.zeros(shape)
        if len(shape) == 1:
            return torch.ones(shape)
        fan_in = math.prod(shape[1:])
        weight = self._bell(shape, _gain(name) / math.sqrt(fan_in))
        if name == "lm_head.weight":
            # Halves of characters and special tokens get the logit 0, far below the likely ones.
            speakable = torch.zeros(shape[0], 1)
            speakable[self._readable] = 1.0
            weight *= speakable
        return weight

    def _bell(self, shape: tuple[int, ...], deviation: float) -> torch.Tensor:
        draws = torch.randint(_DRAW_RANGE, (_DRAWS, *shape), generator=self._generator)
        centred = 2 * draws.sum(dim=0) - _DRAWS * (_DRAW_RANGE - 1)
        # Twice a sum of uniform integers: its variance is four times DRAWS · (RANGE² - 1) / 12.
        unit = math.sqrt(4 * _DRAWS * (_DRAW_RANGE**2 - 1) / 12)
        return centred.to(torch.float32) * torch.tensor(deviation / unit, dtype=torch.float32)


def _gain(name: str) -> float:
    """How much stronger than size-preserving a matrix is."""
    if name == "model.embed_tokens.weight":
        # Rows of unit variance: a looked-up row is not a sum over fan-in.
        return 16.0
    if ".q_proj." in name or ".k_proj." in name:
        # Sharp attention, so that what was said before decides what comes next.
        return 2.0
    if ".o_proj." in name:
        return 4.0
    if name == "lm_head.weight":
        return 3.0
    return 1.0


def _readable_tokens(tokenizer: Tokenizer) -> list[int]:
    """The ids that are whole characters by themselves, without special tokens."""
    special = set(special_token_ids(tokenizer).values())
    ids = [token for token in range(tokenizer.get_vocab_size()) if token not in special]
    texts = [(token, tokenizer.decode([token])) for token in ids]
    return [token for token, text in texts if "\N{REPLACEMENT CHARACTER}" not in text and text.isprintable()]
