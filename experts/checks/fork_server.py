"""A process that forks itself on request, so that the processes it makes have its imports from the start.

`ForkServer` starts one from any program, also from one with threads, which must not fork itself; `serve` runs in it.
It opens no file of a request and starts no thread, so every process begins from the same clean state. It ends when the
program that started it ends or closes it, and kills what a process leaves behind.

`multiprocessing`'s fork server does not do this: it cannot be ended while the program runs, each of its processes runs
the program's main module again (in a replica: Ray's worker), and the children of its processes outlive them.
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

# A process id, and then how it ended: an exit code, or minus the number of a signal.
REPORT = struct.Struct("=i")
_PR_SET_PDEATHSIG = 1


class ForkServer:
    """A running fork server, seen from the program that started it. May be used from several threads, one at a time."""

    def __init__(self, module: str, *arguments: str, environment: Mapping[str, str]) -> None:
        """Starts `python -m module FD arguments` and does not wait for its imports.

        Args:
            module: calls `serve` with the socket FD.
            arguments: given to the module after FD.
            environment: all that the process and those that it forks see of the environment.
        """
        self._connection, other_end = socket.socketpair()
        with other_end:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module, str(other_end.fileno()), *arguments],
                stdin=subprocess.DEVNULL,
                pass_fds=[other_end.fileno()],
                # What has threads cannot be forked.
                env={**environment, "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "0"},
                cwd=_import_root(),
                # No session of its own: Linux gives every session an equal part of the cores, and niceness counts only
                # within it (sched(7), autogroup).
                process_group=0,
            )

    @property
    def process_id(self) -> int:
        """Of the fork server itself."""
        return self._process.pid

    def fork(self, *descriptors: int) -> None:
        """Requests one process, which gets copies of the descriptors.

        Args:
            descriptors: as many as `serve` expects. The last is a socket or pipe that gets two numbers (`REPORT`): the
                process id, which is its group's too, at the start, and how it ended, when nothing of the group is left.

        Raises:
            OSError: the fork server has ended.
        """
        socket.send_fds(self._connection, [b"f"], descriptors)

    def close(self) -> None:
        """Ends the fork server, also in the middle of its imports."""
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
        connection: to the `ForkServer`.
        num_descriptors: that come with each request, the one for reports included.
        run: called in each new process with the other descriptors; returns its exit code.
        end_together: the processes are killed when this one ends.
    """
    # How the watchers end is of no interest.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    # Ctrl-C in a terminal reaches this process too, but it is the program that started it that decides about its end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # What is there now is never collected, so the collector of no forked process writes to its pages.
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
    """Forks the process, reports its id, waits for it, kills what it leaves behind, and reports how it ended."""
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
    # It is not reaped yet: until then no other process can get its id.
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
        # Without what the fork server has registered for its own exit.
        os._exit(code)


def _end_with_parent(parent_id: int) -> None:
    """Has the kernel kill this process when its parent ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent_id:
        os._exit(1)


def set_idle_priority() -> None:
    """From now on this process, and those that it forks, compute only when nothing else on the machine does."""
    if hasattr(os, "SCHED_IDLE"):
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    else:
        os.setpriority(os.PRIO_PROCESS, 0, 19)


def _import_root() -> Path:
    """Where `-m` finds the same code as runs here."""
    return Path(__file__).resolve().parents[2]
