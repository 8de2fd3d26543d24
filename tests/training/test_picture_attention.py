"""The vision tower as it is trained gives what transformers' gives, with the same weights under the same names."""

from pathlib import Path

import pytest
import torch
from torch import nn

from echovlm_ray.model.modeling import EchoVLMForConditionalGeneration
from echovlm_ray.training.picture_attention import PatchProduct, PictureAttention, look_for_training
from tests.training.support import tiny_model


def looked_at(model: EchoVLMForConditionalGeneration, grids: list[list[int]]) -> torch.Tensor:
    visual = model.model.visual
    assert visual is not None
    grid = torch.tensor(grids)
    weight = visual.patch_embed.proj.weight
    patches = torch.randn(int(grid.prod(dim=1).sum()), weight[0].numel(), generator=torch.Generator().manual_seed(5))
    embeddings: torch.Tensor = visual(patches, grid_thw=grid).pooler_output
    return embeddings


def gradients(model: EchoVLMForConditionalGeneration) -> dict[str, torch.Tensor]:
    return {name: value.grad for name, value in model.named_parameters() if value.grad is not None}


@pytest.mark.parametrize(
    "grids",
    [
        pytest.param([[1, 4, 4], [1, 4, 4], [1, 4, 4]], id="of one size"),
        pytest.param([[1, 4, 4], [1, 2, 6]], id="of different sizes"),
        pytest.param([[2, 4, 2], [1, 4, 2]], id="frames of a loop"),
        pytest.param([[1, 6, 2]], id="one"),
    ],
)
def test_what_is_seen_and_learnt_is_that_of_transformers(start: Path, grids: list[list[int]]) -> None:
    theirs, ours = tiny_model(start), tiny_model(start)
    look_for_training(ours)
    assert isinstance(ours.model.visual.blocks[0].attn, PictureAttention)
    assert isinstance(ours.model.visual.patch_embed, PatchProduct)
    found = [looked_at(model, grids) for model in (theirs, ours)]
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)
    for embeddings in found:
        (embeddings * torch.linspace(-1, 1, embeddings.shape[-1])).sum().backward()
    expected, learnt = gradients(theirs), gradients(ours)
    assert expected.keys() == learnt.keys()
    assert "model.visual.patch_embed.proj.weight" in learnt
    assert "model.visual.blocks.0.attn.qkv.weight" in learnt
    for name, value in expected.items():
        assert (learnt[name] - value).norm() <= 1e-3 * value.norm() + 1e-6, name


def test_twice_is_once(start: Path) -> None:
    model = tiny_model(start)
    look_for_training(model)
    names = list(model.state_dict())
    look_for_training(model)
    assert names == list(model.state_dict()) == list(tiny_model(start).state_dict())


def test_an_adapted_convolution_stays_whole(start: Path) -> None:
    model = tiny_model(start)
    assert model.model.visual is not None
    convolution = model.model.visual.patch_embed.proj
    model.model.visual.patch_embed.proj = nn.Sequential(convolution)
    look_for_training(model)
    assert not isinstance(model.model.visual.patch_embed, PatchProduct)
