"""The Linux system calls of a single-threaded, statically linked test program. Any other gets ENOSYS."""

import errno
import os
import struct
import sys
import time
from collections.abc import Callable

from elf import STACK_SIZE
from memory import PAGE, USER, BadAddress, Memory, page_ceil

_MMAP_BASE = 0x7F00_0000_0000
_MAP_FIXED, _MAP_ANONYMOUS = 0x10, 0x20
_ARCH_SET_FS, _ARCH_REQ_XCOMP_PERM = 0x1002, 0x1023
_WORD = 1 << 64


class Exit(Exception):
    """The program ended by itself."""

    def __init__(self, status: int):
        super().__init__(status)
        self.status = status


class Kernel:
    def __init__(self, memory: Memory, heap_start: int, set_fs_base: Callable[[int], None]):
        self._memory = memory
        self._heap_start = self._heap_end = heap_start
        self._mmap_next = _MMAP_BASE
        self._set_fs_base = set_fs_base
        self._unknown: set[int] = set()

    def call(self, number: int, arguments: tuple[int, ...]) -> int:
        """Result as the kernel puts it in RAX: -errno, modulo 2^64, for an error. Raises ``Exit``."""
        handler = _HANDLERS.get(number)
        if handler is None:
            if number not in self._unknown:
                print(f"emulator: system call {number} is not implemented", file=sys.stderr)
                self._unknown.add(number)
            return -errno.ENOSYS % _WORD
        try:
            return handler(self, *arguments) % _WORD
        except BadAddress:
            return -errno.EFAULT % _WORD
        except OSError as error:
            return -(error.errno or errno.EIO) % _WORD

    def _read(self, fd, buffer, length, *_):
        data = os.read(fd, length)
        self._memory.write(buffer, data)
        return len(data)

    def _write(self, fd, buffer, length, *_):
        return os.write(fd, self._memory.read(buffer, length))

    def _writev(self, fd, vectors, count, *_):
        pairs = struct.iter_unpack("<QQ", self._memory.read(vectors, 16 * count))
        return os.write(fd, b"".join(self._memory.read(start, length) for start, length in pairs))

    def _fstat(self, fd, buffer, *_):
        return self._store_stat(fd, buffer)

    def _newfstatat(self, fd, path, buffer, *_):
        return -errno.ENOENT if self._memory.read_string(path) else self._store_stat(fd, buffer)

    def _store_stat(self, fd, buffer):
        s = os.fstat(fd)
        head = struct.pack("<QQQIIII", s.st_dev, s.st_ino, s.st_nlink, s.st_mode, s.st_uid, s.st_gid, 0)
        self._memory.write(buffer, head.ljust(144, b"\0"))
        return 0

    def _mmap(self, address, length, protection, flags, *_):
        if not flags & _MAP_ANONYMOUS:
            return -errno.ENODEV
        if not 0 < length < 1 << 40:
            return -errno.EINVAL
        if flags & _MAP_FIXED:
            self._memory.unmap(address, length)
        else:
            address = self._mmap_next
            self._mmap_next += page_ceil(length) + PAGE  # an unmapped page between any two
        self._memory.map(address, length, protection | USER)
        return address

    def _mprotect(self, address, length, protection, *_):
        self._memory.protect(address, length, protection | USER)
        return 0

    def _munmap(self, address, length, *_):
        self._memory.unmap(address, length)
        return 0

    def _brk(self, end, *_):
        if self._heap_start <= end < self._heap_start + (1 << 32):
            before, after = page_ceil(self._heap_end), page_ceil(end)
            if after > before:
                self._memory.map(before, after - before, 3 | USER)
            else:
                self._memory.unmap(after, before - after)
            self._heap_end = end
        return self._heap_end

    def _arch_prctl(self, code, address, *_):
        if code == _ARCH_SET_FS:
            self._set_fs_base(address)
            return 0
        return 0 if code == _ARCH_REQ_XCOMP_PERM else -errno.EINVAL

    def _prlimit(self, pid, resource, new, old, *_):
        if old:
            self._memory.write(old, struct.pack("<QQ", STACK_SIZE, STACK_SIZE))
        return 0

    def _clock_gettime(self, clock, buffer, *_):
        self._memory.write(buffer, struct.pack("<QQ", *divmod(time.clock_gettime_ns(clock), 10**9)))
        return 0

    def _getrandom(self, buffer, length, *_):
        self._memory.write(buffer, os.urandom(length))
        return length

    def _sched_getaffinity(self, pid, length, buffer, *_):
        self._memory.write(buffer, struct.pack("<Q", 1))  # one CPU
        return 8

    def _exit(self, status, *_):
        raise Exit(status & 0xFF)

    def _kill(self, pid, signal, *_):
        raise Exit(128 + signal)

    def _tgkill(self, pid, thread, signal, *_):
        raise Exit(128 + signal)

    def _succeed(self, *_):
        return 0

    def _one(self, *_):
        return 1

    def _no_entry(self, *_):
        return -errno.ENOENT

    def _not_a_terminal(self, *_):
        return -errno.ENOTTY


_HANDLERS = {
    0: Kernel._read,
    1: Kernel._write,
    5: Kernel._fstat,
    9: Kernel._mmap,
    10: Kernel._mprotect,
    11: Kernel._munmap,
    12: Kernel._brk,
    13: Kernel._succeed,  # rt_sigaction: no signal is ever delivered
    14: Kernel._succeed,  # rt_sigprocmask
    16: Kernel._not_a_terminal,  # ioctl
    20: Kernel._writev,
    21: Kernel._no_entry,  # access
    24: Kernel._succeed,  # sched_yield
    28: Kernel._succeed,  # madvise
    39: Kernel._one,  # getpid
    60: Kernel._exit,
    62: Kernel._kill,
    89: Kernel._no_entry,  # readlink
    131: Kernel._succeed,  # sigaltstack
    158: Kernel._arch_prctl,
    186: Kernel._one,  # gettid
    200: Kernel._kill,  # tkill
    202: Kernel._succeed,  # futex: nobody to wait for
    204: Kernel._sched_getaffinity,
    218: Kernel._one,  # set_tid_address
    228: Kernel._clock_gettime,
    231: Kernel._exit,  # exit_group
    234: Kernel._tgkill,
    257: Kernel._no_entry,  # openat
    262: Kernel._newfstatat,
    267: Kernel._no_entry,  # readlinkat
    273: Kernel._succeed,  # set_robust_list
    302: Kernel._prlimit,
    318: Kernel._getrandom,
    334: lambda *_: -errno.ENOSYS,  # rseq: optional
}
