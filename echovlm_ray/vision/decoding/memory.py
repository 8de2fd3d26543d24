"""Memory that the gateway shares with one decoder process.

It is a file of memfd_create: it has no name, so nothing of it is left when both processes have ended.
The gateway copies out of it and never maps it: a decoder in hostile hands could change what is being read, or take the
pages away.
"""

import os

import numpy as np
import numpy.typing as npt

# Fresh pages cost more than copying into them.
KEPT_BYTES = 4 * 1024 * 1024


class Memory:
    """The gateway's end. Its descriptor is closed with the last reference, which a copying thread may have."""

    def __init__(self, size: int) -> None:
        """Makes memory of so many bytes; pages exist once they were written to."""
        self._size = size
        self.descriptor = os.memfd_create("echovlm-decoder", os.MFD_CLOEXEC)
        os.ftruncate(self.descriptor, size)

    def write(self, content: bytes) -> None:
        """Writes at the beginning, also beyond the size."""
        rest, offset = memoryview(content), 0
        while offset < len(rest):
            offset += os.pwrite(self.descriptor, rest[offset:], offset)

    def read(self, shape: tuple[int, ...]) -> npt.NDArray[np.uint8] | None:
        """A copy of what is at the beginning, as uint8; None where the memory was made shorter."""
        array = np.empty(shape, dtype=np.uint8)
        complete = os.preadv(self.descriptor, [array.data.cast("B")], 0) == array.nbytes
        return array if complete else None

    def give_back(self, used_bytes: int) -> None:
        """Returns the pages of a large file to the system; those of a usual one are reused."""
        if used_bytes > KEPT_BYTES:
            os.ftruncate(self.descriptor, 0)
            os.ftruncate(self.descriptor, self._size)

    def __del__(self) -> None:
        os.close(self.descriptor)
