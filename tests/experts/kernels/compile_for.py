"""Compiles Triton kernels for a GPU that need not be there."""

from dataclasses import dataclass
from typing import Any

HOPPER = 90


@dataclass(frozen=True)
class Launch:
    """A kernel as it would be launched: types of the arguments, values of the constants."""

    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 4


def compile_for(launch: Launch, capability: int = HOPPER) -> dict[str, Any]:
    """Intermediate forms and machine code by name: "ttgir", "ptx", "cubin" …"""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = launch.kernel.arg_names
    signature = {name: launch.types.get(name, "constexpr") for name in names}
    # What torch allocates begins at multiples of 16 bytes, which a launch would see for itself; integers that a launch
    # would find divisible are marked the same way, with a trailing "/16".
    divisible = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")}
    divisible |= {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].endswith("/16")}
    signature = {name: of_type.removesuffix("/16") for name, of_type in signature.items()}
    constants = {(names.index(name),): value for name, value in launch.constants.items()}
    source = ASTSource(launch.kernel, signature, constexprs=constants, attrs=divisible)
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    compiled: dict[str, Any] = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm
    return compiled
