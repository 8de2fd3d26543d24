"""Memory shared by two processes on one host: created by the caller, mapped by the expert replica.

It is a file of memfd_create. Compared with a file in /dev/shm, killed processes leave nothing behind, a container's
limit on /dev/shm (64 MiB by default) does not apply, and its size is sealed, so that no process can truncate it and
crash the other with SIGBUS. Pages are allocated on first write.
"""

import fcntl
import mmap
import os
import threading
import time
import weakref
from collections import deque

import numpy as np

from experts.transport.layout import ALIGNMENT, Area

# Only for display in /proc/<process>/maps.
_NAME = "echovlm-expert-calls"
# Never freed: enough for a decoding step.
RESIDENT_BYTES = 1024 * 1024
# Memory beyond that, used by a prompt, is freed after this time without use.
IDLE_S = 5.0


class MemoryBudget:
    """The limit for all memory that one process shares."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self._lock = threading.Lock()
        self._used = 0
        self._memories: weakref.WeakSet[SharedMemory] = weakref.WeakSet()
        self._warned = False

    @property
    def used_bytes(self) -> int:
        """Bytes that are or may be in memory."""
        return self._used

    def register(self, memory: "SharedMemory") -> None:
        """Registers a memory, whose unused pages can be freed when another one needs them."""
        with self._lock:
            self._memories.add(memory)

    def take(self, nbytes: int, taker: "SharedMemory") -> bool:
        """Counts bytes as used. False if that exceeds the limit, even after other memories freed their unused pages."""
        with self._lock:
            if self._used + nbytes <= self.limit_bytes:
                self._used += nbytes
                return True
            others = [memory for memory in self._memories if memory is not taker]
        for memory in others:
            memory.give_back()
        with self._lock:
            fits = self._used + nbytes <= self.limit_bytes
            if fits:
                self._used += nbytes
            return fits

    def warn_once(self) -> bool:
        """True on the first call, to warn once that the budget is used up."""
        warned, self._warned = self._warned, True
        return not warned

    def give(self, nbytes: int) -> None:
        """Counts bytes as no longer used."""
        with self._lock:
            self._used -= nbytes


class SharedMemory:
    """The caller's memory for the calls to one replica.

    Areas are arrays. An area is free again when neither an array nor a tensor refers to it, so an answer needs no copy
    and can be kept as long as needed.
    """

    def __init__(self, budget: MemoryBudget) -> None:
        """Creates memory, which is used as far as the budget allows.

        Raises:
            OSError: the system refused.
        """
        self._descriptor = -1
        self.size = budget.limit_bytes
        self.budget = budget
        self._descriptor = os.memfd_create(_NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self._descriptor, self.size)
            seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
            fcntl.fcntl(self._descriptor, fcntl.F_ADD_SEALS, seals)
            self._map = mmap.mmap(self._descriptor, self.size)
        except BaseException:
            os.close(self._descriptor)
            raise
        self._octets: Area = np.frombuffer(self._map, dtype=np.uint8)
        self._lock = threading.Lock()
        # Free ranges below `_touched`, as [start, end), ascending; everything above is free and has no pages.
        self._free: list[tuple[int, int]] = []
        self._touched = 0
        self._freed: deque[tuple[int, int]] = deque()
        self._references: dict[int, weakref.ref[Area]] = {}
        self._used_at = time.monotonic()
        budget.register(self)
        # The budget is released when this object and all areas are gone.
        self._counted = _Counted(budget)
        weakref.finalize(self._octets, self._counted.give_all)

    @property
    def descriptor(self) -> int:
        """The descriptor for the replica; -1 if it is closed."""
        return self._descriptor

    def allocate(self, nbytes: int) -> tuple[Area, int] | None:
        """An area and its offset, or None if the budget is used up."""
        size = -(-nbytes // ALIGNMENT) * ALIGNMENT
        with self._lock:
            self._used_at = time.monotonic()
            self._collect()
            start = self._first_fit(size)
        if start is None and (start := self._extend(size)) is None:
            return None
        area: Area = self._octets[start : start + size]
        # Not through self, which would be a reference cycle.
        freed, span = self._freed, (start, start + size)
        self._references[start] = weakref.ref(area, lambda _: freed.append(span))
        return area, start

    def stretch(self, start: int, nbytes: int) -> Area:
        """A range of the memory, for writing to allocated areas."""
        return self._octets[start : start + nbytes]

    def give_back(self) -> None:
        """Frees the pages after the last area in use, except the minimum that is never freed."""
        with self._lock:
            self._collect()
            if not self._free or self._free[-1][1] != self._touched:
                return
            start = self._free[-1][0]
            keep = max(start, RESIDENT_BYTES)
            # Only whole pages can be freed.
            keep = -(-keep // mmap.PAGESIZE) * mmap.PAGESIZE
            if keep >= self._touched:
                return
            self._map.madvise(mmap.MADV_REMOVE, keep, self._touched - keep)
            self._counted.give(self._touched - keep)
            self._touched = keep
            self._free.pop()
            if start < keep:
                self._free.append((start, keep))

    def give_back_if_idle(self, now: float) -> None:
        """Like `give_back`, if nothing was allocated for `IDLE_S` seconds; `now` is from `time.monotonic`."""
        if now - self._used_at > IDLE_S and self._touched > RESIDENT_BYTES:
            self.give_back()

    def close_descriptor(self) -> None:
        """Closes the descriptor after the replica has mapped it, so that no other process can. Idempotent."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __del__(self) -> None:
        self.close_descriptor()

    def _collect(self) -> None:
        while self._freed:
            start, end = self._freed.popleft()
            self._references.pop(start, None)
            self._free.append((start, end))
            if len(self._free) > 1:
                self._free = _merged(self._free)

    def _first_fit(self, size: int) -> int | None:
        for place, (start, end) in enumerate(self._free):
            if end - start >= size:
                if end - start == size:
                    del self._free[place]
                else:
                    self._free[place] = start + size, end
                return start
        return None

    def _extend(self, size: int) -> int | None:
        # Without the lock, because the budget may call other memories, which call it.
        with self._lock:
            last = self._free[-1] if self._free and self._free[-1][1] == self._touched else None
            start = last[0] if last else self._touched
            extra = start + size - self._touched
            if last:
                self._free.pop()
            self._touched = max(self._touched, start + size)
        if extra <= 0 or (self._touched <= self.size and self._counted.take(extra, self)):
            return start
        with self._lock:
            self._touched -= extra
            if last:
                self._free.append(last)
        return None


class _Counted:
    """A memory's share of the budget. Outlives the memory as long as there are areas."""

    def __init__(self, budget: MemoryBudget) -> None:
        self._budget = budget
        self._nbytes = 0

    def take(self, nbytes: int, taker: SharedMemory) -> bool:
        taken = self._budget.take(nbytes, taker)
        if taken:
            self._nbytes += nbytes
        return taken

    def give(self, nbytes: int) -> None:
        self._nbytes -= nbytes
        self._budget.give(nbytes)

    def give_all(self) -> None:
        self.give(self._nbytes)


def _merged(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if merged and merged[-1][1] == start:
            merged[-1] = merged[-1][0], end
        else:
            merged.append((start, end))
    return merged
