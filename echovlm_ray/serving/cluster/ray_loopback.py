"""Binds a local Ray to loopback only, as of Ray 2.60.

Ray's public options turn 127.0.0.1 into the machine's own address, and its processes then listen on all interfaces.
Where Ray runs no clusters (macOS and Windows) it takes loopback for everything; the same switch, with the variable that
its processes read, does so on Linux.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from ray._private import ray_constants

_VARIABLE = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"


@contextmanager
def on_loopback() -> Iterator[None]:
    """A Ray that is started inside listens on loopback, for as long as it runs; the block must last so long."""
    variable, constant = os.environ.get(_VARIABLE), ray_constants.ENABLE_RAY_CLUSTER
    os.environ[_VARIABLE] = "0"
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = constant
        if variable is None:
            del os.environ[_VARIABLE]
        else:
            os.environ[_VARIABLE] = variable
