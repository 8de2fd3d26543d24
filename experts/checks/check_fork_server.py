"""Starts checks of bundles by forking itself: `python -m experts.checks.check_fork_server FD [idle]`.

Importing torch takes seconds of CPU time, more than checking a small bundle. This process imports it once, with the
other modules that most checks need. `experts.checks.isolated_check` starts it with the first check and ends it after
the last. With `idle` the checks have idle priority. The imports do not, because on busy cores the first check would
wait for minutes.
"""

import importlib
import os
import socket
import sys
import traceback
from collections.abc import Sequence

from experts.checks.fork_server import ForkServer, serve, set_idle_priority

NUM_DESCRIPTORS = 4
# The argument for checks with idle priority.
IDLE = "idle"
# Not when this module is loaded, for Control loads it too and needs no torch. The rest is what the registry and the
# kernel `auto` import only when they are asked for.
_PRELOADED = (
    "experts.checks.check",
    "experts.kernels.auto",
    "experts.kernels.cpu_packed",
    "experts.kernels.reference",
    "fsspec.implementations.local",
)


def start_check(server: ForkServer, request: int, output: int, errors: int, report: int) -> None:
    """Requests one check.

    Args:
        server: runs this module.
        request: a file with a `CheckRequest` as JSON.
        output: the file for the `CheckResult`.
        errors: the file for the check's stderr.
        report: see `ForkServer.fork`.

    Raises:
        OSError: the fork server has ended.
    """
    server.fork(request, output, errors, report)


def main() -> int:
    """Serves until the other end closes."""
    connection = socket.socket(fileno=int(sys.argv[1]))
    for module in _PRELOADED:
        importlib.import_module(module)
    if IDLE in sys.argv[2:]:
        set_idle_priority()
    serve(connection, NUM_DESCRIPTORS, _check)
    return 0


def _check(descriptors: Sequence[int]) -> int:
    for standard, descriptor in enumerate(descriptors):
        os.dup2(descriptor, standard)
        os.close(descriptor)
    from experts.checks import check

    try:
        return check.main()
    except BaseException:
        traceback.print_exc()
        return 1


if __name__ == "__main__":
    sys.exit(main())
