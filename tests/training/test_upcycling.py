"""An upcycled model computes what the dense one does, and everything in it learns."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from echovlm_ray.checkpoint.layout import InvalidCheckpointError
from echovlm_ray.model.modeling import EchoVLMForConditionalGeneration
from echovlm_ray.training.batches import collate
from echovlm_ray.training.objective import TrainingObjective
from echovlm_ray.training.parts import part_of
from echovlm_ray.training.recipe import PARTS, UpcyclingSection
from echovlm_ray.training.start import find_start, save_model
from echovlm_ray.training.upcycling import is_dense, upcycle
from tests.training.support import encoded, write_start

SECTION = UpcyclingSection(num_experts=4, num_experts_per_tok=2, expert_size=16, shared_expert_size=24)


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def dense(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen2-VL as transformers writes it."""
    folder = write_start(tmp_path_factory.mktemp("dense") / "qwen2-vl", tie_word_embeddings=request.param)
    torch.manual_seed(5)
    config = Qwen2VLConfig.from_pretrained(folder)
    model: Any = Qwen2VLForConditionalGeneration(config)
    model.save_pretrained(folder)
    return folder


@torch.no_grad()
def logits_of(model: Any, folder: Path, records: Path) -> torch.Tensor:
    """Of all tokens of three records."""
    rows = []
    for example in encoded(folder, records)[:3]:
        batch = collate([example])
        names = ("input_ids", "position_ids", "pixel_values", "image_grid_thw")
        rows.append(model.eval()(**{name: batch[name] for name in names}).logits[0])
    return torch.cat(rows)


def test_step_zero_is_the_dense_model(dense: Path, records: Path) -> None:
    original = Qwen2VLForConditionalGeneration.from_pretrained(dense, dtype=torch.float32)
    upcycled = upcycle(dense, SECTION, seed=1)
    found = logits_of(upcycled, dense, records)
    torch.testing.assert_close(found, logits_of(original, dense, records), rtol=1e-5, atol=1e-5)
    # The layers' own arithmetic is exact: half of a doubled product, and nothing added.
    hidden = torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(2))
    ours: Any = upcycled.model.language_model.layers[0]
    theirs: Any = original.model.language_model.layers[0]
    with torch.no_grad():
        under_way = ours._dense_path(hidden)
        routed = ours.moe.begin(0, hidden.reshape(-1, 32)).result()
        assert torch.equal(under_way.mix(torch.zeros_like(hidden), routed), theirs.mlp(hidden))


def test_what_is_not_preserved_disturbs(dense: Path, records: Path) -> None:
    original = Qwen2VLForConditionalGeneration.from_pretrained(dense, dtype=torch.float32)
    section = SECTION.model_copy(update={"preserve": False})
    disturbed = logits_of(upcycle(dense, section, seed=1), dense, records)
    assert not torch.allclose(disturbed, logits_of(original, dense, records), atol=1e-3)


def test_every_part_has_a_gradient_at_once_and_every_tensor_after_a_step(dense: Path, records: Path) -> None:
    objective = TrainingObjective(upcycle(dense, SECTION, seed=1), balancing=0.1)
    batch = collate(encoded(dense, records)[:3])
    objective(**batch)["loss"].backward()
    moved = {
        part_of(name)
        for name, value in objective.model.named_parameters()
        if value.grad is not None and value.grad.any()
    }
    tied = objective.model.config.tie_word_embeddings
    assert moved == set(PARTS) - ({"head"} if tied else set())
    optimizer = torch.optim.SGD(objective.parameters(), lr=0.1)
    optimizer.step()
    optimizer.zero_grad()
    objective(**batch)["loss"].backward()
    still = [name for name, value in objective.named_parameters() if value.grad is None or not value.grad.any()]
    assert still == []


def test_experts_differ_by_what_is_drawn_anew(dense: Path) -> None:
    whole = UpcyclingSection(num_experts=2, num_experts_per_tok=1, expert_size=48, shared_expert_size=48, redrawn=0.5)
    mlp = Qwen2VLForConditionalGeneration.from_pretrained(dense, dtype=torch.float32).model.language_model.layers[0].mlp
    rows = {tuple(row.tolist()) for row in mlp.gate_proj.weight}
    model = upcycle(dense, whole, seed=1)
    moe: Any = model.model.language_model.layers[0].moe
    for expert in range(2):
        kept = [tuple(row.tolist()) in rows for row in moe.experts.gate_up_proj[expert][:48]]
        assert sum(kept) == 24
    assert not torch.equal(moe.experts.gate_up_proj[0], moe.experts.gate_up_proj[1])
    assert {tuple(row.tolist()) for row in moe.shared_expert.gate_proj.weight} == rows
    again: Any = upcycle(dense, whole, seed=1).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in model.state_dict().items())
    other: Any = upcycle(dense, whole, seed=2).state_dict()
    assert any(not torch.equal(value, other[name]) for name, value in model.state_dict().items())


def test_experts_may_be_larger_than_the_dense_mlp(dense: Path, records: Path) -> None:
    section = SECTION.model_copy(update={"shared_expert_size": 100})
    assert logits_of(upcycle(dense, section, seed=1), dense, records).isfinite().all()


def test_an_upcycled_model_is_saved_and_read_in_the_released_layout(dense: Path, records: Path, tmp_path: Path) -> None:
    model = upcycle(dense, SECTION, seed=1)
    save_model(model, dense, tmp_path / "model", dtype=torch.float32)
    again = EchoVLMForConditionalGeneration.from_pretrained(tmp_path / "model")
    assert again.config.text_config.moe_intermediate_size == 16
    assert torch.equal(logits_of(again, dense, records), logits_of(model, dense, records))
    assert not is_dense(tmp_path / "model")
    assert find_start(tmp_path / "model", fresh=False).kind == "trained"
    with pytest.raises(InvalidCheckpointError, match="has experts already"):
        upcycle(tmp_path / "model", SECTION, seed=1)


def test_what_is_no_start_is_refused(tmp_path: Path, dense: Path) -> None:
    assert find_start(dense, fresh=False).kind == "dense"
    with pytest.raises(InvalidCheckpointError, match=r"no config\.json"):
        find_start(tmp_path, fresh=False)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(InvalidCheckpointError, match="model_type is 'llama'"):
        find_start(tmp_path, fresh=False)
