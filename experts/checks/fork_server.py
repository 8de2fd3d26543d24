"""A fork server: a process that forks itself on request, so that new processes start with its imports.

`ForkServer` starts one from any program, also from one with threads, which must not fork itself. `serve` runs in it. It
opens no file of a request and starts no thread, so every process begins in the same clean state. It ends when the
program that started it ends or closes it, and kills processes that a request leaves behind.

`multiprocessing`'s fork server is not used, because it cannot be ended while the program runs, each of its processes
runs the program's main module again (in a replica: Ray's worker), and grandchildren survive.
"""

import ctypes
import gc
import os
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

# First the process id, then the exit code, or minus the number of a signal.
REPORT = struct.Struct("=i")
_PR_SET_PDEATHSIG = 1


class ForkServer:
    """The handle of a running fork server. Not thread-safe."""

    def __init__(self, module: str, *arguments: str, environment: Mapping[str, str]) -> None:
        """Starts `python -m module FD arguments` and does not wait for its imports.

        Args:
            module: the module to run, which calls `serve` with the socket FD.
            arguments: further arguments of the module.
            environment: the complete environment of the process and its forks.
        """
        self._connection, other_end = socket.socketpair()
        with other_end:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module, str(other_end.fileno()), *arguments],
                stdin=subprocess.DEVNULL,
                pass_fds=[other_end.fileno()],
                # A process with threads must not be forked.
                env={**environment, "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "0"},
                cwd=_import_root(),
                # No new session: Linux shares the cores equally among sessions, and niceness only counts within one
                # (sched(7), autogroup).
                process_group=0,
            )

    @property
    def process_id(self) -> int:
        """The process id of the fork server."""
        return self._process.pid

    def fork(self, *descriptors: int) -> None:
        """Requests one process, which gets copies of the descriptors.

        Args:
            descriptors: as many as `serve` expects. The last is a socket or pipe for two numbers (`REPORT`): at the
                start the process id, which is also the process group's, and at the end the exit status, once the whole
                group has ended.

        Raises:
            OSError: the fork server has ended.
        """
        socket.send_fds(self._connection, [b"f"], descriptors)

    def close(self) -> None:
        """Ends the fork server, also during its imports."""
        self._connection.close()
        self._process.kill()
        self._process.wait()


def serve(
    connection: socket.socket,
    num_descriptors: int,
    run: Callable[[Sequence[int]], int],
    *,
    end_together: bool = False,
) -> None:
    """Forks for every request until the other end closes.

    Args:
        connection: the connection to the `ForkServer`.
        num_descriptors: the number of descriptors of each request, including the one for reports.
        run: called in each new process with the other descriptors; returns the exit code.
        end_together: whether the processes are killed when this one ends.
    """
    # The exit status of watchers is not needed.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    # Ctrl-C in a terminal reaches this process too, but the program that started it decides when it ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Existing objects are frozen, so that garbage collection in a fork does not write to shared pages.
    gc.collect()
    gc.freeze()
    own_id = os.getpid()
    while True:
        message, descriptors, _, _ = socket.recv_fds(connection, 1, num_descriptors)
        if not message:
            return
        if os.fork() == 0:
            connection.close()
            if end_together:
                _end_with_parent(own_id)
            _watch(descriptors, run, end_together=end_together)
        for descriptor in descriptors:
            os.close(descriptor)


def _watch(descriptors: Sequence[int], run: Callable[[Sequence[int]], int], *, end_together: bool) -> NoReturn:
    """Forks the process, reports its id, waits for it, kills its process group, and reports its exit status."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    *given, report = descriptors
    own_id = os.getpid()
    process_id = os.fork()
    if process_id == 0:
        os.close(report)
        if end_together:
            _end_with_parent(own_id)
        _run(given, run)
    for descriptor in given:
        os.close(descriptor)
    # The group may be killed as soon as its id is known.
    with suppress(PermissionError, ProcessLookupError):
        os.setpgid(process_id, process_id)
    with suppress(OSError):
        os.write(report, REPORT.pack(process_id))
    # Not reaped yet, so that no other process can get its id.
    os.waitid(os.P_PID, process_id, os.WEXITED | os.WNOWAIT)
    with suppress(ProcessLookupError):
        os.killpg(process_id, signal.SIGKILL)
    _, status = os.waitpid(process_id, 0)
    with suppress(OSError):
        os.write(report, REPORT.pack(os.waitstatus_to_exitcode(status)))
    os._exit(0)


def _run(descriptors: Sequence[int], run: Callable[[Sequence[int]], int]) -> NoReturn:
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    code = 1
    try:
        code = run(descriptors)
    finally:
        sys.stderr.flush()
        # Without the fork server's exit handlers.
        os._exit(code)


def _end_with_parent(parent_id: int) -> None:
    """Makes the kernel kill this process when its parent ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent_id:
        os._exit(1)


def set_idle_priority() -> None:
    """Gives this process and its forks idle priority."""
    if hasattr(os, "SCHED_IDLE"):
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    else:
        os.setpriority(os.PRIO_PROCESS, 0, 19)


def _import_root() -> Path:
    """The folder from which `-m` imports the code that runs here."""
    return Path(__file__).resolve().parents[2]
