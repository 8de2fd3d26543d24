"""Starts checks of bundles by forking itself: `python -m experts.check_fork_server FD`.

Importing torch takes seconds of a core, more than checking a small bundle. This process pays for it once, and for what
else most checks import and compile; it opens no bundle and starts no thread, so every check begins from the same clean
state. `experts.isolated_check` talks to it over the socket FD: one byte a check, with four descriptors, see
`start_check`. It ends when the socket's other end closes.
"""

import importlib
import os
import signal
import socket
import struct
import sys
import traceback
from contextlib import suppress

from experts import bundle_check
from experts.kernels import cpu_packed

# A process id, and then how it ended: an exit code, or minus the number of a signal.
REPORT = struct.Struct("=i")
NUM_DESCRIPTORS = 4
# What the registry and the kernel `auto` import only when they are asked for.
_PRELOADED = (
    "experts.kernels.auto",
    "experts.kernels.reference",
    "fsspec.implementations.local",
)


def start_check(connection: socket.socket, request: int, output: int, errors: int, report: int) -> None:
    """Asks for one check.

    Args:
        connection: to the process of this module.
        request: a file whose content is a `CheckRequest` as JSON.
        output: where the `CheckResult` is written.
        errors: what becomes stderr of the check.
        report: a socket or pipe which gets two numbers (`REPORT`): the process id, which is its group's too, at the
            start, and the exit status at the end, when nothing of the group is left.

    Raises:
        OSError: nobody is at the other end.
    """
    socket.send_fds(connection, [b"c"], [request, output, errors, report])


def main() -> int:
    """Serves until the other end closes; see the module."""
    connection = socket.socket(fileno=int(sys.argv[1]))
    for module in _PRELOADED:
        importlib.import_module(module)
    cpu_packed.compile_ahead()
    # Nobody asks how the watchers ended.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    # Whoever started this ends it, by closing the socket; Ctrl-C in a terminal reaches both.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while True:
        message, descriptors, _, _ = socket.recv_fds(connection, 1, NUM_DESCRIPTORS)
        if not message:
            return 0
        if os.fork() == 0:
            connection.close()
            _watch(*descriptors)
        for descriptor in descriptors:
            os.close(descriptor)


def _watch(request: int, output: int, errors: int, report: int) -> None:
    """Forks the check, reports its id, waits for it, kills what it leaves behind, and reports how it ended."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    process_id = os.fork()
    if process_id == 0:
        _run(request, output, errors, report)
    # Whoever is told the id may kill the group at once.
    with suppress(PermissionError, ProcessLookupError):
        os.setpgid(process_id, process_id)
    with suppress(OSError):
        os.write(report, REPORT.pack(process_id))
    # Not reaped yet: until then nobody else can get its id.
    os.waitid(os.P_PID, process_id, os.WEXITED | os.WNOWAIT)
    with suppress(ProcessLookupError):
        os.killpg(process_id, signal.SIGKILL)
    _, status = os.waitpid(process_id, 0)
    with suppress(OSError):
        os.write(report, REPORT.pack(os.waitstatus_to_exitcode(status)))
    os._exit(0)


def _run(request: int, output: int, errors: int, report: int) -> None:
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.close(report)
    for descriptor, standard in ((request, 0), (output, 1), (errors, 2)):
        os.dup2(descriptor, standard)
        os.close(descriptor)
    code = 1
    try:
        code = bundle_check.main()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        # Not what this process was forked from has at exit.
        os._exit(code)


if __name__ == "__main__":
    sys.exit(main())
