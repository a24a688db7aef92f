"""A guest's memory: physical frames on the host's heap, and the x86-64 page tables that map them.

Every page has its own entry, so that an access to what the program does not own is a page fault, as on the
real machine: in particular a read past the end of an array that ends where its mapping ends.
"""

import ctypes
import mmap
from types import ModuleType

PAGE = mmap.PAGESIZE

READ, WRITE, EXECUTE = mmap.PROT_READ, mmap.PROT_WRITE, mmap.PROT_EXEC
USER = 8  # not a bit of mmap's: pages without it belong to the kernel

_PRESENT, _WRITABLE, _USER, _NO_EXECUTE = 1, 2, 4, 1 << 63
_LEVEL_SHIFTS = (39, 30, 21)  # of the three levels above the page table
_Table = ctypes.c_uint64 * 512


def page_ceil(address: int) -> int:
    return -(-address // PAGE) * PAGE


class BadAddress(Exception):
    """The program passed the kernel a pointer to memory that it does not own."""


class Memory:
    def __init__(self, bochscpu: ModuleType):
        self._bochs = bochscpu.memory
        self._host: dict[int, int] = {}  # physical frame -> its page on the host, once touched
        self._frames: dict[int, int] = {}  # virtual page -> physical frame
        self._next_frame = PAGE
        self.root = self._new_frame()  # for CR3
        self._tables = {}  # (level, address prefix) -> physical frame of a lower table

    def map(self, start: int, length: int, protection: int) -> None:
        """Gives [start, start + length) fresh zeroed pages where it has none; sets the protection of all."""
        for page in range(start, page_ceil(start + length), PAGE):
            if page not in self._frames:
                self._frames[page] = self._new_frame()
            self._set_entry(page, protection)

    def protect(self, start: int, length: int, protection: int) -> None:
        """``BadAddress`` if part of the range is unmapped."""
        pages = range(start, page_ceil(start + length), PAGE)
        if not all(page in self._frames for page in pages):
            raise BadAddress(start)
        for page in pages:
            self._set_entry(page, protection)

    def unmap(self, start: int, length: int) -> None:
        for page in range(start, page_ceil(start + length), PAGE):
            if (frame := self._frames.pop(page, None)) is not None:
                self._table_entries(page)[page >> 12 & 511] = 0
                self._bochs.page_remove(frame)
                if host := self._host.pop(frame, None):
                    self._bochs.release_host_page(host)

    def is_mapped(self, address: int) -> bool:
        return address // PAGE * PAGE in self._frames

    def touch(self, physical: int) -> None:
        """Backs a physical frame by host memory: Bochs asks for it on the first access."""
        self._host_page(physical // PAGE * PAGE)

    def read(self, address: int, length: int) -> bytes:
        return b"".join(ctypes.string_at(host, n) for host, n in self._pieces(address, length))

    def write(self, address: int, data: bytes) -> None:
        done = 0
        for host, n in self._pieces(address, len(data)):
            ctypes.memmove(host, data[done : done + n], n)
            done += n

    def read_string(self, address: int) -> bytes:
        text = b""
        while not text.endswith(b"\0"):
            text += self.read(address + len(text), 1)
        return text[:-1]

    def _pieces(self, address: int, length: int):
        """Host address and length of each page's part of a virtual range."""
        while length > 0:
            page, offset = address // PAGE * PAGE, address % PAGE
            if page not in self._frames:
                raise BadAddress(address)
            n = min(length, PAGE - offset)
            yield self._host_page(self._frames[page]) + offset, n
            address, length = address + n, length - n

    def _new_frame(self) -> int:
        self._next_frame += PAGE
        return self._next_frame - PAGE

    def _host_page(self, frame: int) -> int:
        if frame not in self._host:
            host = self._bochs.allocate_host_page()
            ctypes.memset(host, 0, PAGE)
            self._bochs.page_insert(frame, host)
            self._host[frame] = host
        return self._host[frame]

    def _set_entry(self, page: int, protection: int) -> None:
        entry = self._frames[page] | _NO_EXECUTE
        if protection & (READ | WRITE | EXECUTE):
            entry |= _PRESENT
        if protection & USER:
            entry |= _USER
        if protection & WRITE:
            entry |= _WRITABLE
        if protection & EXECUTE:
            entry &= ~_NO_EXECUTE
        self._table_entries(page)[page >> 12 & 511] = entry

    def _table_entries(self, page: int):
        """The page table that holds `page`'s entry; the tables on the way to it are made as needed."""
        frame = self.root
        for shift in _LEVEL_SHIFTS:
            key = shift, page >> shift
            if key not in self._tables:
                self._tables[key] = self._new_frame()
                parent = _Table.from_address(self._host_page(frame))
                parent[page >> shift & 511] = self._tables[key] | _PRESENT | _WRITABLE | _USER
            frame = self._tables[key]
        return _Table.from_address(self._host_page(frame))
