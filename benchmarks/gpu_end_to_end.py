"""The demo system on a GPU, compared with the same system on the CPU: the engine, with the experts in its process."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from echovlm_ray.checkpoint.layout import backbone_directory, read_index, registry_root
from echovlm_ray.engine.engine import Engine
from echovlm_ray.engine.runner import ModelRunner
from echovlm_ray.engine.sequence import SequenceRequest, StepOutput
from echovlm_ray.model.checkpoint import load_backbone
from echovlm_ray.model.positions import mrope_positions
from experts.group import ExpertGroup
from experts.kernels.registry import get_kernel
from experts.registry.registry import Registry
from router.dispatch.dispatcher import Dispatcher
from router.dispatch.local import LocalExperts
from router.gating.expert_gates import ExpertGates

PROMPTS = (5, 40, 130)
NEW_TOKENS = 16
TIMEOUT_S = 120
# Of the largest logit; the project's own bounds.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}

# Token ids of a prompt -> its positions and the offset of those that follow.
Positions = Callable[[torch.Tensor], tuple[torch.Tensor, int]]


@dataclass
class Answer:
    """What the engine gave for one prompt."""

    token_ids: list[int] = field(default_factory=list)
    logits: list[torch.Tensor] = field(default_factory=list)
    error: Exception | None = None
    ended: threading.Event = field(default_factory=threading.Event)

    def sink(self, output: StepOutput | Exception) -> None:
        """Takes one step's output."""
        if isinstance(output, Exception):
            self.error = output
            self.ended.set()
            return
        self.token_ids.append(output.token_id)
        if output.logits_TV is not None:
            self.logits.append(output.logits_TV.float().cpu())
        if output.finish is not None:
            self.ended.set()


@dataclass(frozen=True)
class Comparison:
    """One kernel on the device against the loop over experts on the CPU."""

    kernel: str
    dtype: torch.dtype
    error: float
    tokens_equal: bool

    @property
    def well(self) -> bool:
        """Whether it is within the project's bounds; greedy tokens must be equal in float32."""
        return self.error <= TOLERANCE[self.dtype] and (self.tokens_equal or self.dtype != torch.float32)


def compare(checkpoint: Path, device: str, kernels: Sequence[str], dtype: torch.dtype) -> Iterator[Comparison]:
    """Runs the same prompts in one batch, on the CPU and then on the device with each kernel.

    Args:
        checkpoint: a split folder with routing by organs.
        device: what is compared.
        kernels: by name.
        dtype: of the backbone and of the experts.
    """
    expected = run(checkpoint, "cpu", "reference", dtype)
    for kernel in kernels:
        found = run(checkpoint, device, kernel, dtype)
        error, equal = 0.0, True
        for one, other in zip(found, expected, strict=True):
            # Up to the first token that differs both have read the same.
            same = next(
                (i for i, pair in enumerate(zip(one.token_ids, other.token_ids, strict=False)) if pair[0] != pair[1]),
                len(other.token_ids) - 1,
            )
            equal &= one.token_ids == other.token_ids
            ours, theirs = torch.cat(one.logits[: same + 1]), torch.cat(other.logits[: same + 1])
            error = max(error, float((ours - theirs).abs().max() / theirs.abs().max()))
        yield Comparison(kernel, dtype, error, equal)


def run(checkpoint: Path, device: str, kernel: str, dtype: torch.dtype) -> list[Answer]:
    """Greedy answers to fixed random prompts, with all logits."""
    index = read_index(checkpoint)
    expert_set = index.expert_set()
    with _engine(checkpoint, device, kernel, dtype) as (engine, vocabulary, positions_of):
        answers = []
        for number, length in enumerate(PROMPTS):
            generator = torch.Generator().manual_seed(number)
            input_ids = torch.randint(0, vocabulary, (length,), generator=generator)
            positions, delta = positions_of(input_ids)
            organ = expert_set.members[number % len(expert_set.members)].organ
            request = SequenceRequest(
                input_ids=tuple(input_ids.tolist()),
                position_ids_3T=positions,
                position_delta=delta,
                expert_set_id=expert_set.id,
                shares=((organ, 1.0),),
                max_new_tokens=NEW_TOKENS,
                return_logits=True,
            )
            answers.append(Answer())
            engine.submit(request, answers[-1].sink)
        for answer in answers:
            if not answer.ended.wait(TIMEOUT_S):
                raise TimeoutError(f"no end after {len(answer.token_ids)} tokens with the kernel {kernel} on {device}")
            if answer.error is not None:
                raise answer.error
    return answers


@contextmanager
def _engine(checkpoint: Path, device: str, kernel: str, dtype: torch.dtype) -> Iterator[tuple[Engine, int, Positions]]:
    index = read_index(checkpoint)
    expert_set = index.expert_set()
    registry = Registry(registry_root(checkpoint))
    backbone = load_backbone(backbone_directory(checkpoint), dtype=dtype, device=device)
    text = backbone.config.text_config
    groups = {}
    for member in expert_set.members:
        group = groups[member.organ] = ExpertGroup(
            member.organ, registry, get_kernel(kernel), device=device, dtype=dtype, max_resident_bytes=64 * 1024**3
        )
        group.load(member.bundle_digest)
    dispatcher = Dispatcher(LocalExperts(groups), top_k=text.num_experts_per_tok, norm_topk_prob=text.norm_topk_prob)
    bundles = {member.bundle_digest: registry.open(member.bundle_digest) for member in expert_set.members}
    dispatcher.add_set(
        ExpertGates.from_bundles(expert_set, bundles, num_layers=text.num_hidden_layers, dtype=dtype, device=device)
    )
    engine = Engine(
        ModelRunner(backbone, dispatcher, kv_cache_tokens=4096),
        max_batch_size=8,
        max_queue=8,
        max_prefill_tokens=64,
        max_request_s=TIMEOUT_S,
    )
    # Below the special tokens, whose positions would need images.
    vocabulary = min(backbone.config.image_token_id, backbone.config.video_token_id, text.vocab_size)
    engine.start()
    try:
        yield engine, vocabulary, lambda input_ids: mrope_positions(input_ids, [], [], backbone.config)
    finally:
        engine.stop()
