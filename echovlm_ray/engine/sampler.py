"""Chooses the next token from the logits."""

import math
from collections.abc import Sequence as Sequences

import torch

from echovlm_ray.engine.sequence import SamplingParams, Sequence


class NonFiniteLogitsError(ArithmeticError):
    """The model computed infinity or NaN; whatever token were chosen would mean nothing."""

    def __init__(self) -> None:
        """The text names the likely cause."""
        super().__init__("the logits are infinite or not a number: the weights of the backbone or the experts are bad")


def next_token(sequence: Sequence, logits_V: torch.Tensor) -> int:
    """The next token of a sequence. Draws happen on the CPU, so that a seed gives the same tokens on every device.

    Args:
        sequence: its sampling parameters, tokens so far and random generator.
        logits_V: one row over the vocabulary.

    Raises:
        NonFiniteLogitsError: there is no most likely token.
    """
    sampling = sequence.request.sampling
    if sampling.temperature == 0:
        logits_V = _penalize(logits_V, sequence.token_ids, sampling.repetition_penalty)
        token_id = int(logits_V.argmax())
        _require_finite(logits_V[token_id])
        return token_id
    assert sequence.generator is not None
    probability_V = distribution(sampling, sequence.token_ids, logits_V)
    return int(torch.multinomial(probability_V, 1, generator=sequence.generator))


def distribution(sampling: SamplingParams, token_ids: Sequences[int], logits_V: torch.Tensor) -> torch.Tensor:
    """What a token is drawn from at a temperature above 0: float32 probabilities over the vocabulary, on the CPU.

    Repetition penalty first (Keskar et al. 2019, arXiv 1909.05858, over prompt and answer), then temperature, top-k
    and top-p (Holtzman et al. 2020, arXiv 1904.09751), the order in which transformers applies them.

    Raises:
        NonFiniteLogitsError: the largest logit is infinite or NaN.
    """
    logits_V = _penalize(logits_V, token_ids, sampling.repetition_penalty).float().cpu()
    highest = logits_V.max()
    _require_finite(highest)
    # Softmax does not change by the shift, and a tiny temperature cannot overflow.
    logits_V = (logits_V - highest) / sampling.temperature
    if 0 < sampling.top_k < logits_V.numel():
        threshold = logits_V.topk(sampling.top_k).values[-1]
        logits_V = logits_V.masked_fill(logits_V < threshold, -torch.inf)
    if sampling.top_p < 1.0:
        logits_V = _nucleus(logits_V, sampling.top_p)
    return logits_V.softmax(-1)


def _require_finite(highest: torch.Tensor) -> None:
    # The largest value is NaN as soon as any is.
    if not math.isfinite(float(highest)):
        raise NonFiniteLogitsError


def _penalize(logits_V: torch.Tensor, token_ids: Sequences[int], penalty: float) -> torch.Tensor:
    if penalty == 1.0:
        return logits_V
    seen = torch.tensor(sorted(set(token_ids)), device=logits_V.device)
    score = logits_V[seen]
    return logits_V.index_copy(0, seen, torch.where(score < 0, score * penalty, score / penalty))


def _nucleus(logits_V: torch.Tensor, top_p: float) -> torch.Tensor:
    sorted_logits, order = logits_V.sort(descending=True)
    probability = sorted_logits.softmax(-1)
    # Drops a token when those before it already reach top_p; the first is always kept.
    dropped = probability.cumsum(-1) - probability >= top_p
    return logits_V.index_fill(0, order[dropped], -torch.inf)
