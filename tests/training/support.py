"""Small starts and data sets for the training's tests: models of a few thousand numbers, pictures of a few tokens."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from echovlm_ray.checkpoint.demo_tokenizer import special_token_ids, train_tokenizer, write_text_files
from echovlm_ray.model.configuration import EchoVLMConfig
from echovlm_ray.model.modeling import EchoVLMForConditionalGeneration
from echovlm_ray.model.processing import EchoVLMProcessor
from echovlm_ray.training.encode import EncodedExample, ExampleEncoder
from echovlm_ray.training.recipe import Recipe
from echovlm_ray.training.record_source import RecordSource
from echovlm_ray.training.small_start import small_config

WORDS = ("cyst", "nodule", "plaque", "stone", "mass", "thrombus")
MAX_VISUAL_TOKENS = 16


def write_start(folder: Path, **changes: Any) -> Path:
    """A folder with configuration, tokenizer and processor of a tiny model, without weights."""
    folder.mkdir(parents=True)
    tokenizer = train_tokenizer()
    config = small_config(tokenizer.get_vocab_size(), special_token_ids(tokenizer), Recipe().upcycling)
    config |= {
        "hidden_size": 32,
        "intermediate_size": 48,
        "moe_intermediate_size": 16,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 1, 1]},
        "shared_expert_intermediate_size": 24,
        "vision_config": {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2},
        "initializer_range": 0.1,
        **changes,
    }
    write_text_files(folder, tokenizer)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_records(folder: Path, count: int, *, name: str = "train.json", without_image: tuple[int, ...] = ()) -> Path:
    """Records in the published form, each about one picture, except those that have none."""
    folder.mkdir(parents=True, exist_ok=True)
    records = []
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 255, (84, 84, 3), dtype=np.uint8)
        image = f"{name}-{number}.png"
        Image.fromarray(pixels).save(folder / image)
        shown = number not in without_image
        word = WORDS[number % len(WORDS)]
        records.append(
            {
                "id": f"case-{number}",
                "image": [image] if shown else [],
                "conversations": [
                    {"from": "system", "value": "You describe ultrasound."},
                    {"from": "human", "value": ("<image>" if shown else "") + "What is shown?"},
                    {"from": "gpt", "value": f"Ultrasound findings: a {word}; Ultrasound impression: {word}."},
                ],
            }
        )
    path = folder / name
    path.write_text(json.dumps(records))
    return path


def tiny_model(start: Path, seed: int = 0) -> EchoVLMForConditionalGeneration:
    torch.manual_seed(seed)
    config = EchoVLMConfig.from_pretrained(start)
    model: EchoVLMForConditionalGeneration = EchoVLMForConditionalGeneration._from_config(config)  # type: ignore[no-untyped-call]
    return model


def encoder_of(start: Path, *, max_tokens: int = 512, emphasis_weight: float = 1.0) -> ExampleEncoder:
    return ExampleEncoder(
        EchoVLMProcessor.from_pretrained(start),
        EchoVLMConfig.from_pretrained(start),
        max_tokens=max_tokens,
        max_visual_tokens=MAX_VISUAL_TOKENS,
        emphasis_weight=emphasis_weight,
    )


def encoded(start: Path, records: Path) -> list[EncodedExample]:
    source, encoder = RecordSource(records), encoder_of(start)
    return [encoder.encode(source.example(index, 0)) for index in range(len(source))]


def recipe(**changes: Any) -> Recipe:
    """A recipe for tiny models: a few steps, small images."""
    fields: dict[str, Any] = {
        "data": {"max_tokens": 512, "max_visual_tokens": MAX_VISUAL_TOKENS},
        "precision": "float32",
        "stages": [{"name": "all", "steps": 6, "batch_size": 4, "micro_batch_size": 2, "learning_rate": 3e-3}],
        "log_every": 1,
        "save_every": 2,
    }
    return Recipe.model_validate({**fields, **changes})
