"""The self-test of a bundle: recorded inputs and outputs of every layer, replayed through a kernel.

The inputs are random with a fixed seed, at the scale of the norm before the experts. The outputs are those of the
reference kernel in float32, recorded when the bundle was packed. So a kernel that computes wrong results on this
machine and in this dtype is found before the first request, and so are weights that changed after packing. A bundle
without a probe is compared with the reference kernel on generated inputs.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from experts.bundles.bundle import Bundle
from experts.bundles.convert import convert_experts, dtype_name
from experts.bundles.finite import is_finite
from experts.bundles.layout import PROBE_PARTS, ProbePart, probe_tensor
from experts.bundles.manifest import BundleDescription, ProbeSizes
from experts.errors import ProbeError
from experts.kernels.base import NO_EXPERT, ExpertKernel, ExpertWeights, PreparedExperts, kernel_in_use
from experts.kernels.reference import ReferenceKernel

# The largest difference from the recorded output that passes, as a share of the layer's largest output: four times what
# rounding alone makes of the released sizes in the short dtypes, and more in float32: see `docs/bundles.md`.
TOLERANCES = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}

_SEED = 20_250_914
_MIN_TOKENS = 8
_MAX_TOKENS = 4096

LoadLayer = Callable[[int], ExpertWeights]
# A layer's weight of the norm before the experts, [hidden].
NormWeight = Callable[[int], torch.Tensor]


@dataclass(frozen=True, slots=True)
class ProbeInputs:
    """One layer's inputs: T tokens with K experts each, in float32 but exact in the bundle's dtype."""

    hidden_states_TD: torch.Tensor
    # int32; the last pair has no expert here, as in a partition.
    expert_index_TK: torch.Tensor
    weight_TK: torch.Tensor


@dataclass(frozen=True, slots=True)
class SelfTest:
    """The result of a kernel's self-test.

    Attributes:
        recorded: whether the bundle's probe was replayed; otherwise generated inputs.
        kernel: the kernel that computed.
        dtype: torch's name of the dtype of weights and inputs.
        tolerance: the largest allowed error.
        worst_error: the largest error, relative to the layer's largest output.
        worst_layer: the layer with the largest error.
        resident_bytes: bytes of all layers in the kernel's layout.
    """

    recorded: bool
    kernel: str
    dtype: str
    tolerance: float
    worst_error: float
    worst_layer: int
    resident_bytes: int


def probe_sizes(num_experts: int) -> ProbeSizes:
    """The sizes with which every expert is used twice."""
    top_k = min(2, num_experts)
    return ProbeSizes(tokens=min(max(_MIN_TOKENS, -(-2 * num_experts // top_k) + 1), _MAX_TOKENS), top_k=top_k)


def make_inputs(
    description: BundleDescription, sizes: ProbeSizes, layer: int, norm_weight: NormWeight | None = None
) -> ProbeInputs:
    """One layer's random inputs, which are deterministic.

    Args:
        description: the bundle's sizes and dtype.
        sizes: how many tokens, and experts of each.
        layer: the layer; each has different inputs.
        norm_weight: the backbone's weight of the norm before the experts; by default ones, as before training.
    """
    generator = torch.Generator().manual_seed(_SEED + layer)
    hidden_states_TD = torch.randn((sizes.tokens, description.hidden_size), generator=generator)
    hidden_states_TD /= hidden_states_TD.square().mean(dim=1, keepdim=True).sqrt()
    if norm_weight is not None:
        hidden_states_TD = hidden_states_TD * norm_weight(layer).float()
    # Each choice of a token is one expert after the previous one, so all experts are used.
    steps_TK = torch.arange(sizes.tokens)[:, None] * sizes.top_k + torch.arange(sizes.top_k)[None, :]
    expert_index_TK = (steps_TK % description.num_experts).to(torch.int32)
    expert_index_TK[-1, -1] = NO_EXPERT
    weight_TK = torch.rand((sizes.tokens, sizes.top_k), generator=generator).add_(0.1)
    weight_TK /= weight_TK.sum(dim=1, keepdim=True)
    dtype = description.torch_dtype
    return ProbeInputs(hidden_states_TD.to(dtype).float(), expert_index_TK, weight_TK.to(dtype).float())


def reference_output(weights: ExpertWeights, inputs: ProbeInputs) -> torch.Tensor:
    """The reference kernel's output in float32, T × D. Experts are converted one at a time to bound memory."""
    output_TD = torch.zeros_like(inputs.hidden_states_TD)
    kernel = ReferenceKernel()
    with torch.inference_mode():
        for expert in range(weights.num_experts):
            alone = slice(expert, expert + 1)
            prepared = kernel.load(
                ExpertWeights(
                    weights.gate_EFD[alone].float(), weights.up_EFD[alone].float(), weights.down_EDF[alone].float()
                )
            )
            index_TK = torch.where(inputs.expert_index_TK == expert, 0, NO_EXPERT)
            output_TD += prepared.forward(inputs.hidden_states_TD, index_TK, inputs.weight_TK)
    return output_TD


class ProbeSource:
    """Computes the tensors of a new bundle's probe file by name, layer by layer."""

    def __init__(
        self, description: BundleDescription, load_layer: LoadLayer, norm_weight: NormWeight | None = None
    ) -> None:
        """Takes the bundle's description, its written experts, and the norms' weights if known."""
        assert description.probe is not None
        self._description = description
        self._sizes = description.probe
        self._load_layer = load_layer
        self._norm_weight = norm_weight
        self._tensors: dict[str, torch.Tensor] = {}

    def __call__(self, name: str) -> torch.Tensor:
        """The tensor of this name."""
        if name not in self._tensors:
            self._tensors = self._layer(int(name.split(".")[2]))
        return self._tensors[name]

    def _layer(self, layer: int) -> dict[str, torch.Tensor]:
        inputs = make_inputs(self._description, self._sizes, layer, self._norm_weight)
        parts: dict[ProbePart, torch.Tensor] = {
            "hidden_states": inputs.hidden_states_TD,
            "expert_index": inputs.expert_index_TK,
            "weight": inputs.weight_TK,
            "output": reference_output(self._load_layer(layer), inputs),
        }
        return {probe_tensor(layer, part): parts[part] for part in PROBE_PARTS}


def self_test(
    bundle: Bundle,
    kernel: ExpertKernel,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> SelfTest:
    """Computes every layer's probe with a kernel and compares. One layer is loaded at a time.

    Args:
        bundle: the verified bundle; NaN and infinity fail here too.
        kernel: the kernel.
        device: the device.
        dtype: the dtype to convert weights to; None keeps the bundle's.

    Raises:
        ProbeError: an output differs by more than the tolerance, is not finite, or has another shape or dtype.
        InvalidBundleError: a tensor is missing, a file is damaged, or a weight is too large for the dtype.
        ValueError: the kernel cannot compute this dtype on this device.
    """
    dtype = dtype or bundle.manifest.torch_dtype
    tolerance = TOLERANCES[dtype]
    worst_error, worst_layer, resident_bytes = 0.0, 0, 0
    name = kernel.name
    for layer in range(bundle.manifest.num_layers):
        weights = bundle.load_layer(layer)
        inputs, expected_TD = _probe_of(bundle, layer, weights)
        prepared = kernel.load(convert_experts(weights, dtype, device, layer))
        name = kernel_in_use(kernel, prepared)
        resident_bytes += prepared.nbytes
        # All tokens and a single one, because a kernel may have separate code for few tokens.
        for tokens in (slice(None), slice(0, 1)):
            error = _error(layer, prepared, inputs, expected_TD, tokens, torch.device(device), dtype)
            if error > tolerance:
                raise ProbeError(
                    f"layer {layer}: the kernel {name} differs in {dtype_name(dtype)} from the "
                    f"{'recorded' if bundle.manifest.probe else 'reference'} output by {error:.2g} of the largest "
                    f"value, and {tolerance:g} is allowed; the weights or the kernel are not what they were"
                )
            if error > worst_error:
                worst_error, worst_layer = error, layer
    return SelfTest(
        bundle.manifest.probe is not None, name, dtype_name(dtype), tolerance, worst_error, worst_layer, resident_bytes
    )


def _probe_of(bundle: Bundle, layer: int, weights: ExpertWeights) -> tuple[ProbeInputs, torch.Tensor]:
    manifest = bundle.manifest
    if manifest.probe is None:
        inputs = make_inputs(manifest, probe_sizes(manifest.num_experts), layer)
        return inputs, reference_output(weights, inputs)
    parts = bundle.probe(layer)
    index_TK = parts["expert_index"]
    low, high = (int(bound) for bound in torch.aminmax(index_TK))
    if low < NO_EXPERT or high >= manifest.num_experts:
        raise ProbeError(
            f"layer {layer}: the probe asks experts {low} to {high}; the bundle has 0 to {manifest.num_experts - 1}"
        )
    return ProbeInputs(parts["hidden_states"], index_TK, parts["weight"]), parts["output"]


def _error(
    layer: int,
    prepared: PreparedExperts,
    inputs: ProbeInputs,
    expected_TD: torch.Tensor,
    tokens: slice,
    device: torch.device,
    dtype: torch.dtype,
) -> float:
    """The largest difference, relative to the layer's largest output."""
    x_TD = inputs.hidden_states_TD[tokens].to(device=device, dtype=dtype)
    with torch.inference_mode():
        found_TD = prepared.forward(
            x_TD,
            inputs.expert_index_TK[tokens].to(device),
            inputs.weight_TK[tokens].to(device=device, dtype=dtype),
        )
    if found_TD.shape != x_TD.shape or found_TD.dtype != dtype:
        raise ProbeError(
            f"layer {layer}: the kernel gave {found_TD.dtype} {list(found_TD.shape)} for {dtype} {list(x_TD.shape)}"
        )
    if not is_finite(found_TD):
        raise ProbeError(f"layer {layer}: the output is infinite or not a number in {dtype_name(dtype)}")
    largest = float(expected_TD.abs().max())
    difference = float((found_TD.float().cpu() - expected_TD[tokens]).abs().max())
    return difference / largest if largest else difference
