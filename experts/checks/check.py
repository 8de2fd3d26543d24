"""Checks everything about one bundle, in a process of its own: `python -m experts.checks.check`.

It reads a `CheckRequest` as JSON from stdin and writes a `CheckResult` as one line of JSON to stdout. The exit code is
0 for a valid bundle and 1 otherwise. A bundle that crashes its kernel or exhausts memory ends only this process:
`experts.checks.isolated_check` starts it, waits, and reports the result.
"""

import errno
import os
import resource
import sys
import time
from pathlib import Path

import torch

from experts.bundles.bundle import Bundle
from experts.bundles.convert import check_dtype
from experts.bundles.gate_check import check_gates
from experts.bundles.manifest import Manifest
from experts.bundles.probe import self_test
from experts.checks.check_request import BackboneSizes, CheckRequest, CheckResult
from experts.errors import ExpertCapacityError, InvalidBundleError, UnknownBundleError
from experts.kernels.registry import get_kernel

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def check(bundle: Bundle, request: CheckRequest) -> CheckResult:
    """Checks a bundle in this process: fit, signature, files, digests, tensors, finite weights, gates, self-test.

    Args:
        bundle: the bundle of `request.source`.
        request: how to check it.

    Raises:
        InvalidBundleError: the bundle is not valid.
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
    """Checks a bundle's organ and backbone.

    Raises:
        InvalidBundleError: they differ; the text names both.
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
    """Limits the private memory that this process may allocate in addition to its current memory.

    Linux counts the heap and private writable mappings for RLIMIT_DATA, but not files mapped for reading.

    Raises:
        OSError: this is not Linux.
    """
    held = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmData:"))
    limit = int(held.split()[1]) * 1024 + extra_bytes
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


def main() -> int:
    """Reads a request, checks the bundle and writes the result."""
    started = time.monotonic()
    # Only the result may be written to stdout; kernels may print.
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
            # The files are mapped copy-on-write, which counts for the limit although it takes no memory.
            limit_memory(request.memory_bytes + _bytes_on_disk(bundle))
        return check(bundle, request)
    except (InvalidBundleError, UnknownBundleError, ExpertCapacityError, ValueError) as error:
        reason = str(error)
    except Exception as error:
        # Kernels of other packages and file systems may raise any exception; the bundle cannot be used then.
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
    # The actual size, not the manifest's.
    return sum(path.stat().st_size for path in bundle.locations.values() if path.is_file())


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    text = str(error).lower()
    return isinstance(error, MemoryError) or "allocate memory" in text or "bad_alloc" in text or "out of memory" in text


if __name__ == "__main__":
    sys.exit(main())
