"""Runs one step of the backbone over the chunks of several sequences."""

from collections.abc import Sequence as Sequences
from dataclasses import dataclass

import torch

from echovlm_ray.engine.attention import PAGED_ATTENTION, AttentionStep, span_of
from echovlm_ray.engine.kv_cache import BLOCK_SIZE, BlockPool, KVCache
from echovlm_ray.engine.packing import pack_linears
from echovlm_ray.engine.scheduler import Chunk
from echovlm_ray.engine.sequence import Sequence
from echovlm_ray.model.modeling import EchoVLMForConditionalGeneration
from router.dispatch import Dispatcher, DispatchFailure, TokenAssignment
from router.errors import ExpertsUnavailableError


@dataclass(frozen=True, slots=True)
class ChunkResult:
    """What a step made of one chunk.

    Attributes:
        logits_TV: float32; with `return_logits` all rows whose logits were not given yet, else the last one if the
            chunk reaches the last token.
        routed_pairs: (token, layer, expert) pairs per organ.
        failure: why its experts did not compute the chunk; then the rest means nothing.
    """

    logits_TV: torch.Tensor | None
    routed_pairs: dict[str, int]
    failure: DispatchFailure | None


class ModelRunner:
    """The backbone, the cache it fills, and the dispatcher that computes its experts elsewhere."""

    def __init__(
        self,
        model: EchoVLMForConditionalGeneration,
        dispatcher: Dispatcher,
        *,
        kv_cache_tokens: int,
        packed_linears: bool = True,
    ) -> None:
        """Takes the model over: its attention becomes paged and, on a CPU, its linear layers packed.

        Args:
            model: a backbone without experts of its own.
            dispatcher: computes the experts.
            kv_cache_tokens: how many tokens the cache holds.
            packed_linears: False leaves the linear layers as they are, to compare.

        Raises:
            ValueError: the model uses sliding-window attention, which the paged cache does not do.
        """
        config = model.config.text_config
        if config.use_sliding_window:
            raise ValueError("the checkpoint has use_sliding_window: true; the engine serves full attention only")
        config._attn_implementation = PAGED_ATTENTION
        # Asked first: a packed layer has no weights that torch could see.
        dtype, self.device = model.dtype, model.device
        if packed_linears:
            pack_linears(model)
        self.model = model
        self.dispatcher = dispatcher
        self.num_blocks = BlockPool.blocks_for(kv_cache_tokens)
        self.max_tokens = self.num_blocks * BLOCK_SIZE
        self.cache = KVCache(
            num_layers=config.num_hidden_layers,
            num_blocks=self.num_blocks,
            # Without the field every head has keys and values of its own.
            num_key_value_heads=config.num_key_value_heads or config.num_attention_heads,
            head_dim=config.hidden_size // config.num_attention_heads,
            dtype=dtype,
            device=self.device,
        )

    def unavailable(self, sequence: Sequence) -> ExpertsUnavailableError | None:
        """Why a sequence's experts cannot be reached now, or None; never waits."""
        return self.dispatcher.unavailable(sequence.request.shares)

    @torch.inference_mode()
    def step(self, chunks: Sequences[Chunk]) -> list[ChunkResult]:
        """Computes the chunks together; each sees its own cache and its own expert set only."""
        assignments, spans, slots, positions, embeddings = [], [], [], [], []
        row = 0
        for chunk in chunks:
            sequence = chunk.sequence
            count = chunk.end - chunk.start
            request = sequence.request
            assignments.append(TokenAssignment(row, row + count, request.expert_set_id, request.shares))
            spans.append(span_of(self.cache, sequence.block_table, row, chunk.start, chunk.end))
            slots.append(self.cache.slots(sequence.block_table, chunk.start, chunk.end))
            positions.append(_positions(chunk))
            embeddings.append(self._embed(chunk))
            row += count
        experts = self.dispatcher.step(assignments)
        hidden_states = self.model.model.language_model(
            inputs_embeds=torch.cat(embeddings)[None],
            position_ids=torch.cat(positions, dim=1)[:, None].to(self.device),
            # A mapping that is ready made: no mask is built, the spans say who sees what.
            attention_mask={"full_attention": None},
            use_cache=False,
            routed_experts=experts,
            attention_step=AttentionStep(self.cache, torch.cat(slots), tuple(spans)),
        ).last_hidden_state[0]
        rows = [_logit_rows(chunk, assignment) for chunk, assignment in zip(chunks, assignments, strict=True)]
        logits = self.model.lm_head(torch.cat([hidden_states[start:end] for start, end in rows])).float()
        results = []
        offset = 0
        for index, (start, end) in enumerate(rows):
            own = logits[offset : offset + end - start] if end > start else None
            offset += end - start
            results.append(ChunkResult(own, experts.pair_counts(index), experts.failures.get(index)))
        return results

    def _embed(self, chunk: Chunk) -> torch.Tensor:
        request = chunk.sequence.request
        token_ids = torch.tensor(chunk.sequence.token_ids[chunk.start : chunk.end], device=self.device)
        embeddings_TD: torch.Tensor = self.model.get_input_embeddings()(token_ids)
        if request.vision_rows_V is not None and request.vision_embeddings_VD is not None:
            first, last = torch.searchsorted(request.vision_rows_V, torch.tensor([chunk.start, chunk.end])).tolist()
            if last > first:
                rows = request.vision_rows_V[first:last] - chunk.start
                visual = request.vision_embeddings_VD[first:last].to(embeddings_TD)
                embeddings_TD = embeddings_TD.index_copy(0, rows.to(self.device), visual)
        return embeddings_TD


def _positions(chunk: Chunk) -> torch.Tensor:
    sequence = chunk.sequence
    request = sequence.request
    prompt = request.position_ids_3T[:, chunk.start : chunk.end]
    start = max(chunk.start, sequence.num_prompt)
    generated = torch.arange(start, max(chunk.end, start)) + request.position_delta
    return torch.cat([prompt, generated.expand(3, -1)], dim=1)


def _logit_rows(chunk: Chunk, assignment: TokenAssignment) -> tuple[int, int]:
    if chunk.sequence.request.return_logits:
        # After a stall tokens may be computed again whose logits were given already.
        again = min(max(chunk.sequence.num_logits - chunk.start, 0), chunk.end - chunk.start)
        return assignment.start + again, assignment.end
    if chunk.reaches_last_token:
        return assignment.end - 1, assignment.end
    return assignment.end, assignment.end
