"""Threads for operators' calls with normal priority; the rest of Control has a lower one."""

import threading
from concurrent.futures import ThreadPoolExecutor

# More concurrent operations wait; the database allows one writer at a time anyway.
OPERATION_THREADS = 4


def operation_threads() -> ThreadPoolExecutor:
    """A thread pool whose threads are all started now, so that on Linux they keep the caller's current priority.

    An operation takes a few milliseconds, for which an operator waits. At Control's priority it would take many times
    as long on a busy machine.
    """
    threads = ThreadPoolExecutor(OPERATION_THREADS, thread_name_prefix="operations")
    # An executor starts no new thread while another one is idle.
    all_started = threading.Barrier(OPERATION_THREADS + 1)
    for _ in range(OPERATION_THREADS):
        threads.submit(all_started.wait)
    all_started.wait()
    return threads
