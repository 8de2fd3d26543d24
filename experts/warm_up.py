"""The expert calls that a bundle must answer on the serving replica before it counts as loaded.

They take the way of every call: built as a router builds them, in its dtype and with its number of experts per
token, serialised, checked, computed by the loaded kernel on its device, and serialised again. What fails here would
fail in every request. Where the bundle brought a probe, the answers must also be the recorded ones: verification may
have run another kernel than the one that serves, on another device.
"""

from collections.abc import Iterator

import torch
from google.rpc import code_pb2, status_pb2

from experts.bundles.bundle import Bundle
from experts.bundles.convert import dtype_name
from experts.bundles.finite import is_finite
from experts.bundles.manifest import ProbeSizes
from experts.bundles.probe import TOLERANCES, ProbeInputs, make_inputs, probe_sizes
from experts.errors import WarmUpError
from experts.transport import wire
from experts.transport.expert_calls import ExpertCalls, SupportsForward
from protos import expert_pb2


def warm_up(group: SupportsForward, bundle: Bundle, *, dtype: torch.dtype, top_k: int) -> None:
    """Has every layer compute several tokens, among which every expert is asked, and one token alone.

    Args:
        group: computes with the bundle.
        bundle: what was loaded.
        dtype: of the hidden states that a router sends.
        top_k: experts per token that a router asks for, where the bundle has as many.

    Raises:
        WarmUpError: a call failed, or its answer is not what it must be; the text says in which layer and why.
    """
    calls = ExpertCalls(group, to_status=_to_status, max_queue=1)
    for layer in range(bundle.manifest.num_layers):
        for inputs in _inputs(bundle, layer, top_k):
            _call(calls, bundle, layer, inputs, dtype)
        if bundle.manifest.probe is not None:
            parts = bundle.probe(layer)
            recorded = ProbeInputs(parts["hidden_states"], parts["expert_index"], parts["weight"])
            _compare(layer, _call(calls, bundle, layer, recorded, dtype), parts["output"])


def _inputs(bundle: Bundle, layer: int, top_k: int) -> Iterator[ProbeInputs]:
    manifest = bundle.manifest
    top_k = min(top_k, manifest.num_experts)
    several = make_inputs(manifest, ProbeSizes(tokens=probe_sizes(manifest.num_experts).tokens, top_k=top_k), layer)
    yield several
    yield ProbeInputs(several.hidden_states_TD[:1], several.expert_index_TK[:1], several.weight_TK[:1])


def _call(calls: ExpertCalls, bundle: Bundle, layer: int, inputs: ProbeInputs, dtype: torch.dtype) -> torch.Tensor:
    x_TD = inputs.hidden_states_TD.to(dtype)
    message = wire.forward_request(1, bundle.digest, layer, x_TD, inputs.expert_index_TK, inputs.weight_TK.to(dtype))
    request, data = wire.parse(expert_pb2.ForwardRequest, message)
    response, data = wire.parse(expert_pb2.ForwardResponse, calls.compute(request, data))
    tokens = f"{len(x_TD)} {'token' if len(x_TD) == 1 else 'tokens'}"
    if response.HasField("error"):
        raise WarmUpError(
            f"layer {layer} cannot compute {tokens} in {dtype_name(dtype)}, as requests send them: "
            f"{response.error.message}"
        )
    output_TD = wire.tensor_of(response.output, data, "output")
    if not is_finite(output_TD):
        raise WarmUpError(f"layer {layer}: the output for {tokens} in {dtype_name(dtype)} is infinite or not a number")
    return output_TD


def _compare(layer: int, found_TD: torch.Tensor, expected_TD: torch.Tensor) -> None:
    tolerance = TOLERANCES[found_TD.dtype]
    largest = float(expected_TD.abs().max())
    error = float((found_TD.float() - expected_TD).abs().max()) / (largest or 1.0)
    if error > tolerance:
        raise WarmUpError(
            f"layer {layer} differs in {dtype_name(found_TD.dtype)} from the recorded output by {error:.2g} of the "
            f"largest value on this replica, and {tolerance:g} is allowed"
        )


def _to_status(error: Exception) -> status_pb2.Status:
    # An operator reads it, and inputs are made up: nothing of a request can be in the text.
    return status_pb2.Status(code=code_pb2.FAILED_PRECONDITION, message=f"{type(error).__name__}: {str(error)[:500]}")
