"""Starts checks of bundles by forking itself: `python -m experts.checks.check_fork_server FD [idle]`.

Importing torch takes seconds of a core, more than checking a small bundle. This process does it once, and imports what
else most checks need. `experts.checks.isolated_check` starts it with the first check and ends it after the last.
With `idle` the checks have idle priority, but not the imports: on busy cores the first check would wait for minutes.
"""

import importlib
import os
import socket
import sys
import traceback
from collections.abc import Sequence

from experts.checks import check
from experts.checks.fork_server import ForkServer, serve, set_idle_priority

NUM_DESCRIPTORS = 4
# The argument for checks that compute only when nothing else does.
IDLE = "idle"
# What the registry and the kernel `auto` import only when they are asked for.
_PRELOADED = (
    "experts.kernels.auto",
    "experts.kernels.cpu_packed",
    "experts.kernels.reference",
    "fsspec.implementations.local",
)


def start_check(server: ForkServer, request: int, output: int, errors: int, report: int) -> None:
    """Requests one check.

    Args:
        server: runs this module.
        request: a file whose content is a `CheckRequest` as JSON.
        output: where the `CheckResult` is written.
        errors: what becomes stderr of the check.
        report: see `ForkServer.fork`.

    Raises:
        OSError: the fork server has ended.
    """
    server.fork(request, output, errors, report)


def main() -> int:
    """Serves until the other end closes; see the module."""
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
    try:
        return check.main()
    except BaseException:
        traceback.print_exc()
        return 1


if __name__ == "__main__":
    sys.exit(main())
