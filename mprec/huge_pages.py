"""Memory for large tables in huge pages.

A look-up out of cache costs a page-table walk besides the access to the row. With pages of 2 MiB instead of
4 KiB the walks of a table of gigabytes hit the cache, which makes random gathers up to twice as fast. Linux
gives huge pages to memory that asks for them (``madvise``), if its setting
``/sys/kernel/mm/transparent_hugepage/enabled`` is ``madvise`` or ``always``; torch's allocator does not ask.
"""

import math
import mmap
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["LARGE", "PAGE", "empty", "resident", "supported"]

PAGE = 2 << 20  #: bytes of a huge page on x86-64
LARGE = 8 << 20  #: bytes from which on tables of :mod:`mprec.nn` are put into huge pages

_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def supported() -> bool:
    """True if this system gives huge pages to memory that asks for them."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return False
    try:
        return "[never]" not in _SETTING.read_text()
    except OSError:
        return False


def empty(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A CPU tensor of zeros in memory that asks for huge pages and starts on one.

    The memory is the tensor's own, as any tensor's: views keep it alive, it is freed with the last of them,
    and a copy of it is an ordinary tensor. Without huge pages on this system it has small ones.

    Raises:
        ValueError: a size is negative. OSError: there is not enough memory.
    """
    if any(n < 0 for n in size):
        raise ValueError(f"size: expected sizes >= 0, got {size}")
    count = math.prod(size)
    if count == 0:
        return torch.empty(*size, dtype=dtype)
    # Anonymous memory starts at any small page: one huge page more leaves room for the alignment.
    memory = mmap.mmap(-1, count * dtype.itemsize + PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if supported():
        memory.madvise(mmap.MADV_HUGEPAGE)
    start = torch.frombuffer(memory, dtype=torch.uint8, count=1).data_ptr()
    return torch.frombuffer(memory, dtype=dtype, count=count, offset=-start % PAGE).view(size)


def resident(tensor: Tensor) -> int:
    """How many bytes of huge pages the memory of a CPU tensor has, as the kernel accounts for it.

    Counts the whole mappings (``/proc/self/smaps``) that the tensor's storage touches, up to its size; 0
    where the system does not tell. Pages count once they were written.
    """
    storage = tensor.untyped_storage()
    first = storage.data_ptr()
    last = first + storage.nbytes()
    found = sum(size for begin, end, size in _mappings() if begin < last and first < end)
    return min(found, storage.nbytes())


def _mappings() -> Iterator[tuple[int, int, int]]:
    """(begin, end, bytes in huge pages) of this process's mappings."""
    try:
        text = Path("/proc/self/smaps").read_text()
    except OSError:
        return
    begin = end = 0
    for line in text.splitlines():
        if line.startswith("AnonHugePages:"):
            yield begin, end, int(line.split()[1]) << 10
        elif head := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            begin, end = (int(group, 16) for group in head.groups())
