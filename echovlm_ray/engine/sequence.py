"""One request inside the engine."""

import math
import time
from collections import Counter
from collections.abc import Callable
from collections.abc import Sequence as Sequences
from dataclasses import dataclass, field
from enum import Enum

import numpy as np
import torch

from echovlm_ray.engine.block_pool import BLOCK_SIZE
from echovlm_ray.engine.prefix import PrefixKeys
from router.errors import ExpertsUnavailableError
from router.gating.expert_set import ExpertSetMember

# A restarted expert group is noticed quickly, and one that stays unavailable is polled rarely.
FIRST_RETRY_S = 0.02
LONGEST_RETRY_S = 0.25


class Finish(Enum):
    """Why a sequence is complete."""

    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen; the defaults are greedy."""

    # 0 is greedy decoding.
    temperature: float = 0.0
    # 0 keeps all tokens.
    top_k: int = 0
    # 1 keeps all tokens.
    top_p: float = 1.0
    # 1 has no effect.
    repetition_penalty: float = 1.0
    # From 0 to 2^64 - 1; None is a random seed.
    seed: int | None = None


@dataclass(frozen=True, slots=True)
class VisionDigest:
    """Rows [start, end) of a request's vision embeddings are one complete image.

    Attributes:
        content_digest: over the image and the encoder; equal digests mean equal embeddings.
    """

    start: int
    end: int
    content_digest: str


@dataclass(frozen=True, slots=True)
class SequenceRequest:
    """The input of a sequence; checked where it is built.

    Attributes:
        input_ids: the prompt, at least one token.
        position_ids_3T: int64 mrope positions of the prompt.
        position_delta: added to a generated token's index to get its position.
        vision_rows_V: int64, ascending: the prompt positions that vision embeddings replace.
        vision_embeddings_VD: their embeddings.
        vision_digests: the digests of the images; blocks from the first image without one on are not cached.
        expert_set_id: the request's expert set.
        shares: organ and π; empty for flat sets.
        cache_salt: blocks are shared only between requests with the same salt.
        caller: callers share the engine equally; empty if they cannot be distinguished.
        background: no caller waits for it, so its prompt is computed in small pieces while other requests run.
        deadline: in `time.monotonic` seconds; None for only the engine's limit.
    """

    input_ids: tuple[int, ...]
    position_ids_3T: torch.Tensor
    position_delta: int
    expert_set_id: str
    shares: tuple[tuple[str, float], ...]
    max_new_tokens: int
    vision_rows_V: torch.Tensor | None = None
    vision_embeddings_VD: torch.Tensor | None = None
    vision_digests: tuple[VisionDigest, ...] = ()
    sampling: SamplingParams = SamplingParams()
    stop_token_ids: frozenset[int] = frozenset()
    return_logits: bool = False
    deadline: float | None = None
    cache_salt: bytes = b""
    caller: bytes = b""
    background: bool = False


@dataclass(frozen=True, slots=True)
class StepOutput:
    """The output of one step for one sequence.

    Attributes:
        token_id: the new token.
        logits_TV: with `return_logits`, float32: all prompt positions with the first token, then one row per token.
        finish: set with the last token.
        routed_pairs: set with the first and the last token: (token, layer, expert) pairs per organ so far.
    """

    token_id: int
    logits_TV: torch.Tensor | None = None
    finish: Finish | None = None
    routed_pairs: dict[str, int] | None = None


# Called from the engine's thread with each step's output, or once with the exception that ended the sequence.
Sink = Callable[[StepOutput | Exception], None]


@dataclass(slots=True, eq=False)
class Sequence:
    """The state of a waiting or running request."""

    request: SequenceRequest
    sink: Sink
    # All experts that may compute its tokens, in the order of the expert set.
    experts: tuple[ExpertSetMember, ...]
    token_ids: list[int]
    generator: np.random.Generator | None
    # In `time.monotonic` seconds.
    deadline: float
    prefix: PrefixKeys
    # Tokens whose keys and values are in the cache, and those for which they were at any time.
    num_computed: int = 0
    num_served: int = 0
    # Tokens made when it was last admitted, and those to be computed again that were counted when its turn ended.
    num_generated_before: int = 0
    num_paid: float = 0.0
    block_table: list[int] = field(default_factory=list)
    # The number of (token, layer, expert) triples per organ for the tokens of each block.
    block_pairs: list[dict[str, int]] = field(default_factory=list)
    # The number of its first blocks that are in the prefix cache.
    num_published: int = 0
    # With return_logits: the number of computed rows, and the rows that are returned with the first token.
    num_logits: int = 0
    prompt_logits: list[torch.Tensor] = field(default_factory=list)
    cancelled: bool = False
    # Called once when the engine has released it.
    gone: Callable[[], None] | None = None
    # See `Engine.submit`.
    on_outputs_ready: Callable[[], None] | None = None
    # Set while the experts it needs do not answer; from when on and how often in a row they did not, and when they are
    # asked again.
    stalled_by: ExpertsUnavailableError | None = None
    stalled_at: float = 0.0
    num_stalls: int = 0
    retry_at: float = 0.0

    @classmethod
    def start(
        cls,
        request: SequenceRequest,
        sink: Sink,
        experts: tuple[ExpertSetMember, ...],
        max_seconds: float = math.inf,
        gone: Callable[[], None] | None = None,
        on_outputs_ready: Callable[[], None] | None = None,
    ) -> "Sequence":
        """Starts a sequence, which ends at its deadline or after `max_seconds`, whichever is first."""
        generator = None
        if request.sampling.temperature > 0:
            # numpy's generator, because torch's on the CPU only uses the lower 32 bits of a seed.
            generator = np.random.default_rng(request.sampling.seed)
        deadline = time.monotonic() + max_seconds
        if request.deadline is not None:
            deadline = min(deadline, request.deadline)
        prefix = PrefixKeys(request, experts)
        return cls(
            request,
            sink,
            experts,
            list(request.input_ids),
            generator,
            deadline,
            prefix,
            gone=gone,
            on_outputs_ready=on_outputs_ready,
        )

    @property
    def num_prompt(self) -> int:
        """The number of prompt tokens."""
        return len(self.request.input_ids)

    @property
    def num_generated(self) -> int:
        """The number of generated tokens."""
        return len(self.token_ids) - self.num_prompt

    @property
    def num_pending(self) -> int:
        """The number of tokens that are not in the cache yet: one while decoding, more in prefill."""
        return len(self.token_ids) - self.num_computed

    @property
    def max_tokens(self) -> int:
        """The most tokens that it can ever need in the cache."""
        return self.num_prompt + self.request.max_new_tokens - 1

    def stall(self, error: ExpertsUnavailableError, now: float) -> None:
        """Records that its experts do not answer. They are retried with exponential backoff."""
        pause = min(FIRST_RETRY_S * 2**self.num_stalls, LONGEST_RETRY_S)
        if self.stalled_by is None:
            self.stalled_at = now
        self.stalled_by = error
        self.num_stalls = min(self.num_stalls + 1, 16)
        self.retry_at = now + pause

    def lost(self) -> ExpertsUnavailableError | None:
        """The error of a sequence that ends while it is stalled, with the time since when."""
        if self.stalled_by is None:
            return None
        # A copy, because other stalled sequences have the same exception.
        error = ExpertsUnavailableError(self.stalled_by.organ, self.stalled_by.reason, self.stalled_by.retry_after_s)
        error.since = self.stalled_at
        return error

    def resume(self) -> None:
        """Records that its experts answered."""
        self.stalled_by = None
        self.num_stalls = 0

    def reuse(self, block_table: list[int], block_pairs: list[dict[str, int]]) -> None:
        """Begins with cached blocks of the same prefix."""
        self.block_table = block_table
        self.block_pairs = block_pairs
        self.num_published = len(block_table)
        self.num_computed = len(block_table) * BLOCK_SIZE

    def reset_computed(self) -> None:
        """Resets the computed state. The tokens stay and are recomputed in a prefill."""
        self.block_table = []
        self.block_pairs = []
        self.num_published = 0
        self.num_computed = 0

    def add_computed(self, end: int, block_pairs: Sequences[dict[str, int]]) -> None:
        """Records that the tokens up to `end` are in the cache.

        Args:
            end: the number of computed tokens.
            block_pairs: routed pairs per organ, for every block from that of the first new token on.
        """
        for block, pairs in enumerate(block_pairs, self.num_computed // BLOCK_SIZE):
            if block == len(self.block_pairs):
                self.block_pairs.append(dict(pairs))
                continue
            known = self.block_pairs[block]
            for organ, count in pairs.items():
                known[organ] = known.get(organ, 0) + count
        self.num_computed = end

    def routed_pairs(self) -> dict[str, int]:
        """The number of (token, layer, expert) triples per organ for the tokens in the cache, including reused ones."""
        total: Counter[str] = Counter()
        for pairs in self.block_pairs:
            total.update(pairs)
        return dict(total)
