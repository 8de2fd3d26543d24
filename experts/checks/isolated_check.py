"""Checks a bundle in a separate process, so that one that crashes, hangs or exhausts memory does no harm."""

import os
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from pydantic import ValidationError

from experts.checks.check import CheckRequest, CheckResult
from experts.checks.check_fork_server import IDLE, start_check
from experts.checks.fork_server import REPORT, ForkServer

DEFAULT_TIMEOUT_S = 600.0
# Several organs are often staged together; between rollouts lie hours.
DEFAULT_IDLE_S = 60.0
_MAX_RESULT_BYTES = 1024 * 1024
_SHOWN_BYTES = 500
# How long a killed group may take to be gone.
_KILL_S = 5.0


class IsolatedChecks:
    """Checks bundles, each in a process of its own, which is forked from a fork server that has imported torch.

    The fork server starts with the first check, ends when there was none for `idle_s`, and takes the memory of an idle
    interpreter with torch, about 200 MB. May be used from several threads at once.
    """

    def __init__(self, *, idle_priority: bool = False, idle_s: float = DEFAULT_IDLE_S) -> None:
        """
        Args:
            idle_priority: the checks get only processor time that nothing else wants, so that they do not slow down
                replicas on the same cores; where the cores are never idle, a check then takes very long. The fork
                server itself imports at the priority of this process.
            idle_s: how long the fork server waits for another check.
        """
        self._idle_priority = idle_priority
        self._idle_s = idle_s
        self._lock = threading.Lock()
        self._server: ForkServer | None = None
        self._checks = 0
        self._timer: threading.Timer | None = None

    def close(self) -> None:
        """Ends the fork server; a check under way goes on. A later check starts it again."""
        with self._lock:
            server, self._server = self._server, None
        if server is not None:
            server.close()

    def check(self, request: CheckRequest, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> CheckResult:
        """Runs `experts.checks.check` and waits; a thread may be waiting while an event loop goes on.

        Args:
            request: what to check, and how.
            timeout_s: after so long the process, and all that it started, is killed.

        Returns:
            The result. It is not ok, with a reason, when the process did not end well.
        """
        deadline = time.monotonic() + timeout_s
        with (
            self._under_way(),
            tempfile.TemporaryFile() as wanted,
            tempfile.TemporaryFile() as output,
            tempfile.TemporaryFile() as errors,
        ):
            wanted.write(_absolute(request).model_dump_json().encode())
            try:
                # The process that forks may have been killed, in which case there is another one to ask.
                for _ in range(2):
                    wanted.seek(0)
                    code = self._run(wanted.fileno(), output.fileno(), errors.fileno(), deadline)
                    if code is not None:
                        return _result(code, output, errors)
            except TimeoutError:
                return CheckResult(ok=False, reason=f"the check did not end within {timeout_s:g} s and was killed")
        return CheckResult(ok=False, reason="the check could not be started, or was lost with the process it came from")

    @contextmanager
    def _under_way(self) -> Iterator[None]:
        with self._lock:
            self._checks += 1
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
        try:
            yield
        finally:
            with self._lock:
                self._checks -= 1
                if not self._checks and self._server is not None:
                    self._timer = threading.Timer(self._idle_s, self._close_if_idle)
                    self._timer.daemon = True
                    self._timer.start()

    def _close_if_idle(self) -> None:
        with self._lock:
            if self._checks:
                return
            server, self._server = self._server, None
        if server is not None:
            server.close()

    def _run(self, wanted: int, output: int, errors: int, deadline: float) -> int | None:
        """Returns the exit code, or minus the number of the signal; None when the process was not there.

        Raises:
            TimeoutError: it was killed at the deadline.
        """
        report, report_of_check = socket.socketpair()
        with report:
            with report_of_check:
                try:
                    with self._lock:
                        if self._server is None:
                            arguments = [IDLE] if self._idle_priority else []
                            self._server = ForkServer(
                                "experts.checks.check_fork_server", *arguments, environment=os.environ
                            )
                        start_check(self._server, wanted, output, errors, report_of_check.fileno())
                except OSError:
                    self.close()
                    return None
            process_id: int | None = None
            try:
                process_id = _next_number(report, deadline)
                code = None if process_id is None else _next_number(report, deadline)
            except BaseException:
                # Also Ctrl-C.
                if process_id is None:
                    # It may be about to start; it should not.
                    self.close()
                else:
                    # It has not reported its end, so the id is still its own.
                    _kill_group(process_id)
                    with suppress(OSError):
                        _next_number(report, time.monotonic() + _KILL_S)
                raise
            if code is None:
                self.close()
            return code


def check_in_subprocess(request: CheckRequest, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> CheckResult:
    """Checks one bundle at normal priority; see `IsolatedChecks.check`. To check several, keep an `IsolatedChecks`."""
    with closing(IsolatedChecks()) as checks:
        return checks.check(request, timeout_s=timeout_s)


def _next_number(report: socket.socket, deadline: float) -> int | None:
    """What the watcher of a check says next; None when it has ended without saying anything."""
    # Zero would mean not to wait at all.
    report.settimeout(max(0.001, deadline - time.monotonic()))
    number = report.recv(REPORT.size)
    return REPORT.unpack(number)[0] if len(number) == REPORT.size else None


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


def _kill_group(process_id: int) -> None:
    # All may be gone by themselves.
    with suppress(ProcessLookupError):
        os.killpg(process_id, signal.SIGKILL)


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
