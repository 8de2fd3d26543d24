"""Chooses the next token from the logits."""

import torch

from echovlm_ray.engine.sequence import Sequence


def next_token(sequence: Sequence, logits_V: torch.Tensor) -> int:
    """The next token of a sequence.

    Repetition penalty first (Keskar et al. 2019, arXiv 1909.05858, over prompt and answer), then temperature, top-k
    and top-p (Holtzman et al. 2020, arXiv 1904.09751), the order in which transformers applies them. Draws happen on
    the CPU, so that a seed gives the same tokens on every device.

    Args:
        sequence: its sampling parameters, tokens so far and random generator.
        logits_V: one row over the vocabulary.
    """
    sampling = sequence.request.sampling
    if sampling.repetition_penalty != 1.0:
        logits_V = _penalize(logits_V, sequence.token_ids, sampling.repetition_penalty)
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    assert sequence.generator is not None
    logits_V = logits_V.float().cpu() / sampling.temperature
    if 0 < sampling.top_k < logits_V.numel():
        threshold = logits_V.topk(sampling.top_k).values[-1]
        logits_V = logits_V.masked_fill(logits_V < threshold, -torch.inf)
    if sampling.top_p < 1.0:
        logits_V = _nucleus(logits_V, sampling.top_p)
    return int(torch.multinomial(logits_V.softmax(-1), 1, generator=sequence.generator))


def _penalize(logits_V: torch.Tensor, token_ids: list[int], penalty: float) -> torch.Tensor:
    seen = torch.tensor(sorted(set(token_ids)), device=logits_V.device)
    score = logits_V[seen]
    return logits_V.index_copy(0, seen, torch.where(score < 0, score * penalty, score / penalty))


def _nucleus(logits_V: torch.Tensor, top_p: float) -> torch.Tensor:
    sorted_logits, order = logits_V.sort(descending=True)
    probability = sorted_logits.softmax(-1)
    # Drops a token when those before it already reach top_p; the first is always kept.
    dropped = probability.cumsum(-1) - probability >= top_p
    return logits_V.index_fill(0, order[dropped], -torch.inf)
