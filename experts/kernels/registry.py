"""The kernels by name."""

from experts.kernels.base import ExpertKernel
from experts.kernels.reference import ReferenceKernel

_KERNELS: dict[str, ExpertKernel] = {kernel.name: kernel for kernel in (ReferenceKernel(),)}

KERNEL_NAMES: tuple[str, ...] = tuple(_KERNELS)


def get_kernel(name: str) -> ExpertKernel:
    """The kernel of a name.

    Raises:
        ValueError: there is none; the text names those that there are.
    """
    if name not in _KERNELS:
        raise ValueError(f"there is no expert kernel {name!r}; there are {', '.join(KERNEL_NAMES)}")
    return _KERNELS[name]
