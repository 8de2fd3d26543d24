"""A fused layer equals the model's layer, stores no weight twice, and two half batches equal the whole batch."""

import copy
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from echovlm_ray.engine.attention import AttentionStep, SequenceSpan
from echovlm_ray.engine.compiled_layers import CompiledDensePath
from echovlm_ray.engine.concatenate import concatenated
from echovlm_ray.engine.dense_path import FusedDensePath
from echovlm_ray.engine.fused_layers import fuse_layers
from echovlm_ray.engine.kv_cache import KVCache
from echovlm_ray.engine.scheduler import Chunk
from echovlm_ray.engine.sequence import Sequence as EngineSequence
from echovlm_ray.engine.sequence import SequenceRequest
from echovlm_ray.engine.step_batch import split_chunks
from echovlm_ray.model.checkpoint import load_backbone
from echovlm_ray.model.packing import pack_linears
from experts.kernels.cpu.library import VARIANTS
from tests.cpu_variants import choose_variant, need_library
from tests.engines import engine_request, local_experts, remote_experts, run_together, running_engine
from tests.expert_servers import server_thread
from tests.golden_cases import golden_rows
from tests.split_golden import SplitGolden, split_golden


@pytest.fixture(scope="module")
def split_base(golden_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> SplitGolden:
    directory = tmp_path_factory.mktemp("split")
    return split_golden(golden_dir / "base" / "checkpoint", directory, {"breast": range(4)}, "organs")


def test_joined_layers_give_the_outputs_of_each() -> None:
    linears = [nn.Linear(8, 5), nn.Linear(8, 3, bias=False), nn.Linear(8, 1)]
    x = torch.randn(4, 8)
    expected = torch.cat([linear(x) for linear in linears], dim=1)
    joined = concatenated(linears)
    torch.testing.assert_close(joined(x), expected)
    assert not any(linear.weight.numel() for linear in linears)


@pytest.mark.parametrize("fused", [FusedDensePath, CompiledDensePath])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_beside_experts_as_the_layer_itself(
    split_base: SplitGolden, dtype: torch.dtype, fused: type[FusedDensePath]
) -> None:
    if fused is CompiledDensePath:
        need_library()
    layer = load_backbone(split_base.backbone, dtype=dtype).model.language_model.layers[0]
    x, hidden_states = torch.randn(2, 1, 9, layer.hidden_size).to(dtype)
    routed_TD = torch.randn(9, layer.hidden_size).to(dtype)
    with torch.inference_mode():
        expected = copy.deepcopy(layer)._dense_path(x).mix(hidden_states, routed_TD)
        found = fused(layer)(x).mix(hidden_states, routed_TD)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_as_with_torchs_operators(
    split_base: SplitGolden, dtype: torch.dtype, packed: bool, variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two sequences begin, the first goes on, and a third begins beside it."""
    choose_variant(monkeypatch, variant)
    model = load_backbone(split_base.backbone, dtype=dtype).model.language_model
    config = model.config
    hidden_states = torch.randn(1, 60, config.hidden_size, generator=torch.Generator().manual_seed(0)).to(dtype)
    steps = [
        [SequenceSpan(0, 0, 19, [3, 0], 19), SequenceSpan(19, 0, 5, [1], 5)],
        [SequenceSpan(0, 19, 20, [3, 0], 19), SequenceSpan(1, 0, 33, [2, 5, 4], 33), SequenceSpan(34, 5, 6, [1], 5)],
    ]

    def outputs(*, compiled: bool) -> list[torch.Tensor]:
        own = copy.deepcopy(model)
        fuse_layers(own, compiled=compiled)
        if packed:
            pack_linears(own)
        layer = own.layers[0]
        cache = KVCache(
            num_layers=1,
            num_blocks=6,
            num_key_value_heads=config.num_key_value_heads,
            head_dim=config.hidden_size // config.num_attention_heads,
            dtype=dtype,
            device=torch.device("cpu"),
            compiled=compiled,
        )
        found: list[torch.Tensor] = []
        for spans in steps:
            positions_T = torch.cat([torch.arange(span.start, span.end) for span in spans])
            x = hidden_states[:, : len(positions_T)]
            rotation = own.rotary_emb(x, positions_T.expand(3, 1, -1))
            step = AttentionStep.plan(cache, spans)
            attends = layer.attention_override or layer._attention
            found += attends(x, position_embeddings=rotation, attention_step=step)
        return [*found, cache.key_LSHD, cache.value_LSHD]

    with torch.inference_mode():
        for found, expected in zip(outputs(compiled=True), outputs(compiled=False), strict=True):
            tolerance = 1e-5 if dtype == torch.float32 else 3e-2
            torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


def test_no_weight_is_held_twice(split_base: SplitGolden) -> None:
    whole = load_backbone(split_base.backbone)
    before = sum(parameter.nbytes for parameter in whole.parameters())
    fuse_layers(whole.model.language_model, compiled=False)
    # Zeros where a joined layer had no bias are all that came in addition.
    assert before <= sum(parameter.nbytes for parameter in whole.parameters()) < 1.01 * before


def test_another_activation_is_refused(split_base: SplitGolden) -> None:
    model = load_backbone(split_base.backbone).model.language_model
    model.config.hidden_act = "gelu"
    with pytest.raises(ValueError, match="gelu"):
        fuse_layers(model, compiled=False)


def chunk(tokens: int) -> Chunk:
    request = SequenceRequest(
        input_ids=(1,) * tokens,
        position_ids_3T=torch.arange(tokens).expand(3, -1),
        position_delta=0,
        expert_set_id="",
        shares=(),
        max_new_tokens=1,
    )
    return Chunk(EngineSequence.start(request, lambda _: None, ()), 0, tokens)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=12), st.integers(1, 4))
def test_parts_of_a_step_keep_the_order_and_are_about_equal(counts: list[int], parts: int) -> None:
    chunks = [chunk(count) for count in counts]
    groups = split_chunks(chunks, parts)
    assert [one for group in groups for one in group] == chunks
    assert all(groups)
    assert len(groups) <= parts
    tokens = [sum(one.end - one.start for one in group) for group in groups]
    if parts == 2 and len(groups) == 2:
        assert abs(tokens[0] - tokens[1]) <= 2 * max(counts)


@pytest.mark.parametrize("placement", ["local", "remote"])
def test_two_micro_batches_give_the_tokens_of_one(golden_dir: Path, split_base: SplitGolden, placement: str) -> None:
    checkpoint = golden_dir / "base" / "checkpoint"
    rows = list(golden_rows(golden_dir, "base"))[:5]
    requests = [engine_request(row, split_base, checkpoint, (("breast", 1.0),), return_logits=False) for row in rows]

    def tokens(micro_batches: int) -> Sequence[list[int]]:
        with server_thread() as servers:
            experts = local_experts(split_base) if placement == "local" else remote_experts(split_base, servers)
            with running_engine(split_base, experts, micro_batches=micro_batches) as engine:
                return [answer.token_ids for answer in run_together(engine, requests)]

    assert tokens(2) == tokens(1)
