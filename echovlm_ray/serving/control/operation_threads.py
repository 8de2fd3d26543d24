"""Threads for operators' calls, which keep the normal priority while the rest of Control has a lower one."""

import threading
from concurrent.futures import ThreadPoolExecutor

# More operations than that at once wait for each other; the database lets one write at a time anyway.
OPERATION_THREADS = 4


def operation_threads() -> ThreadPoolExecutor:
    """Threads that are all started, so that on Linux they keep the priority that the caller has now.

    An operation is a few milliseconds of work that an operator waits for. At Control's own priority it takes many times
    that on a machine whose cores are taken.
    """
    threads = ThreadPoolExecutor(OPERATION_THREADS, thread_name_prefix="operations")
    # An executor starts no thread while another one has nothing to do.
    all_started = threading.Barrier(OPERATION_THREADS + 1)
    for _ in range(OPERATION_THREADS):
        threads.submit(all_started.wait)
    all_started.wait()
    return threads
