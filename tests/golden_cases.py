"""The golden cases, row by row and without padding, as requests of their own."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from protos import router_pb2, vision_pb2

CASES = {
    "base": (
        "text_only",
        "one_image",
        "two_images_single",
        "batch_leftpad",
        "batch_leftpad_textrow",
        "batch_text_leftpad",
        "batch_rightpad",
        "video_and_image",
        "batch_leftpad_eos",
    ),
    "bf16": ("text_only", "one_image", "batch_leftpad"),
}
FLOAT32_TOLERANCE = 1e-4
BFLOAT16_TOLERANCE = 3e-2


@dataclass(frozen=True)
class GoldenVision:
    """An image or a video of a row: its kind, its grid and its patches."""

    kind: vision_pb2.VisionKind
    grid: tuple[int, int, int]
    patches: torch.Tensor


@dataclass(frozen=True)
class GoldenRow:
    """One row of a golden case.

    Attributes:
        logits_TV: of every prompt position.
        generated: the reference's greedy tokens up to its end token; empty where it continued from a pad token.
        step_logits_TV: the logits that chose each of them.
        end_token_id: the token at which the reference stopped.
    """

    variant: str
    case: str
    row: int
    input_ids: tuple[int, ...]
    vision: tuple[GoldenVision, ...]
    logits_TV: torch.Tensor
    generated: tuple[int, ...]
    step_logits_TV: torch.Tensor
    end_token_id: int

    def check_logits(self, logits_TV: torch.Tensor) -> None:
        """P1: float32 within 1e-4; bfloat16 within 3e-2 of the largest logit."""
        difference = (logits_TV.float() - self.logits_TV.float()).abs().max().item()
        assert difference <= self.tolerance, f"{self}: the logits differ by {difference}, allowed is {self.tolerance}"

    def check_tokens(self, token_ids: list[int]) -> None:
        """P1: the same greedy tokens; in bfloat16 up to the first near tie of the reference."""
        for step, expected in enumerate(self.generated):
            first, second = self.step_logits_TV[step].float().topk(2).values.tolist()
            if self.variant == "bf16" and first - second <= self.tolerance:
                return
            assert token_ids[step : step + 1] == [expected], f"{self}: step {step}: {token_ids} != {self.generated}"
        assert len(token_ids) == len(self.generated) or not self.generated, f"{self}: {token_ids} goes on"

    @property
    def tolerance(self) -> float:
        """The largest difference of logits that P1 allows."""
        if self.variant == "base":
            return FLOAT32_TOLERANCE
        return BFLOAT16_TOLERANCE * self.logits_TV.float().abs().max().item()

    def __str__(self) -> str:
        return f"{self.variant}/{self.case}[{self.row}]"


def golden_rows(golden_dir: Path, variant: str) -> Iterator[GoldenRow]:
    """All rows of all cases of a variant."""
    manifest = json.loads((golden_dir / "manifest.json").read_text())
    special = manifest["special"]
    for case in CASES[variant]:
        tensors = load_file(golden_dir / variant / f"{case}.safetensors")
        images = _vision(tensors, "image_grid_thw", "pixel_values", vision_pb2.VISION_KIND_IMAGE)
        videos = _vision(tensors, "video_grid_thw", "pixel_values_videos", vision_pb2.VISION_KIND_VIDEO)
        end_token_id = manifest["variants"][variant]["cases"][case].get("eos", special["eos"])
        prompt_length = tensors["in.input_ids"].shape[1]
        for row, mask in enumerate(tensors["in.attention_mask"].bool()):
            input_ids = tensors["in.input_ids"][row][mask].tolist()
            starts = [i for i, token in enumerate(input_ids) if token == special["vision_start"]]
            sources = [images if input_ids[start + 1] == special["image"] else videos for start in starts]
            vision = tuple(next(source) for source in sources)
            generated = tensors["gen.sequences"][row, prompt_length:].tolist()
            if end_token_id in generated:
                generated = generated[: generated.index(end_token_id) + 1]
            if not mask[-1]:
                generated = []
            yield GoldenRow(
                variant=variant,
                case=case,
                row=row,
                input_ids=tuple(input_ids),
                vision=vision,
                logits_TV=tensors["out.logits"][row][mask],
                generated=tuple(generated),
                step_logits_TV=tensors["gen.step_logits"][row],
                end_token_id=end_token_id,
            )


def _vision(
    tensors: dict[str, torch.Tensor], grid_name: str, patches_name: str, kind: vision_pb2.VisionKind
) -> Iterator[GoldenVision]:
    if f"in.{grid_name}" not in tensors:
        return
    grids = [(int(t), int(h), int(w)) for t, h, w in tensors[f"in.{grid_name}"].tolist()]
    sizes = [t * h * w for t, h, w in grids]
    for grid, patches in zip(grids, torch.split(tensors[f"in.{patches_name}"], sizes), strict=True):
        yield GoldenVision(kind, grid, patches)


def router_request(row: GoldenRow, *, organs: tuple[str, ...] = ()) -> router_pb2.RouterGenerateRequest:
    """The row as a request to the router: greedy, 16 tokens, logits wanted."""
    from experts.transport.codec import tensor_to_proto

    inputs = [
        vision_pb2.VisionInput(
            kind=item.kind,
            grid_t=item.grid[0],
            grid_h=item.grid[1],
            grid_w=item.grid[2],
            patches=tensor_to_proto(item.patches.float()),
        )
        for item in row.vision
    ]
    return router_pb2.RouterGenerateRequest(
        input_ids=row.input_ids,
        vision_inputs=inputs,
        organ_hints=router_pb2.OrganHints(organs=organs),
        max_new_tokens=16,
        stop_token_ids=[row.end_token_id],
        return_logits=True,
    )
