"""The supervisor of `echoray serve`: runs it in a separate process and session, and waits for it.

So a signal to the whole process group, for example from a closed terminal or a service manager, reaches only this
process. It forwards the request to stop, and Ray's processes end in order. If the other process ends unexpectedly, all
processes that it started are ended.
"""

import ctypes
import gc
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress

import psutil
import typer

from echovlm_ray.cli.signals import EXIT_KILLED, StopRequest

# Ray or its cluster was lost.
EXIT_LOST = 3
EXIT_INVALID = 2
# Another `echoray serve` has replaced this one on the cluster.
EXIT_REPLACED = 4
# How long processes may take to end before they are killed.
END_GRACE_S = 3.0
FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 60.0
_PR_SET_CHILD_SUBREAPER = 36


def supervised(
    work: Callable[[int], int], *, restart: bool, say: Callable[[str], None], leave: Callable[[], None]
) -> int:
    """Runs the work until it ends.

    Args:
        work: runs in the other process. Gets a descriptor with one byte for each request to stop, and end of file when
            this process has died. Returns the exit status.
        restart: whether to run it again if it was lost after it had been ready, with exponential backoff up to a
            minute.
        say: prints a message.
        leave: called when the other process has ended in any way.

    Returns:
        The exit status.
    """
    _adopt_orphans()
    pause, ran_once = FIRST_PAUSE_S, False
    writer = -1

    def end_at_once() -> None:
        _kill_family()
        leave()

    # Both processes share what is there now as long as neither writes to it, which a collector would.
    gc.freeze()
    request = StopRequest(lambda: _tell(writer), end_at_once)
    with request.listening():
        while True:
            reader, writer = os.pipe()
            began = time.monotonic()
            child = _fork(work, reader, writer)
            os.close(reader)
            if request():
                _tell(writer)
            code = _wait(child)
            os.close(writer)
            writer = -1
            end_family()
            leave()
            ran_once = ran_once or code == EXIT_LOST
            if not restart or request() or not ran_once or code in (0, EXIT_INVALID, EXIT_REPLACED):
                return EXIT_KILLED if code < 0 and request() else EXIT_LOST if code < 0 else code
            pause = FIRST_PAUSE_S if time.monotonic() - began > LONGEST_PAUSE_S else min(2 * pause, LONGEST_PAUSE_S)
            say(f"Starting again in {pause:.0f} s.")
            if request.wait(pause):
                return 0


def end_family() -> None:
    """Ends all descendants of this process; kills those that do not end."""
    family = psutil.Process().children(recursive=True)
    for process in family:
        with suppress(psutil.NoSuchProcess):
            process.terminate()
    psutil.wait_procs(family, timeout=END_GRACE_S)
    _kill_family()


def _kill_family() -> None:
    # Repeated, because a process may have started another one.
    for _ in range(10):
        family = psutil.Process().children(recursive=True)
        if not family:
            return
        for process in family:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(family, timeout=0.5)


def _fork(work: Callable[[int], int], reader: int, writer: int) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        signal.set_wakeup_fd(-1)
        os.close(writer)
        os.setsid()
        code = work(reader)
    except typer.Exit as exit_:
        code = exit_.exit_code
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        # Not exit(), which would wait for Ray's threads in this process.
        os._exit(code)


def _wait(child: int) -> int:
    """Waits for the child and reaps orphans; returns the child's exit status."""
    while True:
        ended, status = os.wait()
        if ended == child:
            return os.waitstatus_to_exitcode(status)


def _tell(writer: int) -> None:
    with suppress(OSError):
        os.write(writer, b"s")


def _adopt_orphans() -> None:
    """On Linux, orphans become children of this process, so that they are found and ended."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if sys.platform == "linux" and prctl is not None:
        prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
