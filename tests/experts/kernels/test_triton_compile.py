"""Every Triton kernel that is launched compiles for Hopper (sm_90), at the released sizes, without a GPU."""

from typing import Any

import pytest

from experts.kernels.registry import get_kernel
from tests.experts.kernels.compile_for import HOPPER, Launch, compile_for
from tests.experts.kernels.triton_only import NEEDS_COMPILER, take_one_configuration

pytestmark = NEEDS_COMPILER

HIDDEN = 3584
INNERS = (1408, 18944)
EXPERTS = 4


def small(name: str, dtype: str, inner: int, tokens: int, transposed: bool = False) -> Launch:
    import torch

    from experts.kernels import triton_swiglu
    from experts.kernels.triton_small import _tiles

    pointers = {
        "gate_up_kernel": ("x_ptr", "gate_ptr", "up_ptr", "inner_ptr"),
        "down_kernel": ("inner_ptr", "down_ptr", "output_ptr"),
        "combine_kernel": ("output_ptr", "weight_ptr", "sum_ptr"),
    }[name]
    types = dict.fromkeys(pointers, f"*{dtype}") | {"expert_ptr": "*i32", "tokens": "i32"}
    if name == "combine_kernel":
        types |= {"experts": "i32", "top_k": "i32"}
        return Launch(triton_swiglu.combine_kernel, types, {"HIDDEN": HIDDEN, "BLOCK_D": 512})
    torch_dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    outputs = inner if name == "gate_up_kernel" else HIDDEN
    tiles = _tiles(EXPERTS * outputs, torch_dtype)
    constants: dict[str, Any] = {"EXPERT_STRIDE": HIDDEN * inner, "HIDDEN": HIDDEN, "INNER": inner, "PAIRS": 2 * tokens}
    constants["BLOCK_T"] = 16 if tokens <= 16 else 32
    if name == "gate_up_kernel":
        constants |= {"ROW_STRIDE": HIDDEN, "BLOCK_F": tiles.outputs, "BLOCK_D": tiles.inputs}
    else:
        constants |= {"D_STRIDE": inner, "F_STRIDE": 1, "BLOCK_F": tiles.inputs, "BLOCK_D": tiles.outputs}
        if transposed:
            constants |= {"D_STRIDE": 1, "F_STRIDE": HIDDEN}
    kernel = getattr(triton_swiglu, name)
    return Launch(kernel, types | {"pairs": "i32"}, constants, tiles.warps, tiles.stages)


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("tokens", [1, 16, 32])
@pytest.mark.parametrize("inner", INNERS)
@pytest.mark.parametrize("name", ["gate_up_kernel", "down_kernel", "combine_kernel"])
def test_triton_small(name: str, inner: int, tokens: int, dtype: str) -> None:
    compiled = compile_for(small(name, dtype, inner, tokens))
    assert compiled["cubin"][:4] == b"\x7fELF"
    if name != "combine_kernel":
        # Weights are loaded 16 bytes at a time, several tiles ahead of their use.
        assert "cp.async.cg.shared.global" in compiled["ptx"]
        # In float32 with no rounding on the way in.
        assert ("mma.sync" in compiled["ptx"]) == (dtype != "fp32")
        assert "tf32" not in compiled["ptx"]


@pytest.mark.parametrize("inner", INNERS)
def test_triton_small_on_weights_of_megablocks(inner: int) -> None:
    """There `down` lies transposed; it must still be loaded in whole lines."""
    assert "cp.async.cg.shared.global" in compile_for(small("down_kernel", "bf16", inner, 1, transposed=True))["ptx"]


def sparse(name: str, index: str) -> Launch:
    """stk's kernel with the configuration that it launches, as `megablocks_sparse` calls it."""
    import triton.language as tl
    from stk.backend import triton_kernels

    tuned = getattr(triton_kernels, name)
    (configuration,) = tuned.configs
    types = {"A": "*bf16", "B": "*bf16", "C": "*bf16", "M": "i32/16", "N": "i32/16", "K": "i32/16"}
    types |= {"row_indices": f"*{index}", "column_indices": f"*{index}"}
    constants = configuration.kwargs | {"GROUP_M": 128, "ACC_TYPE": tl.float32}
    if name == "_sdd_kernel":
        types |= {"stride_am": "i32/16", "stride_bn": "i32/16", "stride_cm": "i32/16"}
        constants |= {"stride_ak": 1, "stride_bk": 1, "stride_cn": 1}
    else:
        types |= {"offsets": "*i32", "block_offsets_t": "*i32"}
        types |= {"stride_am": "i32/16", "stride_bk": "i32/16", "stride_cm": "i32/16"}
        constants |= {"stride_ak": 1, "stride_bn": 1, "stride_cn": 1, "trans_A": False, "trans_B": False}
    return Launch(tuned.fn, types, constants, configuration.num_warps, configuration.num_stages)


@pytest.mark.parametrize(("name", "index"), [("_sdd_kernel", "i16"), ("_sdd_kernel", "i32"), ("_dsd_kernel", "i16")])
def test_block_sparse_products(name: str, index: str) -> None:
    from experts.kernels.gpu_support import import_megablocks

    import_megablocks()
    compiled = compile_for(sparse(name, index))
    assert compiled["cubin"][:4] == b"\x7fELF"
    assert "wgmma" in compiled["ptx"], "Hopper's own matrix instructions"


@pytest.mark.parametrize("to_blocks", [True, False])
@pytest.mark.parametrize("scaled", [True, False])
def test_padded_copies(to_blocks: bool, scaled: bool) -> None:
    from experts.kernels.gpu_support import import_megablocks

    import_megablocks()
    from megablocks.backend import kernels

    types = {"a": "*bf16", "b": "*bf16", "indices": "*i32", "bin_ids": "*i32", "bins": "*i32", "padded_bins": "*i32"}
    constants: dict[str, Any] = {"NUM_COLUMNS": HIDDEN, "TOP_K": 2, "A_TO_B": to_blocks, "SCALE": scaled}
    if scaled:
        types["weights"] = "*bf16"
    else:
        constants["weights"] = None
    tuned = kernels._padded_copy
    for configuration in tuned.configs:
        launch = Launch(tuned.fn, types, constants | configuration.kwargs, configuration.num_warps)
        assert compile_for(launch)["cubin"][:4] == b"\x7fELF"


class _HopperThatIsNotThere:
    """What Triton asks of a GPU's driver before it compiles for a launch."""

    def get_current_device(self) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", HOPPER, 32)

    def get_current_stream(self, _: int) -> int:
        return 0


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Every launch is compiled for its own arguments, and noted by name with its PTX, but not started."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    noted: list[tuple[str, str]] = []
    run = JITFunction.run

    def compile_only(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        compiled = run(kernel, *arguments, grid=grid, warmup=True, **options)
        noted.append((compiled.metadata.name, compiled.asm["ptx"]))
        return compiled

    monkeypatch.setattr(JITFunction, "run", compile_only)
    monkeypatch.setattr(driver, "_active", _HopperThatIsNotThere())
    return noted


def expected_launches(name: str) -> list[str]:
    small = ["gate_up_kernel", "down_kernel", "combine_kernel"]
    # 40 tokens go through in two parts.
    sparse_ = ["_padded_copy", "_sdd_kernel", "_sdd_kernel", "_dsd_kernel", "_padded_copy"]
    return 2 * small if name == "triton_small" else sparse_


@pytest.mark.parametrize("name", ["triton_small", "megablocks_sparse"])
def test_calls_launch_what_compiles(
    name: str, launches: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A whole call, with Triton's own reading of the arguments: only the GPU is missing."""
    import torch

    from experts.kernels.base import ExpertWeights

    take_one_configuration()
    monkeypatch.setattr(f"experts.kernels.{name}.check_weights", lambda *_: None)
    weights = ExpertWeights(
        torch.zeros(EXPERTS, INNERS[0], HIDDEN).bfloat16(),
        torch.zeros(EXPERTS, INNERS[0], HIDDEN).bfloat16(),
        torch.zeros(EXPERTS, HIDDEN, INNERS[0]).bfloat16(),
    )
    index_TK = torch.tensor([[0, 1]] * 39 + [[-1, 3]], dtype=torch.int32)
    prepared = get_kernel(name).load(weights)
    prepared.forward(torch.zeros(40, HIDDEN).bfloat16(), index_TK, torch.ones(40, 2).bfloat16())
    assert [launched for launched, _ in launches] == expected_launches(name)
    for launched, ptx in launches:
        if launched in ("_sdd_kernel", "_dsd_kernel"):
            assert "wgmma" in ptx
            assert "cp.async.cg" in ptx
        elif launched in ("gate_up_kernel", "down_kernel"):
            assert "mma.sync" in ptx
            assert "cp.async.cg" in ptx
