"""Files that are written whole or not at all, and whether there is room for them."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

__all__ = ["check_room", "write_whole"]


def write_whole(file: str | os.PathLike, write: Callable[[BinaryIO], object]) -> Path:
    """What ``write`` puts into the stream it is given becomes the file; an old file stays as it was until the
    new one is on the disk, and for good if anything fails. ``OSError`` as the disk says, and for what is no
    plain file: a device's name would become that of a file.
    """
    file = Path(file)
    _check_plain(file)
    handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.", suffix=".tmp")
    try:
        with open(handle, "wb") as stream:
            write(stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp made it private
        os.replace(temporary, file)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    _sync_folder(file.parent)
    return file


def check_room(file: str | os.PathLike, nbytes: int = 0) -> None:
    """What writing ``nbytes`` to the file would meet, before the work is done whose result it is to take.

    ``IsADirectoryError`` if it is a folder, ``FileNotFoundError`` or another ``OSError`` if its folder is not
    there or takes no files, ``OSError`` (``EINVAL``) for a device or a pipe, (``ENOSPC``) if its disk has
    less room.
    """
    file = Path(file)
    _check_plain(file)
    with tempfile.TemporaryFile(dir=file.parent):
        free = shutil.disk_usage(file.parent).free
    if free < nbytes:
        told = f"about {nbytes / 1e6:.0f} MB will be written and {free / 1e6:.0f} MB are free"
        raise OSError(errno.ENOSPC, told, str(file))


def _check_plain(file: Path) -> None:
    if file.is_dir():
        raise IsADirectoryError(errno.EISDIR, "a folder, a file is wanted", str(file))
    if file.exists() and not file.is_file():
        raise OSError(errno.EINVAL, "a device or a pipe, a plain file is wanted", str(file))


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable."""
    with contextlib.suppress(OSError):  # some file systems cannot
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
