import contextlib
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from echovlm_ray.config import ControlSection, ExpertsSection
from echovlm_ray.serving.control.operation_threads import OPERATION_THREADS, operation_threads
from tests.running_system import ECHORAY, RunningSystem, title_of

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="niceness of threads is Linux's")


def replica(system: RunningSystem, application: str) -> psutil.Process:
    found = psutil.Process(system.process.pid).children(recursive=True)
    return next(process for process in found if f"ServeReplica:{application}:" in title_of(process))


def seconds_of_threads(process: psutil.Process) -> dict[int, float]:
    """CPU time by thread. The kernel's scheduler notes it in nanoseconds; /proc's ticks are too coarse."""
    seconds = {}
    for task in Path(f"/proc/{process.pid}/task").iterdir():
        # A thread may end between the listing and the reading.
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            seconds[int(task.name)] = int((task / "schedstat").read_text().split()[0]) / 1e9
    return seconds


def busiest_thread(before: dict[int, float], after: dict[int, float]) -> int:
    return max(after, key=lambda thread: after[thread] - before.get(thread, 0.0))


def test_the_experts_compute_below_the_router(running_system: RunningSystem) -> None:
    processes = [replica(running_system, "expert-heart"), replica(running_system, "router")]
    before = [seconds_of_threads(process) for process in processes]
    command = ["generate", "--organ", "heart", "--task", "free", "--prompt", "Describe", "--max-new-tokens", "100"]
    subprocess.run(
        [ECHORAY, *command, "--server", running_system.gateway_address], check=True, capture_output=True, timeout=60
    )
    busiest = [busiest_thread(b, seconds_of_threads(p)) for b, p in zip(before, processes, strict=True)]
    experts, router = (os.getpriority(os.PRIO_PROCESS, thread) for thread in busiest)
    assert (experts, router) == (ExpertsSection().niceness, 0)


def test_operations_do_not_give_way_with_the_rest_of_control() -> None:
    """Niceness is a thread's own, so a thread of the test's plays Control's first one."""

    def control() -> list[int]:
        threads = operation_threads()
        os.nice(7)
        with threads, ThreadPoolExecutor(1) as later:
            executors = [threads] * OPERATION_THREADS + [later]
            return [executor.submit(os.getpriority, os.PRIO_PROCESS, 0).result() for executor in executors]

    with ThreadPoolExecutor(1) as first:
        own = first.submit(os.getpriority, os.PRIO_PROCESS, 0).result()
        assert first.submit(control).result() == [own] * OPERATION_THREADS + [own + 7]


def test_control_gives_way_to_those_that_answer(running_system: RunningSystem) -> None:
    process = replica(running_system, "control")
    before = seconds_of_threads(process)
    subprocess.run(
        [ECHORAY, "experts", "list", "--control", running_system.control_address],
        check=True,
        capture_output=True,
        timeout=60,
    )
    busiest = busiest_thread(before, seconds_of_threads(process))
    assert os.getpriority(os.PRIO_PROCESS, busiest) == ControlSection().niceness
