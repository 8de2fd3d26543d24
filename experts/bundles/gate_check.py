"""Checks that a bundle's gate rows can be used by a router whose backbone computes in a given dtype."""

import torch
import torch.nn.functional as F

from experts.bundles.bundle import Bundle
from experts.bundles.convert import convert, dtype_name
from experts.bundles.finite import is_finite
from experts.bundles.probe import make_inputs, probe_sizes
from experts.errors import ProbeError


def check_gates(bundle: Bundle, dtype: torch.dtype) -> None:
    """Converts every layer's gate rows as a router does, and computes their logits for the self-test's hidden states.

    Args:
        bundle: the verified bundle.
        dtype: the dtype of the backbone's hidden states.

    Raises:
        InvalidBundleError: a row is too large for the dtype.
        ProbeError: a logit is NaN or infinite, so that the experts' weights would be undefined.
    """
    manifest = bundle.manifest
    for layer in range(manifest.num_layers):
        rows_ED = convert(bundle.gate_ED(layer), dtype, f"layer {layer}, gate rows")
        if manifest.probe is None:
            hidden_states_TD = make_inputs(manifest, probe_sizes(manifest.num_experts), layer).hidden_states_TD
        else:
            hidden_states_TD = bundle.probe(layer)["hidden_states"]
        if not is_finite(F.linear(hidden_states_TD.to(dtype), rows_ED)):
            raise ProbeError(
                f"layer {layer}: the gate rows give logits that are infinite or not a number in {dtype_name(dtype)}"
            )
