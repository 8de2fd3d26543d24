"""Builds the inputs of one forward pass from the chunks of several sequences."""

from collections.abc import Sequence as Sequences
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from echovlm_ray.engine.attention import AttentionStep, SequenceSpan
from echovlm_ray.engine.kv_cache import KVCache
from echovlm_ray.engine.scheduler import Chunk
from router.dispatch.dispatcher import TokenAssignment


@dataclass(frozen=True, slots=True)
class StepBatch:
    """The inputs of a forward pass over T tokens.

    Attributes:
        chunks: the chunks, in the order of the rows.
        assignments: the same rows in the dispatcher's format.
        token_ids_T: int64.
        position_ids_31T: int64 mrope positions.
        attention: the plan of the attention.
        logit_spans: the rows [start, end) of each chunk whose logits are needed; often one, or none.
    """

    chunks: Sequences[Chunk]
    assignments: list[TokenAssignment]
    token_ids_T: torch.Tensor
    position_ids_31T: torch.Tensor
    attention: AttentionStep
    logit_spans: list[tuple[int, int]]

    @classmethod
    def of(cls, chunks: Sequences[Chunk], cache: KVCache) -> "StepBatch":
        """Concatenates the chunks."""
        num_tokens = sum(chunk.end - chunk.start for chunk in chunks)
        position_ids_3T = np.empty((3, num_tokens), dtype=np.int64)
        token_ids: list[int] = []
        assignments, spans, logit_spans = [], [], []
        row = 0
        for chunk in chunks:
            sequence, request = chunk.sequence, chunk.sequence.request
            end = row + chunk.end - chunk.start
            token_ids += sequence.token_ids[chunk.start : chunk.end]
            _fill_positions(position_ids_3T[:, row:end], chunk)
            assignments.append(TokenAssignment(row, end, request.expert_set_id, request.shares))
            spans.append(SequenceSpan(row, chunk.start, chunk.end, sequence.block_table, sequence.num_prompt))
            logit_spans.append(_logit_span(chunk, row, end))
            row = end
        return cls(
            chunks,
            assignments,
            torch.tensor(token_ids).to(cache.device),
            torch.from_numpy(position_ids_3T)[:, None].to(cache.device),
            AttentionStep.plan(cache, spans),
            logit_spans,
        )

    def place_vision(self, embeddings_TD: torch.Tensor) -> torch.Tensor:
        """The token embeddings with the embeddings of the images inserted."""
        for chunk, assignment in zip(self.chunks, self.assignments, strict=True):
            request = chunk.sequence.request
            if request.vision_rows_V is None or request.vision_embeddings_VD is None:
                continue
            if chunk.start >= chunk.sequence.num_prompt:
                continue
            first, last = torch.searchsorted(request.vision_rows_V, torch.tensor([chunk.start, chunk.end])).tolist()
            if last > first:
                rows = request.vision_rows_V[first:last] - chunk.start + assignment.start
                visual = request.vision_embeddings_VD[first:last].to(embeddings_TD)
                embeddings_TD = embeddings_TD.index_copy(0, rows.to(embeddings_TD.device), visual)
        return embeddings_TD

    def logit_rows(self, hidden_states_TD: torch.Tensor) -> torch.Tensor:
        """The rows whose logits are needed, in the order of the chunks."""
        spans = self.logit_spans
        if all(end - start == 1 for start, end in spans) and len(spans) == len(hidden_states_TD):
            return hidden_states_TD
        rows = [row for start, end in spans for row in range(start, end)]
        return hidden_states_TD.index_select(0, torch.tensor(rows, dtype=torch.int64).to(hidden_states_TD.device))


def split_chunks(chunks: Sequences[Chunk], parts: int) -> list[Sequences[Chunk]]:
    """Splits chunks into at most this many groups with similar numbers of tokens."""
    if parts == 1 or len(chunks) == 1:
        return [chunks]
    total = sum(chunk.end - chunk.start for chunk in chunks)
    groups: list[list[Chunk]] = [[] for _ in range(parts)]
    before = 0
    for chunk in chunks:
        count = chunk.end - chunk.start
        groups[min(parts - 1, (2 * before + count) * parts // (2 * total))].append(chunk)
        before += count
    return [group for group in groups if group]


def _fill_positions(position_ids_3T: npt.NDArray[np.int64], chunk: Chunk) -> None:
    sequence, request = chunk.sequence, chunk.sequence.request
    prompt = max(0, min(chunk.end, sequence.num_prompt) - chunk.start)
    if prompt:
        position_ids_3T[:, :prompt] = request.position_ids_3T[:, chunk.start : chunk.start + prompt].numpy()
    position_ids_3T[:, prompt:] = np.arange(chunk.start + prompt, chunk.end) + request.position_delta


def _logit_span(chunk: Chunk, start: int, end: int) -> tuple[int, int]:
    if chunk.sequence.request.return_logits:
        # After a stall, tokens are recomputed whose logits may have been returned already.
        again = min(max(chunk.sequence.num_logits - chunk.start, 0), chunk.end - chunk.start)
        return start + again, end
    return (end - 1, end) if chunk.reaches_last_token else (end, end)
