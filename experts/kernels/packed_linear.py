"""Linear layers whose weights oneDNN has laid out in the blocks that its matrix kernels read.

Stock `torch.nn.functional.linear` lays the weights out again in every call, or reads them as they lie. Laid out once,
a call takes about half the time in float32, and a row's result no longer depends on how many rows there are. The
operators are torch's own but private (its compiler uses them), so they are tried before they are relied on.
"""

import functools
import logging
from typing import Any

import torch
import torch.nn.functional as F

_LOG = logging.getLogger(__name__)

# The number of rows that oneDNN is told to lay the weights out for. Any number of rows may come later.
_EXPECTED_ROWS = 16
# More rows are computed in pieces of so many: as fast, and no further sizes.
MAX_ROWS = 512
# No number of rows is padded by more than this.
MAX_PADDING = 15
_PROBE_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


class PackedLinear:
    """`x · weightᵀ + bias` for inference on a CPU. No gradients.

    The result of a row has the same bits whatever the number of rows and of threads, for up to 16384 inputs (beyond,
    oneDNN may share the sum of one float32 output among threads). Safe to call from any thread.
    """

    __slots__ = ("_bias_O", "_dtype", "_in_features", "_linear", "_nbytes", "_out_features", "_packed")

    def __init__(self, weight_OI: torch.Tensor, bias_O: torch.Tensor | None = None) -> None:
        """Copies the weights into the packed layout; the plain ones may be dropped afterwards.

        Args:
            weight_OI: outputs × inputs, on the CPU.
            bias_O: outputs, in the weight's dtype.

        Raises:
            ValueError: packing is not available for this dtype or device; ask `packing_available` first.
        """
        if weight_OI.device.type != "cpu":
            raise ValueError(f"weights on {weight_OI.device} cannot be packed; only those on the CPU can")
        if not packing_available(weight_OI.dtype):
            raise ValueError(f"{weight_OI.dtype} weights cannot be packed here: {_why_not(weight_OI.dtype)}")
        self._dtype = weight_OI.dtype
        self._out_features, self._in_features = weight_OI.shape
        self._bias_O = None if bias_O is None else bias_O.detach()
        self._packed = _pack(weight_OI)
        self._nbytes = int(torch.ops.mkldnn._nbytes(self._packed)) + (0 if bias_O is None else bias_O.nbytes)
        # Resolved once: looking an operator up by name costs as much as a small product.
        self._linear: Any = torch.ops.mkldnn._linear_pointwise.default

    @property
    def nbytes(self) -> int:
        """Bytes of the packed weights, with oneDNN's own padding, and of the bias."""
        return self._nbytes

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
        """Whether something is added to the outputs."""
        return self._bias_O is not None

    @property
    def dtype(self) -> torch.dtype:
        """The element type of weights, inputs and outputs."""
        return self._dtype

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """The layer's outputs.

        Args:
            x: … × inputs in the weight's dtype, with any number of leading dimensions; rows may be none.

        Returns:
            … × outputs, in the same dtype.

        Raises:
            ValueError: another dtype or size, or a gradient is wanted.
        """
        if x.dtype != self._dtype or x.shape[-1] != self._in_features:
            raise ValueError(
                f"the input is {x.dtype} {list(x.shape)}; these weights take {self._dtype} […, {self._in_features}]"
            )
        if x.requires_grad and torch.is_grad_enabled():
            raise ValueError("packed weights have no gradients; train with the plain ones")
        if x.numel() == 0:
            return x.new_zeros((*x.shape[:-1], self._out_features))
        x_TI = x.reshape(-1, self._in_features)
        if x_TI.shape[0] > MAX_ROWS:
            output_TO = torch.cat([self._padded_product(piece) for piece in x_TI.split(MAX_ROWS)])
        else:
            output_TO = self._padded_product(x_TI)
        return output_TO.view(*x.shape[:-1], self._out_features)

    def product(self, x_TI: torch.Tensor) -> torch.Tensor:
        """The outputs of as many rows as `padded_rows` gives, without any check: for callers that pad by themselves."""
        output_TO: torch.Tensor = self._linear(x_TI, self._packed, self._bias_O, "none", [], "")
        return output_TO

    @torch.inference_mode()
    def warm_up(self, max_rows: int = MAX_ROWS) -> int:
        """Has oneDNN compile its code for every number of rows up to this one, once for all weights of a shape.

        Returns:
            how many products were computed.
        """
        sizes = sorted({padded_rows(rows) for rows in range(1, min(max_rows, MAX_ROWS) + 1)})
        for rows in sizes:
            self.product(torch.zeros(rows, self._in_features, dtype=self._dtype))
        return len(sizes)

    def _padded_product(self, x_TI: torch.Tensor) -> torch.Tensor:
        rows = x_TI.shape[0]
        padded = padded_rows(rows)
        return self.product(x_TI) if padded == rows else self.product(F.pad(x_TI, (0, 0, 0, padded - rows)))[:rows]


def padded_rows(rows: int) -> int:
    """How many rows are computed for so many, from 1 to `MAX_ROWS`.

    oneDNN generates code for every number of rows and keeps it (0.15 MB each, up to a thousand of them), so a process
    that saw every number would grow without need, and would stop to compile in the middle of serving. So there are
    four sizes between a power of two and the next up to 64 rows, and every sixteenth above: 47 in all.

    A lone row gets company: oneDNN adds it up in larger blocks than two or more rows, which changes the last bits from
    1025 inputs on. The second row costs next to nothing, for the weights are read once.
    """
    if rows == 1:
        return 2
    step = min(MAX_PADDING + 1, max(1, 1 << (rows - 1).bit_length() >> 3))
    return -(-rows // step) * step


def packing_available(dtype: torch.dtype) -> bool:
    """Whether `PackedLinear` works here for weights of a dtype. Tried once a process; the log says why not."""
    return _why_not(dtype) is None


def unavailable_reason(dtype: torch.dtype) -> str | None:
    """Why weights of a dtype cannot be packed here, in words for a log or an error; None where they can."""
    return _why_not(dtype)


def _pack(weight_OI: torch.Tensor) -> torch.Tensor:
    packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight_OI.detach().contiguous(), _EXPECTED_ROWS)
    return packed


@functools.cache
def _why_not(dtype: torch.dtype) -> str | None:
    reason = _probe(dtype)
    if reason is not None:
        _LOG.warning("weights in %s are not packed: %s", dtype, reason)
    return reason


def _probe(dtype: torch.dtype) -> str | None:
    if dtype not in _PROBE_TOLERANCE:
        return f"only {' and '.join(str(known) for known in _PROBE_TOLERANCE)} are"
    if not torch.backends.mkldnn.is_available():
        return f"torch {torch.__version__} was built without oneDNN"
    try:
        if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return "the processor has no instructions for bfloat16 that oneDNN uses"
        generator = torch.Generator().manual_seed(0)
        weight_OI = torch.randn((48, 32), generator=generator).to(dtype)
        x_TI = torch.randn((3, 32), generator=generator).to(dtype)
        packed = _pack(weight_OI)
        torch.ops.mkldnn._nbytes(packed)
        found = torch.ops.mkldnn._linear_pointwise.default(x_TI, packed, None, "none", [], "").double()
    except (AttributeError, RuntimeError, NotImplementedError) as error:
        return f"torch {torch.__version__} has no such operators ({type(error).__name__})"
    expected = F.linear(x_TI.double(), weight_OI.double())
    difference = float((found - expected).norm() / expected.norm())
    if not difference <= _PROBE_TOLERANCE[dtype]:
        return f"a trial product was wrong by {difference:.1e}"
    return None
