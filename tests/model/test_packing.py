"""The packed layers compute what the stock ones do, take no more memory, and are used where they should be."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from echovlm_ray.model.checkpoint import load_backbone
from echovlm_ray.model.packing import MIN_OUT_FEATURES, PackedLinearLayer, pack_linears
from experts.kernels.onednn_product import MAX_ROWS, padded_rows
from experts.kernels.packed_linear import packing_available
from tests.split_golden import SplitGolden, split_golden

pytestmark = pytest.mark.skipif(not packing_available(torch.float32), reason="torch cannot pack weights here")


@pytest.fixture(scope="module")
def split_base(golden_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> SplitGolden:
    directory = tmp_path_factory.mktemp("split")
    return split_golden(golden_dir / "base" / "checkpoint", directory, {"breast": range(4)}, "organs")


def layers(dtype: torch.dtype) -> nn.Sequential:
    torch.manual_seed(0)
    narrow = nn.Sequential(nn.Linear(80, 2), nn.Linear(2, 64, bias=False))
    return nn.Sequential(nn.Linear(48, 80), nn.SiLU(), narrow).to(dtype)


GROWTH = """
import psutil, torch
from torch import nn
from echovlm_ray.model.packing import pack_linears, warm_up
from experts.kernels import packed_linear
from experts.kernels.onednn_product import OneDnnWeights
if ONEDNN:
    packed_linear._layout = lambda *_: OneDnnWeights
torch.set_num_threads(1)
model = nn.ModuleDict({"a": nn.Linear(64, 96), "b": nn.Linear(96, 64, bias=False), "lm_head": nn.Linear(64, 160)})
pack_linears(model)
products = warm_up(model, 8) if WARM else 0
def steps():
    for rows in range(1, 513):
        model["b"](model["a"](torch.ones(rows, 64)))
        model["lm_head"](torch.ones(min(rows, 8), 64))
before = psutil.Process().memory_info().rss
with torch.inference_mode():
    steps()
print(products, psutil.Process().memory_info().rss - before)
"""


def growth(*, warm: bool, onednn: bool) -> tuple[int, int]:
    """Products of the warm-up, and by how many bytes every number of rows made a new process grow afterwards."""
    code = GROWTH.replace("WARM", str(warm)).replace("ONEDNN", str(onednn))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    products, grown = done.stdout.split()
    return int(products), int(grown)


def test_no_size_of_a_step_is_compiled_after_the_warm_up() -> None:
    """What oneDNN compiles it keeps, so the memory tells. In processes that have compiled nothing before."""
    sizes, head_sizes = ({padded_rows(rows) for rows in range(1, most + 1)} for most in (MAX_ROWS, 8))
    _, cold = growth(warm=False, onednn=True)
    products, warmed = growth(warm=True, onednn=True)
    assert products == 2 * len(sizes) + len(head_sizes)
    assert cold > 6_000_000
    assert warmed < cold / 4


def test_whatever_is_chosen_here_does_not_grow_after_the_warm_up() -> None:
    assert growth(warm=True, onednn=False)[1] < 1_500_000


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_the_same_numbers_as_stock_layers(dtype: torch.dtype, tolerance: float) -> None:
    if not packing_available(dtype):
        pytest.skip(f"torch cannot pack {dtype} here")
    stock = layers(dtype)
    packed = copy.deepcopy(stock)
    # The one with two outputs stays as it is.
    assert pack_linears(packed) == 2
    x = torch.randn(3, 5, 48).to(dtype)
    with torch.inference_mode():
        torch.testing.assert_close(packed(x), stock(x), rtol=tolerance, atol=tolerance)
        assert packed(x[:0]).shape == (0, 5, 64)


def test_layers_of_the_backbone_are_packed_and_their_weights_release(split_base: SplitGolden) -> None:
    backbone = load_backbone(split_base.backbone)
    expected = [name for name, module in backbone.named_modules() if _large(module)]
    assert {name.rsplit(".", 1)[-1] for name in expected} >= {"q_proj", "o_proj", "gate_proj", "down_proj", "lm_head"}
    assert any("shared_expert" in name for name in expected)
    assert pack_linears(backbone) == len(expected)
    assert [name for name, module in backbone.named_modules() if isinstance(module, PackedLinearLayer)] == expected
    assert not any(_large(module) for module in backbone.modules())
    left = sum(parameter.nbytes for parameter in backbone.parameters())
    packed = sum(module.packed.nbytes for module in backbone.modules() if isinstance(module, PackedLinearLayer))
    whole = sum(parameter.nbytes for parameter in load_backbone(split_base.backbone).parameters())
    # The layers are tiny, so oneDNN's padding to whole blocks shows.
    assert whole <= left + packed <= 1.25 * whole


def test_rows_do_not_depend_on_their_number() -> None:
    packed = layers(torch.float32)
    pack_linears(packed)
    x = torch.randn(64, 48)
    with torch.inference_mode():
        first = packed[0]
        assert torch.equal(first(x), torch.cat([first(x[:1]), first(x[1:7]), first(x[7:])]))


def _large(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and module.out_features >= MIN_OUT_FEATURES
