from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from echovlm_ray.checkpoint.backbone_dtype import compute_dtype
from echovlm_ray.checkpoint.layout import InvalidCheckpointError
from echovlm_ray.config import ModelSection
from echovlm_ray.model.checkpoint import load_backbone
from echovlm_ray.serving.cluster.served import expert_exchange
from tests.random_checkpoint import make_random


def stored_as(checkpoint: Path, dtype: torch.dtype) -> None:
    weights = checkpoint / "backbone" / "model.safetensors"
    save_file({name: tensor.to(dtype) for name, tensor in load_file(weights).items()}, weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_is_what_the_router_computes_in(tmp_path: Path, dtype: torch.dtype) -> None:
    make_random(tmp_path)
    stored_as(tmp_path, dtype)
    backbone = load_backbone(tmp_path)
    assert backbone.dtype == dtype
    exchange = expert_exchange(ModelSection(checkpoint=tmp_path))
    assert exchange.dtype == dtype
    assert exchange.top_k == backbone.config.text_config.num_experts_per_tok
    assert expert_exchange(ModelSection(checkpoint=tmp_path, dtype="bfloat16")).dtype == torch.bfloat16


def test_a_backbone_without_embeddings_is_named(tmp_path: Path) -> None:
    (tmp_path / "backbone").mkdir()
    save_file({"other": torch.ones(1)}, tmp_path / "backbone" / "model.safetensors")
    with pytest.raises(InvalidCheckpointError, match=r"has no model\.embed_tokens\.weight"):
        compute_dtype(tmp_path)
    save_file({"model.embed_tokens.weight": torch.ones(1).double()}, tmp_path / "backbone" / "model.safetensors")
    with pytest.raises(InvalidCheckpointError, match="is F64"):
        compute_dtype(tmp_path)
