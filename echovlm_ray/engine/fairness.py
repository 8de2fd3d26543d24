"""Fair scheduling: which caller is served next."""

from collections import Counter
from collections.abc import Iterable

# A decoded token takes a step of its own; prompt tokens are computed many at a time.
PROMPT_TOKEN = 1.0
DECODED_TOKEN = 2.0
# A caller of which nothing is in a full batch gets the place of one that is so far ahead of it, in prompt tokens.
TURN_LEAD = 64 * DECODED_TOKEN
# The most by which a caller that had less than the others is preferred to them, in prompt tokens.
MAX_CREDIT = 16_384.0


class ServiceCounters:
    """Counts what each caller was served, so that the one that was served least can be next.

    The virtual token counter of "Fairness in Serving Large Language Models" (Sheng et al., arXiv 2401.00588): the
    counter of a caller that becomes active is lifted to the minimum of the active callers, so that idle callers
    accumulate no credit. Here the lead is bounded too, because a caller can be active and yet get nothing while its
    experts are away.
    """

    def __init__(self) -> None:
        self._served: dict[bytes, float] = {}
        # Sequences that wait or run.
        self._sequences: Counter[bytes] = Counter()

    @property
    def num_active(self) -> int:
        """Callers with sequences that wait or run."""
        return len(self._sequences)

    def join(self, caller: bytes) -> None:
        """A sequence of a caller is queued."""
        if caller not in self._sequences and self._sequences:
            active = [self._served[other] for other in self._sequences]
            self._served[caller] = max(self._served.get(caller, 0.0), min(active), max(active) - MAX_CREDIT)
        self._served.setdefault(caller, 0.0)
        self._sequences[caller] += 1

    def leave(self, caller: bytes) -> None:
        """A sequence of a caller has ended."""
        self._sequences[caller] -= 1
        if not self._sequences[caller]:
            del self._sequences[caller]
        if not self._sequences:
            self._served.clear()

    def charge(self, caller: bytes, num_tokens: int) -> None:
        """Tokens of a caller are computed in one step: one if it decodes, any number of its prompt."""
        self._served[caller] += DECODED_TOKEN if num_tokens == 1 else num_tokens * PROMPT_TOKEN

    def priority(self, caller: bytes) -> tuple[float, int]:
        """Sorts active callers: the one that was served least is first, then the one with the fewest sequences."""
        leader = max(self._served[other] for other in self._sequences)
        return max(self._served[caller], leader - MAX_CREDIT), self._sequences[caller]

    def lead(self, caller: bytes, other: bytes) -> float:
        """By how much more one active caller was served than another, in prompt tokens; below zero for less."""
        return self._served[caller] - self._served[other]

    def is_ahead(self, caller: bytes, others: Iterable[bytes]) -> bool:
        """Whether a caller was served more than one of these active callers."""
        return any(self._served[other] < self._served[caller] for other in others)
