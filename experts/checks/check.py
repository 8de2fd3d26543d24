"""Checks everything about one bundle, in a process of its own: `python -m experts.checks.check`.

A `CheckRequest` comes in as JSON on stdin, a `CheckResult` goes out as one line of JSON on stdout; the exit code is 0
for a good bundle and 1 for a bad one. A bundle that crashes its kernel or exhausts memory ends this process and no
other: `experts.checks.isolated_check` starts it, waits, and says what happened.
"""

import errno
import os
import resource
import sys
import time
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field

from experts.bundles.bundle import Bundle
from experts.bundles.convert import OtherDtype, check_dtype
from experts.bundles.gate_check import check_gates
from experts.bundles.manifest import Digest, DTypeName, Manifest
from experts.bundles.probe import self_test
from experts.bundles.signing import SignaturePolicy, SignatureState
from experts.errors import ExpertCapacityError, InvalidBundleError, UnknownBundleError
from experts.kernels.registry import get_kernel
from experts.registry.source import BundleSource

DEFAULT_MEMORY_BYTES = 8 * 1024**3
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class BackboneSizes(BaseModel):
    """What a bundle must fit."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    digest: Digest
    num_layers: Annotated[int, Field(ge=1)]
    hidden_size: Annotated[int, Field(ge=1)]


class CheckRequest(BaseModel):
    """What to check, and how."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: BundleSource
    # When given, a bundle of another organ is refused.
    organ: str | None = None
    # When given, a bundle for another backbone, or of sizes that do not fit it, is refused.
    backbone: BackboneSizes | None = None
    policy: SignaturePolicy = SignaturePolicy()
    kernel: str = "auto"
    device: Literal["cpu", "cuda"] = "cpu"
    # In which the backbone computes, and so the self-test; None is the bundle's own.
    dtype: DTypeName | None = None
    # "refuse" lets no bundle pass that would have to be converted.
    other_dtype: OtherDtype = "convert"
    # The most memory that checking may take beyond this process itself and the bundle's files, which are only mapped.
    # Not on a GPU, whose driver maps far more than it uses.
    memory_bytes: Annotated[int, Field(ge=1)] = DEFAULT_MEMORY_BYTES
    torch_threads: Annotated[int, Field(ge=1)] = 1


class CheckResult(BaseModel):
    """What was found. Fields are None where it did not get that far."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    ok: bool
    # Why not.
    reason: str | None = None
    organ: str | None = None
    version: str | None = None
    digest: str | None = None
    signature: SignatureState | None = None
    kernel: str | None = None
    # In which it was computed, and which the bundle's experts have: where they differ, weights are converted at load.
    dtype: str | None = None
    bundle_dtype: DTypeName | None = None
    # Whether the bundle brought its probe.
    probe_recorded: bool | None = None
    # The largest difference from the probe's outputs as a share of the layer's largest, and how much is allowed.
    worst_error: float | None = None
    tolerance: float | None = None
    # What all layers would take as the kernel keeps them.
    resident_bytes: int | None = None
    # The most that the checking process had in memory, files included, and how long the check took.
    peak_bytes: int | None = None
    seconds: float | None = None


def check(bundle: Bundle, request: CheckRequest) -> CheckResult:
    """Checks a bundle in this process: fit, signature, files, digests, tensors, finite weights, gates, self-test.

    Args:
        bundle: what `request.source` opens.
        request: how to check it.

    Raises:
        InvalidBundleError: the bundle is not what it must be.
        ValueError: there is no such kernel, or it cannot compute here.
    """
    manifest = bundle.manifest
    dtype = manifest.torch_dtype if request.dtype is None else _DTYPES[request.dtype]
    check_fits(manifest, organ=request.organ, backbone=request.backbone)
    check_dtype(manifest, dtype, request.other_dtype)
    signature = request.policy.check(bundle)
    bundle.verify(finite=True)
    check_gates(bundle, dtype)
    test = self_test(bundle, get_kernel(request.kernel), device=request.device, dtype=dtype)
    return CheckResult(
        ok=True,
        organ=manifest.organ,
        version=manifest.version,
        digest=bundle.digest,
        signature=signature,
        kernel=test.kernel,
        dtype=test.dtype,
        bundle_dtype=manifest.dtype,
        probe_recorded=test.recorded,
        worst_error=test.worst_error,
        tolerance=test.tolerance,
        resident_bytes=test.resident_bytes,
    )


def check_fits(manifest: Manifest, *, organ: str | None, backbone: BackboneSizes | None) -> None:
    """Checks that a bundle is of an organ and made for a backbone.

    Raises:
        InvalidBundleError: it is not; the text names both sides.
    """
    title = f"bundle {manifest.name} {manifest.version}"
    if organ is not None and manifest.organ != organ:
        raise InvalidBundleError(f"{title} is of organ {manifest.organ!r}, not of {organ!r}")
    if backbone is None:
        return
    if manifest.backbone_digest != backbone.digest:
        raise InvalidBundleError(
            f"{title} was trained against the backbone {manifest.backbone_digest[:12]}…, not {backbone.digest[:12]}…"
        )
    for name, found, wanted in (
        ("num_layers", manifest.num_layers, backbone.num_layers),
        ("hidden_size", manifest.hidden_size, backbone.hidden_size),
    ):
        if found != wanted:
            raise InvalidBundleError(f"{title} has {name} {found}, the backbone has {wanted}")


def limit_memory(extra_bytes: int) -> None:
    """Limits the private memory that this process may take beyond what it has now; beyond that, allocations fail.

    Counts what Linux counts for RLIMIT_DATA: heap and private writable maps, not files that are only read.

    Raises:
        OSError: this is no Linux.
    """
    held = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmData:"))
    limit = int(held.split()[1]) * 1024 + extra_bytes
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


def main() -> int:
    """Reads a request, checks, writes the result; see the module."""
    started = time.monotonic()
    # Only the result may be on stdout, whatever a kernel prints.
    output = os.dup(1)
    os.dup2(2, 1)
    request = CheckRequest.model_validate_json(sys.stdin.buffer.read())
    torch.set_num_threads(request.torch_threads)
    result = _limited_check(request)
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    result = result.model_copy(update={"peak_bytes": peak_bytes, "seconds": time.monotonic() - started})
    os.write(output, (result.model_dump_json() + "\n").encode())
    return 0 if result.ok else 1


def _limited_check(request: CheckRequest) -> CheckResult:
    bundle: Bundle | None = None
    try:
        bundle = request.source.open()
        if request.device == "cpu":
            # The files are mapped copy-on-write, which counts although it takes nothing.
            limit_memory(request.memory_bytes + _bytes_on_disk(bundle))
        return check(bundle, request)
    except (InvalidBundleError, UnknownBundleError, ExpertCapacityError, ValueError) as error:
        reason = str(error)
    except Exception as error:
        # Another package's kernel, or a file system: whatever it raises, the bundle cannot be used here.
        if _is_out_of_memory(error):
            reason = (
                f"checking it takes more than {request.memory_bytes} bytes of memory, the limit memory_bytes; "
                "raise it, or make the layers smaller"
            )
        else:
            what = "it cannot be opened" if bundle is None else f"the kernel {request.kernel} failed"
            reason = f"{what}: {type(error).__name__}: {str(error)[:500]}"
    if bundle is None:
        return CheckResult(ok=False, reason=reason)
    manifest = bundle.manifest
    return CheckResult(ok=False, reason=reason, organ=manifest.organ, version=manifest.version, digest=bundle.digest)


def _bytes_on_disk(bundle: Bundle) -> int:
    # Not what the manifest claims.
    return sum(path.stat().st_size for path in bundle.locations.values() if path.is_file())


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    text = str(error).lower()
    return isinstance(error, MemoryError) or "allocate memory" in text or "bad_alloc" in text or "out of memory" in text


if __name__ == "__main__":
    sys.exit(main())
