"""The throughput benchmark's workload for every system: the same prompts, all concurrently."""

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

# Away from both ends of a vocabulary, where special tokens are.
LOWEST_TOKEN = 300
RESERVED_AT_THE_END = 100


@dataclass(frozen=True, slots=True)
class Workload:
    """Streams that begin together.

    Attributes:
        prompts: token ids of every stream.
        organs: of the experts that each stream uses; empty strings if the checkpoint has one gate for all.
        new_tokens: how many tokens each stream makes; end tokens do not end it.
    """

    prompts: tuple[tuple[int, ...], ...]
    organs: tuple[str, ...]
    new_tokens: int

    @property
    def prompt_tokens(self) -> int:
        """Of all streams together."""
        return sum(len(prompt) for prompt in self.prompts)

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        """Reads what `to_json` made."""
        return cls(tuple(tuple(prompt) for prompt in value["prompts"]), tuple(value["organs"]), value["new_tokens"])


def random_workload(
    streams: int, *, prompt_tokens: int, new_tokens: int, vocab_size: int, organs: Sequence[str], seed: str
) -> Workload:
    """Prompts of random tokens, no two alike, so that no system gains by remembering one.

    Args:
        streams: how many begin together.
        prompt_tokens: of every stream.
        new_tokens: of every stream.
        vocab_size: of the model.
        organs: given to the streams in turn; none where a request names no organ.
        seed: the same seed gives the same workload.
    """
    numbers = random.Random(seed)
    tokens = range(LOWEST_TOKEN, vocab_size - RESERVED_AT_THE_END)
    return Workload(
        prompts=tuple(tuple(numbers.choices(tokens, k=prompt_tokens)) for _ in range(streams)),
        organs=tuple(organs[index % len(organs)] if organs else "" for index in range(streams)),
        new_tokens=new_tokens,
    )
