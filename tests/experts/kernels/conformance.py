"""What every kernel must compute, against the float32 loop of `reference`: cases that any test may run on any device.

A test runs `check_case(kernel, case, dtype, device)` for each of `CASES` (those with `large` set are too much for an
interpreter), `check_gradients` where the kernel has them, and `check_no_expert_is_exactly_zero`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from experts.kernels.base import NO_EXPERT, ExpertKernel, ExpertWeights
from experts.kernels.reference import ReferenceKernel

# Relative L2 error.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
GRADIENT_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}

Exchange = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
# Which experts the tokens go to: tokens, top_k, experts, generator -> index_TK.
Routing = Callable[[int, int, int, torch.Generator], torch.Tensor]


def anywhere(tokens: int, top_k: int, experts: int, generator: torch.Generator) -> torch.Tensor:
    """Any expert or none, also the same one twice."""
    return torch.randint(NO_EXPERT, experts, (tokens, top_k), generator=generator, dtype=torch.int32)


def distinct(tokens: int, top_k: int, experts: int, generator: torch.Generator) -> torch.Tensor:
    """As a token gate does: top_k different experts."""
    return torch.rand((tokens, experts), generator=generator).argsort(dim=1)[:, :top_k].int()


def last_expert_only(tokens: int, top_k: int, experts: int, _: torch.Generator) -> torch.Tensor:
    """Every pair to one expert: its own tokens twice, and the others have none."""
    return torch.full((tokens, top_k), experts - 1, dtype=torch.int32)


def every_second_expert(tokens: int, top_k: int, experts: int, generator: torch.Generator) -> torch.Tensor:
    """Empty experts in between."""
    return torch.randint(0, (experts + 1) // 2, (tokens, top_k), generator=generator, dtype=torch.int32) * 2


def same_expert_twice(tokens: int, top_k: int, experts: int, generator: torch.Generator) -> torch.Tensor:
    """Each token names one expert in all its places."""
    return torch.randint(0, experts, (tokens, 1), generator=generator, dtype=torch.int32).repeat(1, top_k)


def no_expert(tokens: int, top_k: int, _: int, __: torch.Generator) -> torch.Tensor:
    """This group has no part in any pair."""
    return torch.full((tokens, top_k), NO_EXPERT, dtype=torch.int32)


@dataclass(frozen=True, slots=True)
class Case:
    """Sizes and routing of one call."""

    name: str
    experts: int = 4
    hidden: int = 64
    inner: int = 48
    tokens: int = 17
    top_k: int = 2
    routing: Routing = anywhere
    large: bool = False


CASES = (
    *(Case(f"{experts} experts", experts=experts) for experts in range(1, 9)),
    *(Case(f"{tokens} tokens", tokens=tokens, routing=distinct) for tokens in (1, 2, 33, 130)),
    Case("no tokens", tokens=0),
    Case("no pairs", top_k=0),
    Case("top 1", top_k=1),
    Case("more places than experts", experts=2, top_k=5),
    Case("empty experts", experts=7, routing=every_second_expert),
    Case("all rows to one expert", tokens=50, routing=last_expert_only),
    Case("one expert twice a token", routing=same_expert_twice),
    Case("no part in any pair", routing=no_expert),
    Case("hidden 72, inner 40", hidden=72, inner=40),
    Case("hidden 33, inner 17", hidden=33, inner=17, tokens=9),
    Case("hidden 136, inner 264", hidden=136, inner=264, tokens=70),
    Case("experts × inner above 32768", experts=8, hidden=32, inner=4224, tokens=40, large=True),
    Case("rows above 32768", experts=4, hidden=16, inner=16, tokens=17000, routing=distinct, large=True),
    Case("rows of one expert above 32768", experts=2, hidden=16, inner=16, tokens=33000, top_k=1, large=True),
)


def make_weights(experts: int, hidden: int, inner: int, dtype: torch.dtype, seed: int = 0) -> ExpertWeights:
    """Random experts whose outputs are about as large as their inputs."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) / math.sqrt(shape[-1])).to(dtype)

    return ExpertWeights(random(experts, inner, hidden), random(experts, inner, hidden), random(experts, hidden, inner))


def make_exchange(case: Case, dtype: torch.dtype, seed: int = 1) -> Exchange:
    """Random rows, the case's routing, and weights of the pairs."""
    generator = torch.Generator().manual_seed(seed)
    x_TD = torch.randn((case.tokens, case.hidden), generator=generator).to(dtype)
    index_TK = case.routing(case.tokens, case.top_k, case.experts, generator)
    weight_TK = torch.rand((case.tokens, case.top_k), generator=generator).to(dtype)
    return x_TD, index_TK, weight_TK


def on_device(weights: ExpertWeights, device: torch.device | str, dtype: torch.dtype) -> ExpertWeights:
    """The same weights elsewhere or in another dtype."""
    return ExpertWeights(*(part.to(device, dtype) for part in (weights.gate_EFD, weights.up_EFD, weights.down_EDF)))


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The L2 norm of the difference over that of what is expected."""
    found, expected = found.detach().cpu().double(), expected.detach().cpu().double()
    return float((found - expected).norm() / expected.norm().clamp_min(1e-30))


def check_case(kernel: ExpertKernel, case: Case, dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
    """The kernel's output has the right shape, dtype and place, and is within the contract of the float32 loop's."""
    weights = make_weights(case.experts, case.hidden, case.inner, dtype)
    x_TD, index_TK, weight_TK = make_exchange(case, dtype)
    oracle = ReferenceKernel().load(on_device(weights, "cpu", torch.float32))
    expected_TD = oracle.forward(x_TD.float(), index_TK, weight_TK.float())
    prepared = kernel.load(on_device(weights, device, dtype))
    with torch.inference_mode():
        output_TD = prepared.forward(x_TD.to(device), index_TK.to(device), weight_TK.to(device))
    assert (output_TD.dtype, output_TD.shape) == (dtype, x_TD.shape)
    assert output_TD.device.type == torch.device(device).type
    error = relative_error(output_TD, expected_TD)
    assert error <= TOLERANCE[dtype], f"{kernel.name}, {case.name}, {dtype}: relative error {error:.1e}"
    assert prepared.nbytes >= weights.nbytes


def check_no_expert_is_exactly_zero(
    kernel: ExpertKernel, dtype: torch.dtype, device: torch.device | str = "cpu", hidden: int = 64, inner: int = 48
) -> None:
    """A pair without an expert adds nothing, whatever its weight is and whatever else is in the call."""
    case = Case("no expert", experts=2, hidden=hidden, inner=inner, tokens=6, routing=distinct)
    weights = on_device(make_weights(case.experts, case.hidden, case.inner, dtype), device, dtype)
    x_TD, index_TK, weight_TK = make_exchange(case, dtype)
    index_TK[2], weight_TK[2] = NO_EXPERT, float("nan")
    index_TK[4, 0], weight_TK[4, 0] = NO_EXPERT, float("inf")
    with torch.inference_mode():
        output_TD = kernel.load(weights).forward(x_TD.to(device), index_TK.to(device), weight_TK.to(device)).cpu()
    assert torch.count_nonzero(output_TD[2]) == 0
    assert torch.isfinite(output_TD).all()
    assert torch.count_nonzero(output_TD[4]) > 0


def check_gradients(
    kernel: ExpertKernel, dtype: torch.dtype, device: torch.device | str = "cpu", hidden: int = 72, inner: int = 40
) -> None:
    """Gradients of weights, rows and pair weights are those of the float32 loop, and zero where nothing flows."""
    case = Case("gradients", experts=5, hidden=hidden, inner=inner, tokens=19, top_k=3, routing=every_second_expert)
    weights = make_weights(case.experts, case.hidden, case.inner, dtype)
    x_TD, index_TK, weight_TK = make_exchange(case, dtype)
    index_TK[3], index_TK[5, 1] = NO_EXPERT, NO_EXPERT
    weight_TK[3] = float("nan")
    along_TD = torch.randn(x_TD.shape, generator=torch.Generator().manual_seed(2)).to(dtype)

    def gradients(of: ExpertKernel, to: torch.dtype, where: torch.device | str) -> tuple[torch.Tensor, ...]:
        stacks = (weights.gate_EFD, weights.up_EFD, weights.down_EDF, x_TD, weight_TK)
        leaves = [tensor.to(where, to).detach().clone().requires_grad_() for tensor in stacks]
        prepared = of.load(ExpertWeights(*leaves[:3]))
        output_TD = prepared.forward(leaves[3], index_TK.to(where), leaves[4])
        return torch.autograd.grad((output_TD * along_TD.to(where, to)).sum(), leaves)

    names = ("gate", "up", "down", "rows", "pair weights")
    found = gradients(kernel, dtype, device)
    expected = gradients(ReferenceKernel(), torch.float32, "cpu")
    for name, one, other in zip(names, found, expected, strict=True):
        error = relative_error(one, other)
        assert error <= GRADIENT_TOLERANCE[dtype], f"{kernel.name}, {name}, {dtype}: relative error {error:.1e}"
    assert torch.count_nonzero(found[0][1]) == 0, "an expert without tokens"
    assert torch.count_nonzero(found[3][3]) == 0, "a token without experts"
