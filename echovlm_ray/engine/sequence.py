"""One request inside the engine."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum

import torch


class Finish(Enum):
    """Why a sequence ended well."""

    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen; the defaults are greedy."""

    # 0 takes the most likely token.
    temperature: float = 0.0
    # 0 keeps all tokens.
    top_k: int = 0
    # 1 keeps all tokens.
    top_p: float = 1.0
    # 1 changes nothing.
    repetition_penalty: float = 1.0
    # None draws a seed.
    seed: int | None = None


@dataclass(frozen=True, slots=True)
class SequenceRequest:
    """What the engine is asked to do; checked by whoever builds it.

    Attributes:
        input_ids: the prompt, at least one token.
        position_ids_3T: int64 mrope positions of the prompt.
        position_delta: added to a generated token's index to get its position.
        vision_rows_V: int64, ascending: the prompt positions that vision embeddings replace.
        vision_embeddings_VD: their embeddings.
        expert_set_id: the set that the request is pinned to.
        shares: organ and π; empty for flat sets.
        deadline: in `time.monotonic` seconds, or None.
    """

    input_ids: tuple[int, ...]
    position_ids_3T: torch.Tensor
    position_delta: int
    expert_set_id: str
    shares: tuple[tuple[str, float], ...]
    max_new_tokens: int
    vision_rows_V: torch.Tensor | None = None
    vision_embeddings_VD: torch.Tensor | None = None
    sampling: SamplingParams = SamplingParams()
    stop_token_ids: frozenset[int] = frozenset()
    return_logits: bool = False
    deadline: float | None = None


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What one step made for one sequence.

    Attributes:
        token_id: the new token.
        logits_TV: with `return_logits`, float32: all prompt positions with the first token, then one row a token.
        finish: set with the last token.
        routed_pairs: set with the last token: (token, layer, expert) pairs per organ over the whole request.
    """

    token_id: int
    logits_TV: torch.Tensor | None = None
    finish: Finish | None = None
    routed_pairs: dict[str, int] | None = None


# Called from the engine's thread with each step's output, or once with the exception that ended the sequence.
Sink = Callable[[StepOutput | Exception], None]


@dataclass(slots=True, eq=False)
class Sequence:
    """A request's state while it waits or runs."""

    request: SequenceRequest
    sink: Sink
    token_ids: list[int]
    generator: torch.Generator | None
    # Tokens whose keys and values are in the cache.
    num_computed: int = 0
    block_table: list[int] = field(default_factory=list)
    prompt_logits: list[torch.Tensor] = field(default_factory=list)
    routed_pairs: dict[str, int] = field(default_factory=dict)
    cancelled: bool = False
    # Set while the experts it needs do not answer.
    stalled_by: Exception | None = None
    retry_at: float = 0.0

    @classmethod
    def start(cls, request: SequenceRequest, sink: Sink) -> "Sequence":
        """A sequence at its first step."""
        generator = None
        if request.sampling.temperature > 0:
            generator = torch.Generator()
            if request.sampling.seed is None:
                generator.seed()
            else:
                generator.manual_seed(request.sampling.seed)
        return cls(request, sink, list(request.input_ids), generator)

    @property
    def num_prompt(self) -> int:
        """Tokens of the prompt."""
        return len(self.request.input_ids)

    @property
    def num_generated(self) -> int:
        """Tokens made so far."""
        return len(self.token_ids) - self.num_prompt

    @property
    def num_pending(self) -> int:
        """Tokens that are known but not in the cache; one while decoding, more in prefill."""
        return len(self.token_ids) - self.num_computed

    @property
    def max_tokens(self) -> int:
        """The most tokens whose keys and values it can ever need in the cache."""
        return self.num_prompt + self.request.max_new_tokens - 1

    def expired(self, now: float | None = None) -> bool:
        """Whether its deadline has passed."""
        deadline = self.request.deadline
        return deadline is not None and (time.monotonic() if now is None else now) >= deadline
