"""Chooses a kernel.

On a CPU it is `cpu_packed` if weights can be packed, and `reference` otherwise. This depends on the machine and not on
a measurement, so that every process of a machine computes the same bits.

On a GPU it times the available kernels once for each shape, and uses the faster one below and above a number of pairs.
Kernels differ in their last bits, and two processes may measure differently. If local and remote experts must be
bitwise equal, configure one kernel by name (`experts.kernels.registry.default_kernel` returns one for each device).
"""

import functools
import logging
import threading
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from experts.kernels.base import ExpertWeights, PreparedExperts, kernel_in_use
from experts.kernels.calibration import Plan, PlanFile, choose, default_plan_file, time_kernel
from experts.kernels.packed_linear import packing_available
from experts.kernels.registry import KernelUnavailableError, get_kernel

_LOG = logging.getLogger(__name__)

CUDA_CANDIDATES = ("triton_small", "megablocks_sparse", "megablocks_grouped", "torch_grouped")
_VERSIONS = ("torch", "triton", "megablocks", "stanford-stk", "grouped_gemm")


class AutoExperts:
    """One layer's experts, prepared by the kernels of a plan."""

    def __init__(self, kernel_name: str, small: PreparedExperts, small_pairs: int, large: PreparedExperts) -> None:
        """`small` computes up to `small_pairs` pairs, `large` more; they may be the same."""
        self.kernel_name = kernel_name
        self._small = small
        self._small_pairs = small_pairs
        self._large = large

    @property
    def nbytes(self) -> int:
        """Bytes of the prepared weights of both kernels."""
        return self._large.nbytes + (0 if self._small is self._large else self._small.nbytes)

    def forward(self, x_TD: torch.Tensor, expert_index_TK: torch.Tensor, weight_TK: torch.Tensor) -> torch.Tensor:
        """The weighted sum over each token's experts; see `experts.kernels.base.PreparedExperts`."""
        prepared = self._small if expert_index_TK.numel() <= self._small_pairs else self._large
        return prepared.forward(x_TD, expert_index_TK, weight_TK)


class AutoKernel:
    """Chooses by device, and on a GPU by measurement. Thread-safe."""

    def __init__(self, candidates: tuple[str, ...] = CUDA_CANDIDATES, plan_file: Path | None = None) -> None:
        """
        Args:
            candidates: the kernels to choose from on a GPU, if they can be imported.
            plan_file: the file for measurements; None is one in the user's cache folder.
        """
        self._candidates = candidates
        self._file = PlanFile(plan_file or default_plan_file())
        self._plans: dict[str, Plan] = {}
        self._lock = threading.Lock()

    @property
    def name(self) -> str:
        """The name in configuration and status."""
        return "auto"

    def load(self, weights: ExpertWeights) -> PreparedExperts:
        """Prepares one layer's weights for the chosen kernel or kernels.

        Raises:
            ValueError: no kernel can compute these weights here.
        """
        key = _key(weights)
        with self._lock:
            plan = self._plans.get(key)
            if plan is None:
                plan = self._plan_on_cpu(weights) if weights.device.type == "cpu" else self._plan_by_trial(weights, key)
                self._plans[key] = plan
                _LOG.info("the expert kernel auto uses %s for %s", plan, key)
        large_kernel = get_kernel(plan.large)
        large = large_kernel.load(weights)
        if plan.small == plan.large:
            return AutoExperts(f"auto: {kernel_in_use(large_kernel, large)}", large, 0, large)
        return AutoExperts(f"auto: {plan}", get_kernel(plan.small).load(weights), plan.small_pairs, large)

    def _plan_on_cpu(self, weights: ExpertWeights) -> Plan:
        name = "cpu_packed" if packing_available(weights.dtype) else "reference"
        return Plan(name, 0, name)

    def _plan_by_trial(self, weights: ExpertWeights, key: str) -> Plan:
        kernels = {}
        for name in self._candidates:
            try:
                kernels[name] = get_kernel(name)
            except KernelUnavailableError as error:
                _LOG.info("the expert kernel auto does without %s: %s", name, error)
        key = f"{key}, of {' '.join(kernels)}"
        plan = self._file.read(key, kernels)
        if plan is not None:
            return plan
        timings = {}
        with torch.inference_mode():
            # One after the other, so that only one kernel's copy of the weights exists at a time.
            for name, kernel in kernels.items():
                try:
                    timings[name] = time_kernel(kernel.load(weights), weights)
                except (ValueError, RuntimeError) as error:
                    _LOG.warning("the expert kernel auto does without %s, which failed on trial: %s", name, error)
        if not timings:
            raise ValueError(f"no expert kernel of {', '.join(self._candidates)} works for {key}; configure reference")
        for name, of_kernel in timings.items():
            _LOG.info("%s: %s", name, ", ".join(f"{pairs} pairs {s * 1e6:.0f} µs" for pairs, s in of_kernel.items()))
        plan = choose(timings)
        self._file.write(key, plan)
        return plan


def _key(weights: ExpertWeights) -> str:
    """What a plan depends on: shape, dtype, processor and versions."""
    device = weights.device
    processor = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return (
        f"{weights.num_experts} experts of {weights.hidden_size} × {weights.intermediate_size} in {weights.dtype} on "
        f"{processor}, {', '.join(f'{name} {_version(name)}' for name in _VERSIONS)}"
    )


@functools.cache
def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"
