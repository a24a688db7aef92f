"""Puts a static x86-64 ELF program and its first stack frame into memory, as the kernel's execve does."""

import os
import struct
from dataclasses import dataclass
from pathlib import Path

from memory import EXECUTE, PAGE, READ, USER, WRITE, Memory, page_ceil

_PT_LOAD, _PT_INTERP, _ET_DYN = 1, 3, 3
_PF_X, _PF_W, _PF_R = 1, 2, 4
_PIE_BASE = 0x400000
_STACK_TOP, STACK_SIZE = 0x7FFF_FFFF_0000, 8 << 20

# Keys of the auxiliary vector (elf.h)
_AT_NULL, _AT_PHDR, _AT_PHENT, _AT_PHNUM, _AT_PAGESZ, _AT_ENTRY = 0, 3, 4, 5, 6, 9
_AT_UID, _AT_EUID, _AT_GID, _AT_EGID, _AT_PLATFORM, _AT_CLKTCK, _AT_SECURE, _AT_RANDOM = (
    11,
    12,
    13,
    14,
    15,
    17,
    23,
    25,
)


@dataclass(frozen=True)
class Program:
    entry: int
    stack_pointer: int
    end: int  # of the highest segment, page-aligned: where brk begins


def load(memory: Memory, path: Path, arguments: list[str], environment: dict[str, str]) -> Program:
    """``ValueError`` if the file is not a static x86-64 executable."""
    image = path.read_bytes()
    if image[:6] != b"\x7fELF\x02\x01" or struct.unpack_from("<H", image, 18)[0] != 62:
        raise ValueError(f"{path} is not an x86-64 ELF file")
    (kind,) = struct.unpack_from("<H", image, 16)
    entry, headers_at = struct.unpack_from("<QQ", image, 24)
    header_size, num_headers = struct.unpack_from("<HH", image, 54)
    base = _PIE_BASE if kind == _ET_DYN else 0

    end = headers_address = 0
    for i in range(num_headers):
        kind, flags, offset, address, _, file_size, memory_size, _ = struct.unpack_from(
            "<IIQQQQQQ", image, headers_at + i * header_size
        )
        if kind == _PT_INTERP:
            raise ValueError(f"{path} is dynamically linked; link it with -static")
        if kind != _PT_LOAD:
            continue
        address += base
        protection = USER
        protection |= READ if flags & _PF_R else 0
        protection |= WRITE if flags & _PF_W else 0
        protection |= EXECUTE if flags & _PF_X else 0
        first_page = address // PAGE * PAGE
        memory.map(first_page, address + memory_size - first_page, protection)
        memory.write(address, image[offset : offset + file_size])
        end = max(end, address + memory_size)
        if offset <= headers_at < offset + file_size:
            headers_address = address + headers_at - offset

    memory.map(_STACK_TOP - STACK_SIZE, STACK_SIZE, READ | WRITE | USER)
    auxiliary = {
        _AT_PHDR: headers_address,
        _AT_PHENT: header_size,
        _AT_PHNUM: num_headers,
        _AT_PAGESZ: PAGE,
        _AT_ENTRY: base + entry,
        _AT_CLKTCK: 100,
        **dict.fromkeys((_AT_UID, _AT_EUID, _AT_GID, _AT_EGID, _AT_SECURE), 0),
    }
    stack_pointer = _first_frame(memory, arguments, environment, auxiliary)
    return Program(base + entry, stack_pointer, page_ceil(end))


def _first_frame(
    memory: Memory, arguments: list[str], environment: dict[str, str], auxiliary: dict[int, int]
) -> int:
    """Writes argc, argv, envp and the auxiliary vector (System V ABI, 3.4.1); returns their address."""
    top = _STACK_TOP

    def push(data: bytes) -> int:
        nonlocal top
        top -= len(data)
        memory.write(top, data)
        return top

    auxiliary = auxiliary | {_AT_PLATFORM: push(b"x86_64\0"), _AT_RANDOM: push(os.urandom(16))}
    argv = [push(os.fsencode(a) + b"\0") for a in arguments]
    envp = [push(os.fsencode(f"{k}={v}") + b"\0") for k, v in environment.items()]
    words = [len(argv), *argv, 0, *envp, 0]
    for key, value in auxiliary.items():
        words += key, value
    words += _AT_NULL, 0
    top = (top - 8 * len(words)) // 64 * 64
    memory.write(top, struct.pack(f"<{len(words)}Q", *words))
    return top
