"""The kernels by name: ours, and those that other packages add under the entry point group `echovlm_ray.kernels`."""

import functools
import importlib
import logging
from importlib.metadata import EntryPoint, entry_points

import torch

from experts.kernels.base import ExpertKernel

_LOG = logging.getLogger(__name__)

# Other packages register kernels here: `my_kernel = "my_package.my_module:MyKernel"`, a class without arguments.
ENTRY_POINT_GROUP = "echovlm_ray.kernels"

# Imported on first use, because GPU kernels need libraries that a CPU machine does not have.
_BUILT_IN = {
    "reference": "experts.kernels.reference:ReferenceKernel",
    "cpu_packed": "experts.kernels.cpu_packed:CpuPackedKernel",
    "torch_grouped": "experts.kernels.torch_grouped:TorchGroupedKernel",
    "megablocks_sparse": "experts.kernels.megablocks_sparse:MegaBlocksSparseKernel",
    "megablocks_grouped": "experts.kernels.megablocks_grouped:MegaBlocksGroupedKernel",
    "triton_small": "experts.kernels.triton_small:TritonSmallKernel",
    "auto": "experts.kernels.auto:AutoKernel",
}
# How to get the libraries that the kernel needs beyond torch.
_REMEDIES = {
    "megablocks_sparse": "pip install --no-deps 'megablocks==0.10.0' 'stanford-stk==0.7.1' (the extra gpu), and triton",
    "megablocks_grouped": "pip install --no-deps 'megablocks==0.10.0' 'stanford-stk==0.7.1' (the extra gpu), triton "
    "and grouped_gemm",
    "triton_small": "pip install triton; a CUDA build of torch brings it",
}

# The kernels of this package. `kernel_names` has those of other packages, too.
KERNEL_NAMES: tuple[str, ...] = tuple(_BUILT_IN)


class KernelUnavailableError(ValueError):
    """The kernel exists, but a library that it needs does not. The text names the library and how to get it."""


def kernel_names() -> tuple[str, ...]:
    """All names for `get_kernel`: ours first, then other packages' in alphabetical order."""
    return (*KERNEL_NAMES, *sorted(_third_party()))


@functools.cache
def get_kernel(name: str) -> ExpertKernel:
    """The kernel of a name.

    Raises:
        ValueError: there is no such kernel; the text lists all names.
        KernelUnavailableError: a required library is not installed; the text has the command to install it.
    """
    try:
        if name in _BUILT_IN:
            module, _, attribute = _BUILT_IN[name].partition(":")
            factory = getattr(importlib.import_module(module), attribute)
        elif name in _third_party():
            factory = _third_party()[name].load()
        else:
            raise ValueError(f"there is no expert kernel {name!r}; there are {', '.join(kernel_names())}")
        kernel: ExpertKernel = factory()
    except ImportError as error:
        raise KernelUnavailableError(
            f"the expert kernel {name} needs {error.name or 'a library'}, which cannot be imported here ({error}): "
            + _REMEDIES.get(name, "install what the package that adds the kernel requires")
        ) from error
    if kernel.name != name:
        raise ValueError(
            f"the expert kernel that is registered as {name!r} calls itself {kernel.name!r}; they must agree"
        )
    return kernel


def default_kernel(device: torch.device | str) -> str:
    """The name of the fixed kernel for a device: configure it if local and remote experts must be bitwise equal."""
    return {"cpu": "cpu_packed", "cuda": "megablocks_sparse"}.get(torch.device(device).type, "torch_grouped")


def _third_party() -> dict[str, EntryPoint]:
    found = {}
    for entry_point in entry_points(group=ENTRY_POINT_GROUP):
        if entry_point.name in _BUILT_IN:
            _LOG.warning("the kernel %s of %s is not used: the name is taken", entry_point.name, entry_point.value)
        else:
            found[entry_point.name] = entry_point
    return found
