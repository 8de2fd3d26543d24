"""Engines over split golden checkpoints, with experts in process or behind gRPC."""

import hashlib
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import torch

from echovlm_ray.engine.engine import Engine
from echovlm_ray.engine.runner import ModelRunner
from echovlm_ray.engine.sequence import Sequence as EngineSequence
from echovlm_ray.engine.sequence import SequenceRequest, StepOutput, VisionDigest
from echovlm_ray.model.checkpoint import load_backbone, load_vision_tower
from echovlm_ray.model.configuration import EchoVLMConfig
from echovlm_ray.model.positions import mrope_positions
from protos import vision_pb2
from router.dispatch.dispatcher import Dispatcher
from router.dispatch.expert_call import ExpertPlacement
from router.dispatch.local import LocalExperts
from router.dispatch.remote import RemoteExperts
from router.gating.expert_gates import ExpertGates
from tests.expert_servers import ServerThread, expert_group
from tests.golden_cases import GoldenRow
from tests.split_golden import SplitGolden

TIMEOUT_S = 60


def local_experts(split: SplitGolden, kernel: str = "reference") -> LocalExperts:
    return LocalExperts(
        {
            member.organ: expert_group(member.organ, split.registry, [member.bundle_digest], kernel)
            for member in split.expert_set.members
        }
    )


def remote_experts(split: SplitGolden, servers: ServerThread, exchange_timeout_s: float = 5.0) -> RemoteExperts:
    for member in split.expert_set.members:
        servers.serve(expert_group(member.organ, split.registry, [member.bundle_digest]))
    experts = RemoteExperts(servers.addresses, exchange_timeout_s=exchange_timeout_s)
    experts.wait_until_connected(split.expert_set.organs, 10)
    return experts


def dispatcher(split: SplitGolden, placement: ExpertPlacement) -> Dispatcher:
    dispatching = Dispatcher(
        placement,
        top_k=int(str(split.config["num_experts_per_tok"])),
        norm_topk_prob=bool(split.config["norm_topk_prob"]),
    )
    layers = int(str(split.config["num_hidden_layers"]))
    dtype = split.tensors["lm_head.weight"].dtype
    dispatching.add_set(ExpertGates.from_bundles(split.expert_set, split.bundles(), num_layers=layers, dtype=dtype))
    return dispatching


@contextmanager
def running_engine(
    split: SplitGolden,
    placement: ExpertPlacement,
    *,
    max_batch_size: int = 16,
    max_queue: int = 128,
    max_prefill_tokens: int = 64,
    max_request_s: float = 60.0,
    kv_cache_tokens: int = 4096,
    prefix_reuse: bool = True,
    micro_batches: int = 1,
    compiled: bool = True,
) -> Iterator[Engine]:
    # As it is served, and what compiled functions ask for.
    torch.set_num_threads(1)
    runner = ModelRunner(
        load_backbone(split.backbone),
        dispatcher(split, placement),
        kv_cache_tokens=kv_cache_tokens,
        compiled=compiled,
        micro_batches=micro_batches,
    )
    engine = Engine(
        runner,
        max_batch_size=max_batch_size,
        max_queue=max_queue,
        max_prefill_tokens=max_prefill_tokens,
        max_request_s=max_request_s,
        prefix_reuse=prefix_reuse,
    )
    engine.start()
    try:
        yield engine
    finally:
        engine.stop()


def engine_request(
    row: GoldenRow,
    split: SplitGolden,
    checkpoint: Path,
    shares: tuple[tuple[str, float], ...],
    *,
    return_logits: bool = True,
) -> SequenceRequest:
    """The golden row as the router's service would hand it to the engine."""
    config = EchoVLMConfig.from_pretrained(split.backbone)
    input_ids = torch.tensor(row.input_ids)
    grids = {
        kind: [item.grid for item in row.vision if item.kind == kind]
        for kind in (vision_pb2.VISION_KIND_IMAGE, vision_pb2.VISION_KIND_VIDEO)
    }
    positions, delta = mrope_positions(
        input_ids, grids[vision_pb2.VISION_KIND_IMAGE], grids[vision_pb2.VISION_KIND_VIDEO], config
    )
    rows = embeddings = None
    if row.vision:
        is_visual = (input_ids == config.image_token_id) | (input_ids == config.video_token_id)
        rows = is_visual.nonzero()[:, 0]
        # Every golden row has its pictures in the order of their placeholders, images and videos alike.
        embeddings = torch.cat([encode(checkpoint, item.patches, item.grid) for item in row.vision])
    return SequenceRequest(
        input_ids=row.input_ids,
        position_ids_3T=positions,
        position_delta=delta,
        expert_set_id=split.expert_set.id,
        shares=shares,
        max_new_tokens=16,
        vision_rows_V=rows,
        vision_embeddings_VD=embeddings,
        stop_token_ids=frozenset({row.end_token_id}),
        return_logits=return_logits,
    )


@torch.inference_mode()
def encode(checkpoint: Path, patches: torch.Tensor, grid: tuple[int, int, int]) -> torch.Tensor:
    tower = load_vision_tower(checkpoint)
    output = tower(patches.to(next(tower.parameters()).dtype), grid_thw=torch.tensor([grid])).pooler_output
    assert isinstance(output, torch.Tensor)
    return output


@dataclass
class Answer:
    """Collects an engine's outputs for one request."""

    token_ids: list[int] = field(default_factory=list)
    logits: list[torch.Tensor] = field(default_factory=list)
    last: StepOutput | None = None
    error: Exception | None = None
    sequence: EngineSequence | None = None
    started: threading.Event = field(default_factory=threading.Event)
    ended: threading.Event = field(default_factory=threading.Event)

    def sink(self, output: StepOutput | Exception) -> None:
        if isinstance(output, Exception):
            self.error = output
            self.ended.set()
            return
        self.token_ids.append(output.token_id)
        self.started.set()
        if output.logits_TV is not None:
            self.logits.append(output.logits_TV)
        if output.finish is not None:
            self.last = output
            self.ended.set()

    def wait(self) -> "Answer":
        assert self.ended.wait(TIMEOUT_S), f"no end after {len(self.token_ids)} tokens"
        return self

    def wait_well(self) -> "Answer":
        if (error := self.wait().error) is not None:
            raise error
        return self

    @property
    def logits_TV(self) -> torch.Tensor:
        return torch.cat(self.logits)


def submit(engine: Engine, request: SequenceRequest) -> Answer:
    answer = Answer()
    answer.sequence = engine.submit(request, answer.sink)
    return answer


def run_together(engine: Engine, requests: Sequence[SequenceRequest]) -> list[Answer]:
    """Runs requests in one batch: all are queued before the engine looks."""
    with engine._condition:
        answers = [submit(engine, request) for request in requests]
    return [answer.wait_well() for answer in answers]


def vision_digests(request: SequenceRequest) -> tuple[VisionDigest, ...]:
    """One digest for each run of placeholders, over the embeddings that fill it."""
    if request.vision_rows_V is None or request.vision_embeddings_VD is None:
        return ()
    rows = request.vision_rows_V.tolist()
    starts = [index for index, row in enumerate(rows) if not index or rows[index - 1] + 1 != row]
    return tuple(
        VisionDigest(start, end, hashlib.sha256(request.vision_embeddings_VD[start:end].numpy().tobytes()).hexdigest())
        for start, end in pairwise([*starts, len(rows)])
    )
