"""Samples the next token from the logits."""

import math
from collections.abc import Sequence as Sequences

import numpy as np
import torch

from echovlm_ray.engine.sequence import SamplingParams, Sequence


class NonFiniteLogitsError(ArithmeticError):
    """The logits contain NaN or infinity, so no token can be sampled."""

    def __init__(self) -> None:
        """The text names the likely cause."""
        super().__init__("the logits are infinite or not a number: the weights of the backbone or the experts are bad")


def next_tokens(rows: Sequences[tuple[Sequence, torch.Tensor]]) -> list[int | Exception]:
    """The next token of every sequence of a step, or its error. Errors do not affect other sequences.

    Random numbers are drawn on the CPU, so that a seed gives the same tokens on every device. The most likely tokens
    are computed on the device, once for all rows.

    Args:
        rows: each sequence (with its sampling parameters, tokens and random generator) and its logits_V, one row over
            the vocabulary.
    """
    chosen: list[int | Exception] = [NonFiniteLogitsError()] * len(rows)
    penalized: dict[int, torch.Tensor] = {}
    # The model's logits before the caller's sampling parameters, because only these indicate faulty experts.
    for index, (value, token_id) in enumerate(_highest([logits_V for _, logits_V in rows])):
        # The largest value is NaN if any value is NaN.
        if not math.isfinite(value):
            continue
        sequence, logits_V = rows[index]
        sampling = sequence.request.sampling
        try:
            if sampling.temperature > 0:
                chosen[index] = _draw(sequence, logits_V)
            elif sampling.repetition_penalty == 1.0:
                chosen[index] = token_id
            else:
                penalized[index] = _penalize(logits_V, sequence.token_ids, sampling.repetition_penalty)
        except Exception as error:
            chosen[index] = error
    for index, (_, token_id) in zip(penalized, _highest(list(penalized.values())), strict=True):
        chosen[index] = token_id
    return chosen


def _highest(rows: Sequences[torch.Tensor]) -> list[tuple[float, int]]:
    """The largest value of each row and its first index."""
    if not rows:
        return []
    if rows[0].is_cpu:
        # numpy's argmax takes a tenth of the time of torch's, and needs no copy.
        arrays = [row.numpy() for row in rows]
        return [(float(array[place]), place) for array in arrays for place in [int(array.argmax())]]
    return _highest_together(rows)


def _highest_together(rows: Sequences[torch.Tensor]) -> list[tuple[float, int]]:
    """Like `_highest`, with one synchronisation with the device."""
    highest = torch.stack(list(rows)).max(-1)
    # float64 represents every index exactly.
    pairs = torch.stack([highest.values.double(), highest.indices.double()], dim=1).tolist()
    return [(value, int(place)) for value, place in pairs]


def _draw(sequence: Sequence, logits_V: torch.Tensor) -> int:
    assert sequence.generator is not None
    probability_V = distribution(sequence.request.sampling, sequence.token_ids, logits_V)
    cumulative_V = probability_V.numpy().cumsum(dtype=np.float64)
    # Strictly below the sum, so that the found token has a probability above 0.
    height = min(sequence.generator.random() * cumulative_V[-1], np.nextafter(cumulative_V[-1], 0))
    return int(cumulative_V.searchsorted(height, side="right"))


def distribution(sampling: SamplingParams, token_ids: Sequences[int], logits_V: torch.Tensor) -> torch.Tensor:
    """The distribution at a temperature above 0: float32 probabilities over the vocabulary, on the CPU.

    Repetition penalty first (Keskar et al. 2019, arXiv 1909.05858, over prompt and answer), then temperature, top-k
    and top-p (Holtzman et al. 2020, arXiv 1904.09751), the order in which transformers applies them.

    Raises:
        NonFiniteLogitsError: the largest logit is infinite or NaN.
    """
    logits_V = _penalize(logits_V, token_ids, sampling.repetition_penalty).float().cpu()
    highest = logits_V.max()
    if not math.isfinite(float(highest)):
        raise NonFiniteLogitsError
    # Softmax is invariant to the shift, and a tiny temperature cannot overflow.
    logits_V = (logits_V - highest) / sampling.temperature
    if 0 < sampling.top_k < logits_V.numel():
        threshold = logits_V.topk(sampling.top_k).values[-1]
        logits_V = logits_V.masked_fill(logits_V < threshold, -torch.inf)
    if sampling.top_p < 1.0:
        logits_V = _nucleus(logits_V, sampling.top_p)
    return logits_V.softmax(-1)


def _penalize(logits_V: torch.Tensor, token_ids: Sequences[int], penalty: float) -> torch.Tensor:
    if penalty == 1.0:
        return logits_V
    # A token that occurs twice is written twice with the same value.
    seen = torch.tensor(token_ids, device=logits_V.device)
    score = logits_V[seen]
    largest = torch.finfo(score.dtype).max
    # Clamped, so that finite logits stay finite for any penalty.
    score = torch.where(score < 0, score * penalty, score / penalty).clamp(-largest, largest)
    return logits_V.index_copy(0, seen, score)


def _nucleus(logits_V: torch.Tensor, top_p: float) -> torch.Tensor:
    sorted_logits, order = logits_V.sort()
    # Summed from the least likely token on: sums from the other end are so close to 1 that float32 loses the
    # contributions of unlikely tokens, and a top_p near 1 would drop them all.
    dropped = sorted_logits.softmax(-1).cumsum(-1) <= 1.0 - top_p
    dropped[-1] = False
    return logits_V.index_fill(0, order[dropped], -torch.inf)
