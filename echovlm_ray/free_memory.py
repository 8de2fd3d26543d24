"""Gives memory that was freed back to the system, which malloc would otherwise keep for later."""

import ctypes


def return_free_memory() -> None:
    """Takes milliseconds; does nothing where the C library cannot do it."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
