"""Checks a bundle in a separate process, so that one that crashes, hangs or exhausts memory harms nobody."""

import os
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from pydantic import ValidationError

from experts.bundle_check import CheckRequest, CheckResult

DEFAULT_TIMEOUT_S = 600.0
_MAX_RESULT_BYTES = 1024 * 1024
_SHOWN_BYTES = 500


def check_in_subprocess(request: CheckRequest, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> CheckResult:
    """Runs `experts.bundle_check` and waits; a thread may be waiting while an event loop goes on.

    Args:
        request: what to check, and how.
        timeout_s: after so long the process, and all that it started, is killed.

    Returns:
        The result. It is not ok, with a reason, whatever way the process ended.
    """
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "experts.bundle_check"],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=errors,
            env={**os.environ, "OMP_NUM_THREADS": str(request.torch_threads), "PYTHONFAULTHANDLER": "0"},
            cwd=_import_root(),
            # A group of its own, so that what a kernel starts ends with it. No session of its own: Linux gives every
            # session an equal part of the cores, and niceness counts only within it (sched(7), autogroup).
            process_group=0,
        )
        try:
            _give_way(process.pid)
            process.communicate(_absolute(request).model_dump_json().encode(), timeout=timeout_s)
        except subprocess.TimeoutExpired:
            return CheckResult(ok=False, reason=f"the check did not end within {timeout_s:g} s and was killed")
        finally:
            _kill_group(process)
        return _result(process.returncode, output, errors)


def _give_way(pid: int) -> None:
    """Leaves the process what nobody else computes with: whoever serves on the same cores comes first."""
    # Before it has threads of its own, which inherit it. It may have ended already.
    with suppress(ProcessLookupError):
        if hasattr(os, "SCHED_IDLE"):
            os.sched_setscheduler(pid, os.SCHED_IDLE, os.sched_param(0))
        else:
            os.setpriority(os.PRIO_PROCESS, pid, 19)


def _result(code: int, output: BinaryIO, errors: BinaryIO) -> CheckResult:
    if code < 0:
        name = signal.Signals(-code).name
        return CheckResult(ok=False, reason=f"the check was ended by {name}: the bundle or the kernel crashed it")
    output.seek(0)
    try:
        return CheckResult.model_validate_json(output.read(_MAX_RESULT_BYTES))
    except ValidationError:
        errors.seek(0, os.SEEK_END)
        errors.seek(max(0, errors.tell() - _SHOWN_BYTES))
        lines = errors.read().decode(errors="replace").strip().splitlines()
        last = lines[-1] if lines else "it printed nothing"
        return CheckResult(ok=False, reason=f"the check ended with exit code {code} and without a result: {last}")


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    # All may be gone by themselves.
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _import_root() -> Path:
    """Where `-m experts.bundle_check` finds the same code as runs here."""
    return Path(__file__).resolve().parent.parent


def _absolute(request: CheckRequest) -> CheckRequest:
    """The request with absolute paths: the process has another working directory."""
    source = request.source
    if source.folder is not None:
        source = source.model_copy(update={"folder": source.folder.absolute()})
    registry = source.registry
    if registry is not None:
        update: dict[str, object] = {
            "root": _absolute_root(registry.root),
            "fallbacks": tuple(_absolute_root(root) for root in registry.fallbacks),
        }
        if registry.cache_directory is not None:
            update["cache_directory"] = registry.cache_directory.absolute()
        source = source.model_copy(update={"registry": registry.model_copy(update=update)})
    keys = tuple(key.absolute() for key in request.policy.public_keys)
    policy = request.policy.model_copy(update={"public_keys": keys})
    return request.model_copy(update={"source": source, "policy": policy})


def _absolute_root(root: str) -> str:
    return root if "://" in root or "::" in root else str(Path(root).absolute())
