"""The errors for a GPU kernel on a machine that cannot run it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
BLOCK = "import sys; sys.modules.update(dict.fromkeys({missing!r})); "
ASK = (
    "from experts.kernels.registry import get_kernel, KernelUnavailableError\n"
    "try: get_kernel({name!r})\n"
    "except KernelUnavailableError as error: print(error)"
)


@pytest.mark.parametrize(
    ("name", "missing", "said"),
    [
        ("megablocks_sparse", ["megablocks"], "pip install --no-deps 'megablocks==0.10.0' 'stanford-stk==0.7.1'"),
        ("megablocks_sparse", ["stk", "megablocks"], "the extra gpu"),
        ("megablocks_grouped", ["grouped_gemm"], "and grouped_gemm"),
        ("triton_small", ["triton"], "pip install triton"),
    ],
)
def test_a_missing_library_is_named_with_the_way_to_get_it(name: str, missing: list[str], said: str) -> None:
    code = BLOCK.format(missing=missing) + ASK.format(name=name)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert f"the expert kernel {name} needs {missing[-1]}" in done.stdout
    assert said in done.stdout


@pytest.mark.parametrize("name", ["megablocks_sparse", "triton_small"])
def test_weights_on_a_cpu_are_refused(name: str) -> None:
    pytest.importorskip("triton", reason="triton is not installed; make triton-check runs this")
    pytest.importorskip("stk", reason="stk is not installed; make triton-check runs this")
    code = (
        "import torch\n"
        "from experts.kernels.base import ExpertWeights\n"
        "from experts.kernels.registry import get_kernel\n"
        "w = ExpertWeights(*(torch.zeros(1, 4, 4) for _ in range(3)))\n"
        f"try: get_kernel({name!r}).load(w)\n"
        "except ValueError as error: print(error)"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT, env=environment
    )
    assert "computes on a GPU and the weights are on cpu; set the device to cuda" in done.stdout
