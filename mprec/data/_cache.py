"""Parsed logs in files of plain numbers, mapped into memory and used again.

A cache is a folder: the files of its arrays and, written last, ``manifest.json`` with what it was made of
and a checksum for every MiB. It is made under another name and renamed, so that it is there whole or not at
all. One whose sources or options have changed, or whose files are not those that were written, is made anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from mprec._native import checksum
from mprec.errors import DataError
from mprec.files import write_whole

__all__ = ["cached", "default_folder", "map_file", "workers"]

FORMAT = "mprec data"
VERSION = 1
MANIFEST = "manifest.json"
BLOCK = 1 << 20
READ_AT_MOST = 4 << 30  # bytes of a cache whose checksums are looked at; of a larger one blocks spread evenly


def default_folder() -> Path:
    """Where caches are kept: ``mprec/data`` of the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mprec" / "data"


def workers() -> int:
    """Threads that reading may use: this process's CPUs, at most 4, as one thread hands out the text."""
    return min(len(os.sched_getaffinity(0)), 4)


def map_file(file: Path, dtype: Any, shape: tuple[int, ...]) -> np.ndarray:
    """A file's numbers, read when they are used; what is written to the array stays with this process."""
    if 0 in shape:
        return np.zeros(shape, dtype=dtype)
    return np.memmap(file, dtype=dtype, mode="c", shape=shape).view(np.ndarray)


def cached(
    root: Path | None,
    sources: list[Path],
    options: dict[str, Any],
    build: Callable[[Path], dict[str, Any]],
    open_: Callable[[Path, dict[str, Any]], Any],
) -> Any:
    """``open_(folder, meta)`` of the cache of these sources and options (JSON types), where ``build(folder)``
    has written its files and returned ``meta``. Without ``root`` it is made for this process alone.

    ``DataError`` if a source changes while it is read, ``OSError`` as the disk says.
    """
    if root is None:
        with tempfile.TemporaryDirectory(prefix="mprec-") as folder:
            return open_(Path(folder), build(Path(folder)))  # what is mapped stays
    names = [str(source.resolve()) for source in sources]
    key = hashlib.blake2b(json.dumps([names, options]).encode(), digest_size=12).hexdigest()
    folder, made_of = root / key, {"sources": _stamps(sources), "names": names, "options": options}
    if folder.exists():
        problem, meta = _problem(folder, made_of)
        if problem is None:
            return open_(folder, meta)
        warnings.warn(f"the cache {folder} is made anew: {problem}", stacklevel=3)
    root.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=root, prefix=f".{key}."))
    try:
        meta = build(temporary)
        if _stamps(sources) != made_of["sources"]:
            raise DataError(f"{sources[0]} or another file of the log has changed while it was read")
        _finish(temporary, made_of, meta)
        _put(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return open_(folder, meta)


def _stamps(sources: list[Path]) -> list[list[int]]:
    return [[found.st_size, found.st_mtime_ns] for found in (source.stat() for source in sources)]


def _put(temporary: Path, folder: Path) -> None:
    """In one step where no cache is there; else the old one, which others may have mapped, goes first."""
    old = temporary.with_name(temporary.name + ".old")
    with contextlib.suppress(FileNotFoundError):
        os.rename(folder, old)
    try:
        os.rename(temporary, folder)
    except OSError:
        if not folder.exists():
            raise
        # Another process has put its own there meanwhile, of the same sources.
    shutil.rmtree(old, ignore_errors=True)


def _finish(folder: Path, made_of: dict[str, Any], meta: dict[str, Any]) -> None:
    files = {}
    for file in sorted(folder.iterdir()):
        with open(file, "rb") as stream:
            os.fsync(stream.fileno())
        files[file.name] = {"bytes": file.stat().st_size, "blocks": _checksums(file, None)}
    content = {"format": FORMAT, "version": VERSION, **made_of, "meta": meta, "files": files}
    content["checksum"] = _of_text(content)
    text = json.dumps(content).encode()
    write_whole(folder / MANIFEST, lambda stream: stream.write(text))


def _of_text(content: dict[str, Any]) -> str:
    told = {key: value for key, value in content.items() if key != "checksum"}
    return hashlib.blake2b(json.dumps(told).encode(), digest_size=16).hexdigest()


def _checksums(file: Path, numbers: list[int] | None) -> list[str]:
    """Of the blocks with these numbers, or of all."""
    size = file.stat().st_size
    if numbers is None:
        numbers = list(range(-(-size // BLOCK)))
    data = map_file(file, np.uint8, (size,))

    def several(part: list[int]) -> list[str]:
        return [f"{checksum(data[n * BLOCK : (n + 1) * BLOCK]):016x}" for n in part]

    parts = [numbers[start : start + 64] for start in range(0, len(numbers), 64)]
    with ThreadPoolExecutor(workers()) as pool:
        return [each for found in pool.map(several, parts) for each in found]


def _problem(folder: Path, made_of: dict[str, Any]) -> tuple[str | None, dict[str, Any]]:
    """(what is wrong with a cache, or None; its meta)."""
    try:
        content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if content["checksum"] != _of_text(content):
            return "its manifest is damaged", {}
        if (content["format"], content["version"]) != (FORMAT, VERSION):
            return "it is of another version of mprec", {}
        for key, value in made_of.items():
            if content[key] != value:
                return f"its {key} have changed", {}
        files = content["files"]
        every = max(-(-sum(told["bytes"] for told in files.values()) // READ_AT_MOST), 1)
        for name, told in files.items():
            if (found := (folder / name).stat().st_size) != told["bytes"]:
                return f"{name} has {found} bytes, not {told['bytes']}", {}
            numbers = list(range(0, len(told["blocks"]), every))
            if _checksums(folder / name, numbers) != [told["blocks"][n] for n in numbers]:
                return f"{name} is damaged: a checksum does not fit", {}
        return None, content["meta"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"it cannot be read: {type(error).__name__}: {error}", {}
