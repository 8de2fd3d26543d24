"""The arithmetic of a decoder layer on a CPU, in a few calls of the C library instead of many torch operators.

A decoding step has few rows, so calling an operator costs more than computing it, and torch's attention first copies
every sequence's keys and values out of their blocks. The functions round where torch's operators on the same dtype do;
attention keeps its weights in float32. They are batch-invariant: a row's bits do not depend on the other rows. Tensors
must be contiguous, on the CPU, in float32 or bfloat16, and without gradients.
"""

import ctypes
from dataclasses import dataclass

import torch

from experts.kernels.cpu.library import (
    AttentionLayer,
    CpuLibrary,
    DenseLayer,
    PackedMatrix,
    StepTokens,
    check,
    cpu_library,
    dtype_code,
)

_DTYPES = (torch.float32, torch.bfloat16)


def use_compiled(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the functions below support tensors of a dtype on a device and are faster than torch's operators.

    They use one thread. With several torch threads, torch's operators are faster for long prompts.
    """
    return device.type == "cpu" and dtype in _DTYPES and torch.get_num_threads() == 1 and cpu_library() is not None


def library() -> CpuLibrary:
    """The C library, if `use_compiled` is true."""
    found = cpu_library()
    assert found is not None
    return found


@dataclass(frozen=True, slots=True)
class CompiledDecodes:
    """The single tokens of several sequences. All tensors are int64.

    Attributes:
        rows_B: the step's rows.
        block_tables_BN: the blocks of each sequence, padded with any numbers.
        lengths_B: the number of tokens of each sequence, including the new one.
    """

    rows_B: torch.Tensor
    block_tables_BN: torch.Tensor
    lengths_B: torch.Tensor


class CompiledTokens:
    """The tokens of a step in the library's format. Keeps the referenced tensors alive."""

    def __init__(
        self, cos_TD: torch.Tensor, sin_TD: torch.Tensor, slots_T: torch.Tensor, decodes: CompiledDecodes
    ) -> None:
        """
        Args:
            cos_TD: tokens × head_dim.
            sin_TD: tokens × head_dim.
            slots_T: int64, each token's slot in the cache.
            decodes: the single tokens.
        """
        self._kept = cos_TD, sin_TD, slots_T, decodes
        self.description = StepTokens(
            tokens=len(slots_T),
            cos_TD=cos_TD.data_ptr(),
            sin_TD=sin_TD.data_ptr(),
            slots_T=slots_T.data_ptr(),
            sequences=len(decodes.rows_B),
            blocks=decodes.block_tables_BN.shape[1],
            rows_B=decodes.rows_B.data_ptr(),
            block_tables_BN=decodes.block_tables_BN.data_ptr(),
            lengths_B=decodes.lengths_B.data_ptr(),
        )
        self.address = ctypes.addressof(self.description)


@dataclass(frozen=True, slots=True)
class Norm:
    """An RMSNorm.

    Attributes:
        weight_D: hidden.
        epsilon: added to the mean square.
    """

    weight_D: torch.Tensor
    epsilon: float


class CompiledLayerAttention:
    """One layer's attention, both norms and its part of the cache, in the library's format.

    Keeps the referenced tensors alive, except packed matrices.
    """

    def __init__(
        self,
        *,
        query_heads: int,
        scaling: float,
        block_size: int,
        keys_SHD: torch.Tensor,
        values_SHD: torch.Tensor,
        before: Norm,
        after: Norm,
        qkv: PackedMatrix | None,
        output: PackedMatrix | None,
    ) -> None:
        """
        Args:
            query_heads: the number of query heads.
            scaling: the factor of the scores.
            block_size: slots per block of the cache.
            keys_SHD: the layer's part of the cache: slots × key-value heads × head_dim.
            values_SHD: the same for values.
            before: the norm before the attention.
            after: the norm before the experts.
            qkv: the weights for queries, keys and values; None if the library does not compute the product.
            output: the weights of the attention's output, or None.
        """
        self._kept = keys_SHD, values_SHD, before, after, qkv, output
        _, kv_heads, head_dim = keys_SHD.shape
        self.description = AttentionLayer(
            dtype=dtype_code(keys_SHD.dtype),
            hidden_size=len(before.weight_D),
            query_heads=query_heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            block_size=block_size,
            keys_SHD=keys_SHD.data_ptr(),
            values_SHD=values_SHD.data_ptr(),
            norm_before_D=before.weight_D.data_ptr(),
            norm_after_D=after.weight_D.data_ptr(),
            qkv=None if qkv is None else ctypes.addressof(qkv),
            output=None if output is None else ctypes.addressof(output),
            scaling=scaling,
            epsilon_before=before.epsilon,
            epsilon_after=after.epsilon,
        )
        self.address = ctypes.addressof(self.description)

    def rotate_and_store(self, tokens: CompiledTokens, qkv_TC: torch.Tensor, query_THD: torch.Tensor) -> None:
        """Applies rotary positions; writes new keys and values to the cache, and queries to `query_THD`.

        Rounds as `x * cos + rotate_half(x) * sin` does.

        Args:
            tokens: the step's tokens.
            qkv_TC: tokens × (query heads + twice key-value heads) · head_dim.
            query_THD: tokens × query heads × head_dim; written.
        """
        library().rotate_and_store(self.address, tokens.address, qkv_TC.data_ptr(), query_THD.data_ptr())

    def attend_decoding(self, tokens: CompiledTokens, query_THD: torch.Tensor, output_THD: torch.Tensor) -> None:
        """Computes the attention of the single tokens, reading keys and values in place in the cache.

        Paged attention (Kwon et al. 2023, arXiv 2309.06180) with grouped queries; sums and softmax in float32.

        Args:
            tokens: the step's tokens.
            query_THD: tokens × query heads × head_dim.
            output_THD: the same shape; the single tokens' rows are written.
        """
        check(library().attend_decoding(self.address, tokens.address, query_THD.data_ptr(), output_THD.data_ptr()))

    def attend_to_sequences(
        self, tokens: CompiledTokens, hidden_TD: torch.Tensor, query_THD: torch.Tensor, attended_THD: torch.Tensor
    ) -> None:
        """The layer up to its attention: norm, one product, `rotate_and_store` and `attend_decoding`.

        Args:
            tokens: the step's tokens.
            hidden_TD: tokens × hidden: the layer's input.
            query_THD: tokens × query heads × head_dim; written.
            attended_THD: the same shape; the single tokens' rows are written.
        """
        addresses = hidden_TD.data_ptr(), query_THD.data_ptr(), attended_THD.data_ptr()
        check(library().attend_to_sequences(self.address, tokens.address, *addresses))

    def project_and_normalize(
        self, hidden_TD: torch.Tensor, attended_THD: torch.Tensor, residual_TD: torch.Tensor, x_TD: torch.Tensor
    ) -> None:
        """The layer from its attention to its experts: one product, the residual sum, and the norm.

        Args:
            hidden_TD: tokens × hidden: the layer's input.
            attended_THD: tokens × query heads × head_dim.
            residual_TD: tokens × hidden: the sum; written.
            x_TD: tokens × hidden: the normalized sum; written.
        """
        addresses = hidden_TD.data_ptr(), attended_THD.data_ptr(), residual_TD.data_ptr(), x_TD.data_ptr()
        library().project_and_normalize(self.address, len(hidden_TD), *addresses)


class CompiledDense:
    """Dense MLP and shared expert of a layer in the library's format. Does not keep the matrices alive."""

    def __init__(
        self,
        dtype: torch.dtype,
        dense_size: int,
        shared_size: int,
        inputs: PackedMatrix,
        dense_down: PackedMatrix,
        shared_down: PackedMatrix,
    ) -> None:
        """
        Args:
            dtype: the dtype of weights and inputs.
            dense_size: the intermediate size of the dense MLP.
            shared_size: the intermediate size of the shared expert.
            inputs: all weights that read x: gate and up of the dense MLP first, then those of the shared expert.
            dense_down: the down projection of the dense MLP.
            shared_down: the down projection of the shared expert.
        """
        self._kept = inputs, dense_down, shared_down
        self.description = DenseLayer(
            dtype=dtype_code(dtype),
            hidden_size=dense_down.outputs,
            dense_size=dense_size,
            shared_size=shared_size,
            inputs=ctypes.addressof(inputs),
            dense_down=ctypes.addressof(dense_down),
            shared_down=ctypes.addressof(shared_down),
        )
        self.address = ctypes.addressof(self.description)

    def compute(
        self, x_TD: torch.Tensor, projected_TF: torch.Tensor, dense_TD: torch.Tensor, shared_TD: torch.Tensor
    ) -> None:
        """Dense MLP and shared expert, the latter before its gate.

        Args:
            x_TD: tokens × hidden.
            projected_TF: tokens × outputs of the first product; written.
            dense_TD: tokens × hidden; written.
            shared_TD: tokens × hidden; written.
        """
        addresses = x_TD.data_ptr(), projected_TF.data_ptr(), dense_TD.data_ptr(), shared_TD.data_ptr()
        check(library().dense_and_shared(self.address, len(x_TD), *addresses))


def normalize(norm: Norm, x_TD: torch.Tensor, output_TD: torch.Tensor) -> None:
    """RMSNorm (Zhang and Sennrich 2019, arXiv 1910.07467), rounded as Qwen2-VL's: before and after the weight.

    Args:
        norm: the norm.
        x_TD: tokens × hidden.
        output_TD: the same shape; written.
    """
    library().normalize(
        dtype_code(x_TD.dtype),
        x_TD.data_ptr(),
        norm.weight_D.data_ptr(),
        norm.epsilon,
        *x_TD.shape,
        output_TD.data_ptr(),
    )


def mix(
    hidden_TD: torch.Tensor,
    routed_TD: torch.Tensor,
    shared_TD: torch.Tensor,
    dense_TD: torch.Tensor,
    projected_TF: torch.Tensor,
    factor_column: int,
    output_TD: torch.Tensor,
) -> None:
    """The output of a layer: residual + share₀ · (routed + σ(factor) · shared) + share₁ · dense, with softmax shares.

    Args:
        hidden_TD: tokens × hidden: the residual.
        routed_TD: the routed experts' output.
        shared_TD: the shared expert's, before its gate.
        dense_TD: the dense MLP's.
        projected_TF: tokens × outputs of the product that includes the columns of the next argument.
        factor_column: the first of three columns: the shared expert's gate, and the two mixing coefficients.
        output_TD: as `hidden_TD`; written.
    """
    library().mix(
        dtype_code(hidden_TD.dtype),
        hidden_TD.data_ptr(),
        routed_TD.data_ptr(),
        shared_TD.data_ptr(),
        dense_TD.data_ptr(),
        projected_TF.data_ptr(),
        projected_TF.shape[1],
        factor_column,
        *hidden_TD.shape,
        output_TD.data_ptr(),
    )
