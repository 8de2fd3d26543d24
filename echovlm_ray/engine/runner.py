"""Runs one step of the backbone over the chunks of several sequences."""

from collections.abc import Callable
from collections.abc import Sequence as Sequences
from dataclasses import dataclass

import torch

from echovlm_ray.engine.compiled import use_compiled
from echovlm_ray.engine.fused_layers import fuse_layers
from echovlm_ray.engine.kv_cache import BLOCK_SIZE, BlockPool, KVCache
from echovlm_ray.engine.scheduler import Chunk
from echovlm_ray.engine.sequence import Sequence
from echovlm_ray.engine.step_batch import StepBatch, split_chunks
from echovlm_ray.model.modeling import EchoVLMForConditionalGeneration
from echovlm_ray.model.packing import pack_linears
from echovlm_ray.model.text_model import ForwardPart
from router.dispatch.dispatcher import Dispatcher, DispatchFailure, DispatchStep
from router.dispatch.routed_experts import PendingExperts, RoutedExperts
from router.errors import ExpertsUnavailableError


@dataclass(frozen=True, slots=True)
class ChunkResult:
    """The result of one chunk in a step.

    Attributes:
        logits_TV: float32; with `return_logits` all rows whose logits were not returned yet, otherwise the last row if
            the chunk reaches the last token.
        routed_pairs: (token, layer, expert) pairs per organ.
        failure: why the chunk's experts failed; the other fields are then undefined.
        row_pairs: the pairs of each token, if they may differ between tokens: several tokens of a flat set.
    """

    logits_TV: torch.Tensor | None
    routed_pairs: dict[str, int]
    failure: DispatchFailure | None
    row_pairs: dict[str, list[int]] | None = None


class ModelRunner:
    """The backbone, its KV cache, and the dispatcher for its experts."""

    def __init__(
        self,
        model: EchoVLMForConditionalGeneration,
        dispatcher: Dispatcher,
        *,
        kv_cache_tokens: int,
        compiled: bool = True,
        micro_batches: int = 1,
    ) -> None:
        """Modifies the model: fuses its layers, makes its attention paged and, on a CPU, packs its linear layers.

        Args:
            model: a backbone without routed experts.
            dispatcher: computes the experts.
            kv_cache_tokens: how many tokens the cache holds.
            compiled: False leaves the small arithmetic to torch's operators, to compare; they also do it where the C
                library does not, see `echovlm_ray.engine.compiled.use_compiled`.
            micro_batches: 2 computes a step in two halves, so that the experts of one work during the attention of
                the other. It pays where an exchange takes longer than the dense MLP and the shared expert.

        Raises:
            ValueError: the model uses sliding-window attention, which the paged cache does not support.
        """
        config = model.config.text_config
        if config.use_sliding_window:
            raise ValueError("the checkpoint has use_sliding_window: true; the engine serves full attention only")
        # Read first, because a packed layer has no torch weights.
        dtype, self.device = model.dtype, model.device
        compiled = compiled and use_compiled(dtype, self.device)
        fuse_layers(model.model.language_model, compiled=compiled)
        pack_linears(model)
        self.model = model
        self.dispatcher = dispatcher
        self.micro_batches = micro_batches
        self.num_blocks = BlockPool.blocks_for(kv_cache_tokens)
        self.max_tokens = self.num_blocks * BLOCK_SIZE
        self.cache = KVCache(
            num_layers=config.num_hidden_layers,
            num_blocks=self.num_blocks,
            # Without the field every head has its own keys and values.
            num_key_value_heads=config.num_key_value_heads or config.num_attention_heads,
            head_dim=config.hidden_size // config.num_attention_heads,
            dtype=dtype,
            device=self.device,
            compiled=compiled,
        )

    def unavailable(self, sequence: Sequence) -> ExpertsUnavailableError | None:
        """Why a sequence's experts are unavailable now, or None. Does not block."""
        return self.dispatcher.unavailable(sequence.request.shares)

    @torch.inference_mode()
    def step(self, chunks: Sequences[Chunk], meanwhile: Callable[[], None] | None = None) -> list[ChunkResult]:
        """Computes the chunks together, each with its own cache and expert set.

        Args:
            chunks: the chunks.
            meanwhile: called once, when the first layer's experts are running and a long product is about to begin,
                so that threads that it wakes do not delay this one.
        """
        batches = [StepBatch.of(part, self.cache) for part in split_chunks(chunks, self.micro_batches)]
        experts = [self.dispatcher.step(batch.assignments) for batch in batches]
        routed: list[RoutedExperts] = [*experts]
        if meanwhile is not None:
            routed[-1] = _Meanwhile(routed[-1], meanwhile)
        embed = self.model.get_input_embeddings()
        hidden_states = self.model.model.language_model.forward_side_by_side(
            [
                ForwardPart(
                    batch.place_vision(embed(batch.token_ids_T))[None],
                    batch.position_ids_31T,
                    step,
                    {"attention_step": batch.attention},
                )
                for batch, step in zip(batches, routed, strict=True)
            ]
        )
        results = []
        for batch, step, hidden in zip(batches, experts, hidden_states, strict=True):
            logits_LV = self.model.lm_head(batch.logit_rows(hidden[0])).float()
            results += _results(batch, step, logits_LV)
        return results


class _Meanwhile:
    """Wraps routed experts, and calls a function when those of the first layer have begun."""

    def __init__(self, experts: RoutedExperts, call: Callable[[], None]) -> None:
        self._experts = experts
        self._call: Callable[[], None] | None = call

    def begin(self, layer: int, x_TD: torch.Tensor) -> PendingExperts:
        pending = self._experts.begin(layer, x_TD)
        if (call := self._call) is not None:
            self._call = None
            call()
        return pending


def _results(batch: StepBatch, step: DispatchStep, logits_LV: torch.Tensor) -> list[ChunkResult]:
    results = []
    offset = 0
    for index, (start, end) in enumerate(batch.logit_spans):
        own = logits_LV[offset : offset + end - start] if end > start else None
        offset += end - start
        assignment = batch.assignments[index]
        varies = assignment.end - assignment.start > 1 and not assignment.shares
        row_pairs = step.row_pair_counts(index) if varies else None
        results.append(ChunkResult(own, step.pair_counts(index), step.failures.get(index), row_pairs))
    return results
