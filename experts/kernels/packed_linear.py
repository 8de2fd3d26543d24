"""Linear layers with prepacked weights: laid out once in the order in which a product with few rows reads them.

`torch.nn.functional.linear` packs the weights in every call, or reads them unpacked. With prepacked weights a call
takes half the time or less, and a row's result does not depend on the number of rows. There are two layouts: the C
library's (`experts.kernels.cpu`) if torch has one thread, as when serving, and otherwise oneDNN's, which splits a
product among threads. Both are tested before use.
"""

import functools
import logging
from typing import Protocol

import torch
import torch.nn.functional as F

from experts.kernels import onednn_product
from experts.kernels.cpu import panel_weights
from experts.kernels.cpu.library import PackedMatrix, cpu_library
from experts.kernels.cpu.panel_weights import PanelWeights
from experts.kernels.onednn_product import OneDnnWeights

_LOG = logging.getLogger(__name__)

_PROBE_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
# Rows for which code is compiled; no step of the engine has more.
WARM_UP_ROWS = 512


class PackedWeights(Protocol):
    """A layer's weights in a packed layout.

    Attributes:
        nbytes: bytes of weights and bias with the layout's padding.
        matrix: the descriptor for the C library, valid as long as this object exists; None if it cannot be used there.
    """

    nbytes: int
    matrix: PackedMatrix | None

    def warm_up_sizes(self, max_rows: int) -> list[int]:
        """The numbers of rows, up to this one, for which code is compiled on first use."""
        ...

    def product(self, x_TI: torch.Tensor) -> torch.Tensor:
        """The outputs of at least one row, in the weights' dtype."""
        ...

    def product_into(self, x_TI: torch.Tensor, output_TO: torch.Tensor, first: int, end: int) -> None:
        """Writes the outputs of the rows from `first` to `end` to the same rows of another tensor, which is contiguous.

        There must be at least one row.
        """
        ...


class PackedLinear:
    """`x · weightᵀ + bias` for inference on a CPU. No gradients.

    The layout depends on torch's number of threads when the weights are packed. In both, a row's bits do not depend on
    the number of rows, nor on later numbers of threads (in oneDNN's for up to 16384 inputs). Thread-safe.
    """

    __slots__ = ("_dtype", "_has_bias", "_in_features", "_out_features", "_weights", "product", "product_into")

    def __init__(self, weight_OI: torch.Tensor, bias_O: torch.Tensor | None = None) -> None:
        """Copies the weights to the packed layout; the plain ones may be freed afterwards.

        Args:
            weight_OI: outputs × inputs, on the CPU.
            bias_O: outputs, in the weight's dtype.

        Raises:
            ValueError: packing is not available for this dtype or device; see `packing_available`.
        """
        if weight_OI.device.type != "cpu":
            raise ValueError(f"weights on {weight_OI.device} cannot be packed; only those on the CPU can")
        layout = _layout(weight_OI.dtype, torch.get_num_threads())
        if isinstance(layout, str):
            raise ValueError(f"{weight_OI.dtype} weights cannot be packed here: {layout}")
        self._dtype = weight_OI.dtype
        self._out_features, self._in_features = weight_OI.shape
        self._has_bias = bias_O is not None
        self._weights: PackedWeights = layout(weight_OI, bias_O)
        # Without checks: see `PackedWeights`.
        self.product = self._weights.product
        self.product_into = self._weights.product_into

    @property
    def nbytes(self) -> int:
        """Bytes of the packed weights, with the layout's own padding, and of the bias."""
        return self._weights.nbytes

    @property
    def in_features(self) -> int:
        """The size of an input row."""
        return self._in_features

    @property
    def out_features(self) -> int:
        """The size of an output row."""
        return self._out_features

    @property
    def has_bias(self) -> bool:
        """Whether the layer has a bias."""
        return self._has_bias

    @property
    def dtype(self) -> torch.dtype:
        """The element type of weights, inputs and outputs."""
        return self._dtype

    @property
    def matrix(self) -> PackedMatrix | None:
        return self._weights.matrix

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """The layer's outputs.

        Args:
            x: … × inputs in the weight's dtype, with any number of leading dimensions; rows may be none.

        Returns:
            … × outputs, in the same dtype.

        Raises:
            ValueError: the dtype or size differs, or a gradient is required.
        """
        if x.dtype != self._dtype or x.shape[-1] != self._in_features:
            raise ValueError(
                f"the input is {x.dtype} {list(x.shape)}; these weights take {self._dtype} […, {self._in_features}]"
            )
        if x.requires_grad and torch.is_grad_enabled():
            raise ValueError("packed weights have no gradients; train with the plain ones")
        if x.numel() == 0:
            return x.new_zeros((*x.shape[:-1], self._out_features))
        output_TO = self.product(x.reshape(-1, self._in_features))
        return output_TO.view(*x.shape[:-1], self._out_features)

    @torch.inference_mode()
    def warm_up(self, max_rows: int = WARM_UP_ROWS) -> int:
        """Compiles the code for every number of rows up to this one, once for all weights of a shape.

        Returns:
            the number of computed products.
        """
        sizes = self._weights.warm_up_sizes(max_rows)
        for rows in sizes:
            self.product(torch.zeros(rows, self._in_features, dtype=self._dtype))
        return len(sizes)


def packing_available(dtype: torch.dtype) -> bool:
    """Whether `PackedLinear` works here for weights of a dtype. Tested once per process; the log has the reason."""
    return unavailable_reason(dtype) is None


def unavailable_reason(dtype: torch.dtype) -> str | None:
    """Why weights of a dtype cannot be packed here, as text; None if they can."""
    layout = _layout(dtype, torch.get_num_threads())
    return layout if isinstance(layout, str) else None


def describe_products(dtype: torch.dtype) -> str:
    """The library that multiplies packed weights of a dtype here, and why it is not the C library, for the status."""
    threads = torch.get_num_threads()
    layout = _layout(dtype, threads)
    if layout is PanelWeights:
        library = cpu_library()
        assert library is not None
        return f"the C library ({library.variant})"
    if layout is OneDnnWeights:
        return f"oneDNN; {_panels_refused(dtype, threads)}"
    return f"torch; {layout}"


@functools.cache
def _layout(dtype: torch.dtype, threads: int) -> type[PanelWeights] | type[OneDnnWeights] | str:
    """The layout for weights of a dtype, or why there is none."""
    reason = _panels_refused(dtype, threads)
    if reason is None:
        return PanelWeights
    _LOG.info("weights in %s are laid out for oneDNN, if at all: %s", dtype, reason)
    reason = onednn_product.unavailable_reason(dtype) or _wrong(OneDnnWeights, dtype)
    if reason is None:
        return OneDnnWeights
    _LOG.warning("weights in %s are not packed: %s", dtype, reason)
    return reason


def _panels_refused(dtype: torch.dtype, threads: int) -> str | None:
    """Why weights do not have the C library's layout."""
    if threads != 1:
        return f"torch has {threads} threads, among which oneDNN divides a product"
    return panel_weights.unavailable_reason(dtype) or _wrong(PanelWeights, dtype)


def _wrong(layout: type[PanelWeights] | type[OneDnnWeights], dtype: torch.dtype) -> str | None:
    """The problem of a test product, or None."""
    generator = torch.Generator().manual_seed(0)
    weight_OI = torch.randn((48, 32), generator=generator).to(dtype)
    x_TI = torch.randn((3, 32), generator=generator).to(dtype)
    found = layout(weight_OI, None).product(x_TI).double()
    expected = F.linear(x_TI.double(), weight_OI.double())
    difference = float((found - expected).norm() / expected.norm())
    return None if difference <= _PROBE_TOLERANCE[dtype] else f"a trial product was wrong by {difference:.1e}"
