"""Keep freed memory for the next tensors."""

import ctypes
from contextlib import suppress

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt(3)
_KEPT = 2**30  # bytes at the end of the heap
_LARGEST = 2**27  # bytes of an allocation that comes from the heap


def keep_freed_memory() -> None:
    """Let glibc keep what this process frees, up to 1 GiB, instead of returning it to the kernel.

    On a CPU each step of a network frees its activations, and the next step asks for them again.
    By default glibc returns a large part of them, and the kernel clears every page that it hands
    out: with convolutions that took 40% of a step. Another C library is left alone.
    """
    with suppress(AttributeError, OSError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_MMAP_THRESHOLD, _LARGEST)
        mallopt(_TRIM_THRESHOLD, _KEPT)
