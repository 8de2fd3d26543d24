"""A measured system in a separate process: a line of JSON with a workload in, a line with the times out.

Every system gets a process so that its thread settings, allocator and libraries are its own. While one is measured,
the others wait for their next line.
"""

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from benchmarks.timings import Timings
from benchmarks.workload import Workload

ROOT = Path(__file__).resolve().parent.parent.parent
STOP_SECONDS = 60
LOG_LINES = 30

Run = Callable[[Workload], Timings]


class SystemFailedError(RuntimeError):
    """A measured system ended or failed. The text is the end of its log."""


class MeasuredSystem(AbstractContextManager["MeasuredSystem"]):
    """The parent's side: starts the process, sends workloads, and ends it with the block."""

    def __init__(self, arguments: Sequence[str], environment: dict[str, str], root: Path = ROOT) -> None:
        """Starts the process without waiting for it.

        Args:
            arguments: of the Python interpreter.
            environment: what is different from ours.
            root: the checkout that it is of.
        """
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 # closed in __exit__
        # A separate session: Ctrl-C reaches only this process, which ends the child in order.
        self._process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=root,
            env=os.environ | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            start_new_session=True,
        )

    def wait_until_ready(self) -> dict[str, Any]:
        """Waits until it is loaded; returns its description.

        Raises:
            SystemFailedError: it ended instead.
        """
        return self._read()

    def run(self, workload: Workload) -> Timings:
        """Runs a workload.

        Raises:
            SystemFailedError: it failed.
        """
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(workload.to_json()) + "\n")
            self._process.stdin.flush()
        return Timings.from_json(self._read())

    def log_tail(self, lines: int = LOG_LINES) -> str:
        """The last lines of its and its libraries' output."""
        self._log.seek(0)
        return "\n".join(self._log.read().decode(errors="replace").splitlines()[-lines:])

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            raise SystemFailedError(self.log_tail() or f"ended with {self._process.returncode}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ends the process, or kills it after a time."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._process.stdout.close()
        self._log.close()

    def __enter__(self) -> Self:
        """The system, which may still be loading."""
        return self


def serve_workloads(open_system: Callable[[], AbstractContextManager[Run]]) -> None:
    """The child's side: opens the system, and runs what comes in until the parent closes the pipe.

    Args:
        open_system: gives, for the length of a block, the function that runs a workload.
    """
    answers = answers_only()
    with open_system() as run:
        answers.write(json.dumps({"ready": True}) + "\n")
        for line in sys.stdin:
            workload = Workload.from_json(json.loads(line))
            timings = run(workload)
            if any(len(times) != workload.new_tokens for times in timings.tokens):
                raise RuntimeError(f"a stream did not make {workload.new_tokens} tokens")
            answers.write(json.dumps(timings.to_json()) + "\n")


def answers_only() -> IO[str]:
    """The child's standard output, for its answers alone: whatever a library prints goes to the log from now on."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    return answers


def parent_has_gone() -> bool:
    """Whether the parent has closed the pipe before the system is ready: until then it sends nothing else."""
    return bool(select.select([sys.stdin], [], [], 0)[0])


def exit_on_sigterm() -> None:
    """Makes SIGTERM end the parent in order, and with it the systems that it started."""

    def leave(number: int, frame: object) -> None:
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, leave)


def now() -> float:
    """The clock of all times."""
    return time.perf_counter()
