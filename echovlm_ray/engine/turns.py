"""Turns in a full batch: when a sequence makes room for that of a caller which has none there."""

from echovlm_ray.engine.block_pool import BLOCK_SIZE
from echovlm_ray.engine.sequence import Sequence

# A sequence makes so many tokens before its turn ends, so that it is not preempted again and again.
TURN_TOKENS = 128
# What may be computed again because of turns, as a part of all tokens.
RECOMPUTED_PART = 1 / 16
# What was not computed again is saved up to so many tokens.
MAX_SAVED = 4096.0


class Turns:
    """Bounds what preempting for other callers costs: how often a sequence, and how much of the engine's time.

    With more callers than places in the batch, each with one long answer, every sequence is its caller's only one, and
    a newcomer would wait until one of them ends. So they take turns. A sequence whose blocks stay in the cache is
    continued almost at once; otherwise its tokens are computed again, which is paid from a saved part of all that is
    computed.
    """

    def __init__(self, turn_tokens: float = TURN_TOKENS) -> None:
        """Takes how many tokens a sequence makes before its turn ends; infinity for no turns."""
        self._turn_tokens = turn_tokens
        self._saved = MAX_SAVED

    def computed(self, num_tokens: int) -> None:
        """Tokens are computed in a step."""
        self._saved = min(MAX_SAVED, self._saved + num_tokens * RECOMPUTED_PART)

    def is_over(self, sequence: Sequence) -> bool:
        """Whether a sequence of the batch has made enough tokens since it was admitted."""
        return sequence.num_generated - sequence.num_generated_before >= self._turn_tokens

    def end(self, sequence: Sequence, *, is_kept: bool) -> bool:
        """Ends the turn of a sequence; False, and nothing done, when too much would be computed again.

        Args:
            sequence: whose turn is over.
            is_kept: whether the cache has room for its blocks while it waits.
        """
        cost = min(MAX_SAVED, float(BLOCK_SIZE if is_kept else len(sequence.token_ids)))
        if cost > self._saved:
            return False
        sequence.num_paid = cost
        self._saved -= cost
        return True

    def resume(self, sequence: Sequence) -> None:
        """A sequence that was preempted, for any reason, goes on with those of its tokens that are still cached."""
        self._saved -= sequence.num_served - sequence.num_computed - sequence.num_paid
        sequence.num_paid = 0.0
