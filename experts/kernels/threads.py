"""Divides a computation among as many threads as torch was given."""

import concurrent.futures
import functools
import itertools
import os
from collections.abc import Callable

import torch


def share(compute: Callable[[int, int], object], count: int, parts: int) -> None:
    """Calls `compute(first, end)` for ranges that make up [0, count), at once where torch has several threads.

    Args:
        compute: works on a range without the interpreter's lock; of its own results, none is used.
        count: the end of the last range.
        parts: as many ranges at most; there are no more than threads.
    """
    parts = max(1, min(parts, count, torch.get_num_threads()))
    bounds = [count * part // parts for part in range(parts + 1)]
    others = [_threads(os.getpid()).submit(compute, *each) for each in itertools.pairwise(bounds[1:])]
    compute(0, bounds[1])
    for other in others:
        other.result()


@functools.cache
def _threads(process_id: int) -> concurrent.futures.ThreadPoolExecutor:
    """Of this process: a fork has none of its parent's. They start when they are needed first."""
    return concurrent.futures.ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="kernel")
