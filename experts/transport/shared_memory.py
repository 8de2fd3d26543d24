"""Memory that two processes of one host share: made by the caller, mapped by the expert replica.

It is a file of memfd_create. Compared with a name in /dev/shm, nothing is left behind by processes that are killed, at
any moment; a container's limit on /dev/shm (64 MiB by default) does not count; and its size is sealed, so that none
can shrink it under the other, which would then die of SIGBUS. Pages exist once they were written to.
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

# Shown in /proc/<process>/maps; nothing is found by it.
_NAME = "echovlm-expert-calls"
# Never given back: as much as a step of decoding takes.
RESIDENT_BYTES = 1024 * 1024
# What a prompt took beyond that is given back when it was not used for so long.
IDLE_S = 5.0


class MemoryBudget:
    """Bounds the pages of all the memory that one process shares."""

    def __init__(self, limit_bytes: int) -> None:
        """Nothing is used yet."""
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
        """Lets what the memory does not need be given back when another one needs more."""
        with self._lock:
            self._memories.add(memory)

    def take(self, nbytes: int, taker: "SharedMemory") -> bool:
        """Counts bytes as used; False where that would be over the limit even after the others gave back."""
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
        """True the first time that the budget is found used up, to warn once."""
        warned, self._warned = self._warned, True
        return not warned

    def give(self, nbytes: int) -> None:
        """Counts bytes as no longer used."""
        with self._lock:
            self._used -= nbytes


class SharedMemory:
    """The caller's end, for the calls of one replica.

    Areas are handed out as arrays. One that is no longer referred to, by a tensor either, is free to be used again, so
    an answer needs no copy and no rule for how long it may be kept.
    """

    def __init__(self, budget: MemoryBudget) -> None:
        """Makes memory of which all may be used that the budget allows.

        Raises:
            OSError: the system refuses.
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
        # What is free below `_touched`, as [start, end), in ascending order; all above is free and has no pages.
        self._free: list[tuple[int, int]] = []
        self._touched = 0
        self._freed: deque[tuple[int, int]] = deque()
        self._references: dict[int, weakref.ref[Area]] = {}
        self._used_at = time.monotonic()
        budget.register(self)
        # What the budget counts is given back when this is gone, and that is when no area is left either.
        self._counted = _Counted(budget)
        weakref.finalize(self._octets, self._counted.give_all)

    @property
    def descriptor(self) -> int:
        """What the replica maps it by; -1 when it is closed."""
        return self._descriptor

    def allocate(self, nbytes: int) -> tuple[Area, int] | None:
        """An area and its offset, or None where the budget is used up."""
        size = -(-nbytes // ALIGNMENT) * ALIGNMENT
        with self._lock:
            self._used_at = time.monotonic()
            self._collect()
            start = self._first_fit(size)
        if start is None and (start := self._extend(size)) is None:
            return None
        area: Area = self._octets[start : start + size]
        # Not through self: the memory would then be held by what it holds.
        freed, span = self._freed, (start, start + size)
        self._references[start] = weakref.ref(area, lambda _: freed.append(span))
        return area, start

    def stretch(self, start: int, nbytes: int) -> Area:
        """The memory itself, whether an area is there or not; for writing into areas that were allocated."""
        return self._octets[start : start + nbytes]

    def give_back(self) -> None:
        """Returns the pages behind the last area in use to the system, save what is resident."""
        with self._lock:
            self._collect()
            if not self._free or self._free[-1][1] != self._touched:
                return
            start = self._free[-1][0]
            keep = max(start, RESIDENT_BYTES)
            # Pages are given back whole.
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
        """The same, when nothing was allocated for `IDLE_S` seconds; `now` is of `time.monotonic`."""
        if now - self._used_at > IDLE_S and self._touched > RESIDENT_BYTES:
            self.give_back()

    def close_descriptor(self) -> None:
        """To be called when the replica has mapped it: no other process can, from now on. Harmless when repeated."""
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
        # Without the lock: the budget may ask other memories, and they it, to give back.
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
    """What one memory has taken of the budget; outlives the memory, for what it has handed out."""

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
