"""A training step of ours against the same step of plain transformers, in pairs: python -m benchmarks.training_step

Both have the same weights, examples, loss, precision and optimizer. The plain one uses transformers' defaults:
padded rows with labels, eager experts, logits of all tokens. Ours is `echovlm_ray.training`: one row without padding,
logits of the answers alone, fused attention, and the experts by `--experts`.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.machine import describe
from benchmarks.measure_table import measure_table
from echovlm_ray.model.configuration import EchoVLMConfig
from echovlm_ray.model.modeling import EchoVLMForConditionalGeneration
from echovlm_ray.model.picture_patches import VisionPatches
from echovlm_ray.model.positions import mrope_positions
from echovlm_ray.training.batches import collate
from echovlm_ray.training.encode import IGNORED, EncodedExample
from echovlm_ray.training.objective import TrainingObjective
from echovlm_ray.training.recipe import UpcyclingSection
from echovlm_ray.training.small_start import small_config

RESULT = Path(__file__).parent / "results" / "training_step.md"
TARGET = 0.6
VOCABULARY = 1200
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")
GRID = (1, 16, 16)


def make_config(num_experts: int, expert_size: int) -> EchoVLMConfig:
    """Of the demo model's sizes."""
    names = (*SPECIAL, "<|image_pad|>", "<|video_pad|>")
    ids = {name: VOCABULARY - len(names) + number for number, name in enumerate(names)}
    sizes = UpcyclingSection(num_experts=num_experts, expert_size=expert_size, shared_expert_size=128)
    config: EchoVLMConfig = EchoVLMConfig.from_dict(
        small_config(VOCABULARY, ids, sizes) | {"output_router_logits": True, "router_aux_loss_coef": 0.01}
    )
    return config


def make_examples(config: EchoVLMConfig, count: int) -> list[EncodedExample]:
    """One picture of 224 × 224 pixels, a question of 50 tokens and an answer of 40 to 110 each."""
    generator = torch.Generator().manual_seed(1)
    examples = []
    for _ in range(count):
        answer = int(torch.randint(40, 111, (1,), generator=generator))
        text = torch.randint(0, VOCABULARY - 10, (50 + answer,), generator=generator)
        picture = torch.full((GRID[1] * GRID[2] // 4,), config.image_token_id)
        ids = torch.cat([torch.tensor([config.vision_start_token_id]), picture, text])
        patches = torch.randn(GRID[1] * GRID[2], 1176, generator=generator).numpy()
        target = torch.full((len(ids) - 1,), IGNORED)
        target[-answer:] = ids[-answer:]
        weight = (target != IGNORED).float()
        positions, _ = mrope_positions(ids[:-1], [GRID], [], config)
        vision = VisionPatches(False, GRID, patches, len(picture))
        examples.append(EncodedExample(ids[:-1], target, weight, positions, (vision,)))
    return examples


def plain_inputs(config: EchoVLMConfig, examples: list[EncodedExample]) -> dict[str, torch.Tensor]:
    """The examples as transformers' own collators lay them: rows that are padded on the right, and labels."""
    length = max(len(each) for each in examples) + 1
    rows = {name: torch.zeros(len(examples), length, dtype=torch.int64) for name in ("input_ids", "attention_mask")}
    labels = torch.full((len(examples), length), IGNORED)
    for row, each in enumerate(examples):
        rows["input_ids"][row, : len(each)] = each.input_ids_T
        rows["attention_mask"][row, : len(each)] = 1
        labels[row, 1 : len(each) + 1] = each.target_T
    batch = collate(examples)
    return {**rows, "labels": labels, **{name: batch[name] for name in ("pixel_values", "image_grid_thw")}}


def make_step(
    module: torch.nn.Module, inputs: dict[str, torch.Tensor], loss_of: Callable[[Any], torch.Tensor], bfloat16: bool
) -> Callable[[], float]:
    """A function that takes one optimizer step and returns the loss."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, fused=True)

    def step() -> float:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bfloat16):
            loss = loss_of(module(**inputs))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def model_of(options: argparse.Namespace) -> EchoVLMForConditionalGeneration:
    """A model with the same weights each time, and a separate configuration with its attention implementation."""
    config = make_config(options.num_experts, options.expert_size)
    torch.manual_seed(0)
    model: EchoVLMForConditionalGeneration = EchoVLMForConditionalGeneration._from_config(config)  # type: ignore[no-untyped-call]
    model.train()
    return model


def measure(options: argparse.Namespace, bfloat16: bool) -> list[tuple[float, float]]:
    """Seconds of processor time of both steps, pair by pair; the one that is first alternates."""
    config = make_config(options.num_experts, options.expert_size)
    examples = make_examples(config, options.batch)
    plain = make_step(model_of(options), plain_inputs(config, examples), lambda outputs: outputs.loss, bfloat16)
    ours_model = model_of(options)
    ours_model.set_experts_implementation(options.experts)
    objective = TrainingObjective(ours_model, balancing=0.01)
    ours = make_step(objective, collate(examples), lambda outputs: outputs["loss"], bfloat16)
    for step in (plain, ours, plain, ours):
        step()
    pairs = []
    for number in range(options.pairs):
        times = {}
        for name, step in sorted({"plain": plain, "ours": ours}.items(), reverse=number % 2 == 0):
            begin = options.clock()
            step()
            times[name] = options.clock() - begin
        pairs.append((times["plain"], times["ours"]))
        print(f"{number + 1} of {options.pairs}: {times['ours'] / times['plain']:.2f}", flush=True)
    return pairs


def main() -> None:
    """Measures both precisions, prints, and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--num-experts", type=int, default=4)
    parser.add_argument("--expert-size", type=int, default=64)
    parser.add_argument("--experts", default="eager", help="the experts function of our step")
    parser.add_argument("--wall", action="store_true", help="wall-clock time; otherwise processor time of all threads")
    parser.add_argument("--no-result", action="store_true", help="print only")
    options = parser.parse_args()
    options.clock = time.perf_counter if options.wall else time.process_time
    torch.set_num_threads(options.threads)
    rows = []
    for bfloat16 in (True, False):
        pairs = measure(options, bfloat16)
        ratio = median(ours / plain for plain, ours in pairs)
        name = "bfloat16" if bfloat16 else "float32"
        target = f"≤ {TARGET}" if bfloat16 else ""
        rows += [
            (f"{name}: ours ÷ plain transformers", f"{ratio:.2f}", target),
            (f"{name}: plain, s", f"{median(plain for plain, _ in pairs):.3f}", ""),
            (f"{name}: ours, s", f"{median(ours for _, ours in pairs):.3f}", ""),
        ]
    clock = "Wall-clock time" if options.wall else "Processor time of all threads"
    lines = [
        "# A training step against plain transformers",
        "",
        f"`python -m benchmarks.training_step`: {options.num_experts} experts of {options.expert_size}, batch "
        f"{options.batch}, {options.threads} threads, median of {options.pairs} pairs. {clock}.",
        "",
        *measure_table(rows),
        "",
        describe(),
    ]
    print("\n".join(lines))
    if not options.no_result:
        RESULT.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
