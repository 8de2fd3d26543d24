import subprocess
import sys
from pathlib import Path

import pytest
import torch

from experts.kernels.registry import KERNEL_NAMES, KernelUnavailableError, default_kernel, get_kernel, kernel_names
from tests.experts.kernels.conformance import make_weights

ROOT = Path(__file__).resolve().parents[3]

THIRD_PARTY = """
from experts.kernels.reference import ReferenceKernel

class DoublingKernel(ReferenceKernel):
    name = "{name}"
"""


def add_package(site: Path, name: str, entry_point: str, kernel_name: str) -> None:
    """An installed package, as pip leaves it."""
    (site / f"{name}.py").write_text(THIRD_PARTY.format(name=kernel_name))
    information = site / f"{name}-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text(f"[echovlm_ray.kernels]\n{entry_point}\n")


def run(code: str, site: Path) -> subprocess.CompletedProcess[str]:
    code = f"import sys; sys.path.insert(0, {str(site)!r})\n{code}"
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)


def test_names() -> None:
    assert set(KERNEL_NAMES) >= {
        "reference",
        "cpu_packed",
        "torch_grouped",
        "auto",
        "megablocks_sparse",
        "triton_small",
    }
    assert kernel_names()[: len(KERNEL_NAMES)] == KERNEL_NAMES
    for name in ("reference", "cpu_packed", "torch_grouped", "auto"):
        assert get_kernel(name).name == name


def test_an_unknown_kernel_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="no expert kernel 'fast'; there are reference, cpu_packed, torch_grouped"):
        get_kernel("fast")


@pytest.mark.parametrize("device", ["cpu", "cuda", "cuda:1", torch.device("meta")])
def test_every_device_has_a_fixed_kernel(device: torch.device | str) -> None:
    name = default_kernel(device)
    assert name in KERNEL_NAMES
    assert name != "auto"


def test_the_default_on_a_cpu_packs() -> None:
    assert default_kernel("cpu") == "cpu_packed"
    assert default_kernel("cuda") == "megablocks_sparse"


def test_kernels_of_a_gpu_are_not_imported_unasked() -> None:
    code = "import sys; sys.path.insert(0, '.'); from experts.kernels.registry import get_kernel; get_kernel('auto')\n"
    code += "print(*sorted(name for name in sys.modules if 'megablocks' in name or 'triton' in name.split('.')[0]))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.split() == []


@pytest.mark.parametrize("name", ["megablocks_sparse", "triton_small"])
def test_a_missing_library_is_named_with_its_remedy(name: str, tmp_path: Path) -> None:
    """As on a machine without a GPU: no triton, whatever this one has."""
    code = (
        "sys.modules['triton'] = None\n"
        "from experts.kernels.registry import KernelUnavailableError, get_kernel\n"
        f"try:\n    get_kernel({name!r})\nexcept KernelUnavailableError as error:\n    print(error)"
    )
    result = run(code, tmp_path)
    assert result.returncode == 0, result.stderr
    assert f"the expert kernel {name} needs " in result.stdout
    assert "pip install" in result.stdout
    assert issubclass(KernelUnavailableError, ValueError)


def test_another_package_adds_a_kernel(tmp_path: Path) -> None:
    add_package(tmp_path, "doubling", "doubling = doubling:DoublingKernel", "doubling")
    code = (
        "from experts.kernels.registry import get_kernel, kernel_names\n"
        "print('doubling' in sys.modules, kernel_names()[-1], type(get_kernel('doubling')).__name__)"
    )
    assert run(code, tmp_path).stdout.split() == ["False", "doubling", "DoublingKernel"]
    unknown = run("from experts.kernels.registry import get_kernel\nget_kernel('tripling')", tmp_path)
    assert "there are reference" in unknown.stderr
    assert "auto, doubling" in unknown.stderr


def test_another_package_cannot_take_our_names(tmp_path: Path) -> None:
    add_package(tmp_path, "impostor", "reference = impostor:DoublingKernel", "reference")
    result = run("from experts.kernels.registry import *\nkernel_names()\nprint(get_kernel('reference'))", tmp_path)
    assert "experts.kernels.reference.ReferenceKernel" in result.stdout
    assert "reference of impostor:DoublingKernel is not used: the name is taken" in result.stderr


def test_a_kernel_that_calls_itself_otherwise_is_refused(tmp_path: Path) -> None:
    add_package(tmp_path, "doubling", "doubling = doubling:DoublingKernel", "other")
    result = run("from experts.kernels.registry import get_kernel\nget_kernel('doubling')", tmp_path)
    assert "registered as 'doubling' calls itself 'other'" in result.stderr


def test_a_package_that_cannot_be_imported_is_an_error_of_its_kernel(tmp_path: Path) -> None:
    add_package(tmp_path, "doubling", "doubling = missing_module:DoublingKernel", "doubling")
    result = run("from experts.kernels.registry import get_kernel\nget_kernel('doubling')", tmp_path)
    assert "the expert kernel doubling needs missing_module" in result.stderr
    result = run("from experts.kernels.registry import get_kernel\nprint(get_kernel('reference').name)", tmp_path)
    assert result.stdout.split() == ["reference"]


def test_the_reference_is_differentiable_in_float64() -> None:
    weights = make_weights(2, 4, 3, torch.float64)
    stacks = [part.requires_grad_() for part in (weights.gate_EFD, weights.up_EFD, weights.down_EDF)]
    generator = torch.Generator().manual_seed(0)
    x_TD = torch.randn((5, 4), generator=generator, dtype=torch.float64)
    index_TK = torch.tensor([[0, 1], [1, 1], [-1, 0], [0, -1], [-1, -1]], dtype=torch.int32)
    weight_TK = torch.rand((5, 2), generator=generator, dtype=torch.float64).requires_grad_()
    output_TD = get_kernel("reference").load(weights).forward(x_TD, index_TK, weight_TK)
    gradients = torch.autograd.grad(output_TD.square().sum(), (*stacks, weight_TK))
    assert all(torch.count_nonzero(gradient) > 0 for gradient in gradients)
    assert torch.count_nonzero(gradients[-1][4]) == 0
