"""Freed memory that the process keeps for its next tensors.

A training step allocates and frees some megabytes for each activation and gradient. glibc gives freed memory
back to the system and asks for it anew, and the system clears each page of 4 KiB when it is first touched. On
a virtual machine a page took 2.5 us, and a training step of 26 tables touched up to 1,000 of them in 12 ms.
"""

import ctypes
import sys

__all__ = ["keep"]

# malloc.h
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3


def keep(at_most: int = 1 << 30) -> bool:
    """Let the allocator keep up to ``at_most`` free bytes at the end of its heap.

    It then asks the system for 64 MiB at a time. This is for the whole process from now on: applications call
    it when they start, libraries do not. ``mprec train`` and ``mprec demo`` do.

    Returns:
        False where the allocator is not glibc's, and nothing has changed.

    Raises:
        ValueError: ``at_most`` is not in [0, 2^31).
    """
    if not 0 <= at_most < 1 << 31:
        raise ValueError(f"at_most: expected 0 to 2^31 - 1 bytes, got {at_most}")
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return False
    # The largest blocks that glibc lets stand in the heap are of 32 MiB.
    settings = {_MMAP_THRESHOLD: 32 << 20, _TRIM_THRESHOLD: at_most, _TOP_PAD: min(at_most, 64 << 20)}
    return all(mallopt(name, value) == 1 for name, value in settings.items())
