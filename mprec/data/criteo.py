"""Criteo's click log: ``label \\t 13 integers \\t 26 hexadecimal categories``, any of the 39 may be missing.

This is the format of ``train.txt`` of the Kaggle Display Advertising Challenge and of the Terabyte log's
``day_*`` files (also compressed by gzip). The data's licence does not allow passing it on: bring your own.

Text is read by native code on several threads, a block at a time, into a file for each column; then the
values of a column become codes and IDs, a column at a time. So memory is bounded by the number of different
values, whatever the number of rows. The result is mapped from a cache (:mod:`mprec.data._cache`), which takes
160 bytes a row and which the next run finds.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mprec._native import encode_values
from mprec.data._cache import cached, default_folder, map_file, workers
from mprec.data._criteo_text import NUM_CATEGORIES, NUM_INTEGERS, Chunk, chunks
from mprec.data._text import BadLines, find_files
from mprec.data.dataset import ClickDataset, Column
from mprec.data.vocabulary import RawValues, Vocabulary, check_options, dump, restore
from mprec.errors import DataError
from mprec.files import check_room

__all__ = ["NUM_CATEGORIES", "NUM_INTEGERS", "Chunk", "chunks", "read"]

NAMES = tuple(f"C{i}" for i in range(1, NUM_CATEGORIES + 1))
CACHED_FROM = 16 << 20  # bytes of text: less is parsed as fast as it is found
ROWS_AT_ONCE = 1 << 16


def read(
    path: Path | str | Sequence[Path | str],
    *,
    rows: int | None = None,
    min_count: int = 4,
    max_size: int | None = None,
    oov: int = 1,
    vocabulary_share: float = 0.8,
    raw: bool | int | Sequence[int] = False,
    vocabularies: Mapping[str, Vocabulary | RawValues] | None = None,
    malformed: float = 0.01,
    strict: bool = False,
    labelled: bool = True,
    cache: bool | Path | str | None = None,
    progress: Callable[[str, float], object] | None = None,
    chunk_bytes: int = 1 << 24,
) -> ClickDataset:
    """Read a log (or its first ``rows`` good lines), 160 bytes a row; earlier lines are earlier clicks.

    Args:
        path: a file, a pattern such as ``logs/day_*``, a folder with files ``day_*``, or several of these;
            ``day_10`` comes after ``day_9``.
        min_count, max_size, oov, vocabulary_share: a category value that occurs at least ``min_count`` times
            in the first ``vocabulary_share`` of the rows (the training part of the default split, so that
            nothing is learnt from later rows) has an ID of its own, at most ``max_size`` IDs to a feature;
            see :class:`Vocabulary`. That a value is missing is a value, too; ``ffffffff`` is another one.
        raw: the numbers of categories, from 1 (True: all), whose IDs are the values themselves, for deep hash
            embeddings: no vocabulary, rare and new values are told apart.
        vocabularies: by feature, ``C1`` to ``C26``: those of an earlier log, which a checkpoint holds.
        malformed: largest share of malformed lines. They are left out, counted and warned about with file and
            line; ``strict`` allows none.
        labelled: False for lines without labels, as Criteo's ``test.txt`` has them, which are to be scored:
            all labels of the dataset are 0, and it cannot be split.
        cache: a folder to keep the parsed log in, True for the user's own, False to keep none; default: the
            user's own for more than 16 MiB of text. It is used by the next call with the same files and
            options.
        progress: told what is being done, and which share of it is done.

    Raises:
        DataError: a malformed line that is not allowed, or no good one; a file that cannot be read.
        OSError: the disk has no room for the cache.
        ValueError: an option is out of its bounds.
    """
    files = find_files(path, "day_*")
    if rows is not None and rows < 1:
        raise ValueError(f"rows: expected at least 1, got {rows}")
    if not 0 < vocabulary_share <= 1:
        raise ValueError(f"vocabulary_share: expected in (0, 1], got {vocabulary_share}")
    if not 0 <= malformed <= 1:
        raise ValueError(f"malformed: expected in [0, 1], got {malformed}")
    check_options(min_count, max_size, oov)
    if vocabularies is not None and (lacking := [name for name in NAMES if name not in vocabularies]):
        raise ValueError(f"vocabularies: there is none of {lacking[0]!r}")
    chosen = _Encoding(min_count, max_size, oov, vocabulary_share, _raw_names(raw), vocabularies)
    progress = progress or (lambda what, share: None)

    def build(folder: Path) -> dict[str, Any]:
        return _Builder(folder, files, rows, chosen, strict, labelled, progress, chunk_bytes).build()

    def open_(folder: Path, meta: dict[str, Any]) -> ClickDataset:
        return _open(folder, meta, files, malformed, strict, labelled)

    root = None
    regular = all(file.is_file() for file in files)  # a pipe cannot be looked at twice
    size = sum(file.stat().st_size for file in files)
    if regular and (cache or (cache is None and size > CACHED_FROM)):
        root = default_folder() if cache in (None, True) else Path(cache)
    options = {"reader": "criteo", "rows": rows, "labelled": labelled, **chosen.described()}
    return cached(root, files, options, build, open_)


def _raw_names(raw: bool | int | Sequence[int]) -> tuple[str, ...]:
    if isinstance(raw, bool):
        return NAMES if raw else ()
    numbers = [raw] if isinstance(raw, int) else list(raw)
    for number in numbers:
        if not 1 <= number <= NUM_CATEGORIES:
            raise ValueError(f"raw: expected categories from 1 to {NUM_CATEGORIES}, got {number}")
    return tuple(NAMES[number - 1] for number in sorted(set(numbers)))


@dataclass(frozen=True)
class _Encoding:
    """How values become IDs."""

    min_count: int
    max_size: int | None
    oov: int
    share: float
    raw: tuple[str, ...]
    known: Mapping[str, Vocabulary | RawValues] | None

    def described(self) -> dict[str, Any]:
        """JSON types that are equal only for equal encodings."""
        own = {"min_count": self.min_count, "max_size": self.max_size, "oov": self.oov, "share": self.share}
        if self.known is None:
            return {**own, "raw": list(self.raw)}
        told, arrays = dump({name: self.known[name] for name in NAMES})
        digest = hashlib.blake2b(json.dumps(told).encode(), digest_size=16)
        for array in arrays.values():
            digest.update(array.tobytes())
        return {"known": digest.hexdigest()}

    def encoder(self, name: str, values: np.ndarray, counts: np.ndarray) -> Vocabulary | RawValues:
        """That of a feature with these keys, which occur so often in the rows that may be learnt from."""
        if self.known is not None:
            return self.known[name]
        if name in self.raw:
            return RawValues("hexadecimal")
        return Vocabulary.from_counts(
            values,
            counts,
            min_count=self.min_count,
            max_size=self.max_size,
            oov=self.oov,
            kind="hexadecimal",
        )


@dataclass(frozen=True)
class _Builder:
    """Makes the files of a cache: ``labels``, ``dense``, ``ids`` and ``vocabularies``."""

    folder: Path
    files: Sequence[Path]
    rows: int | None
    encoding: _Encoding
    strict: bool
    labelled: bool
    progress: Callable[[str, float], object]
    chunk_bytes: int

    def build(self) -> dict[str, Any]:
        bads = [BadLines(file, self.strict) for file in self.files]
        total = self._parse(bads)
        meta = {
            "rows": total,
            "malformed_lines": sum(bad.count for bad in bads),
            "malformed_first": [line for bad in bads for line in bad.first],
        }
        if not total:
            raise DataError(
                f"{', '.join(map(str, self.files))} has no line in Criteo's format "
                f"({meta['malformed_lines']} malformed)"
                + "".join(f"\n  {m}" for m in meta["malformed_first"])
            )
        encoders, mappings = self._encode(total)
        self._assemble(total, mappings)
        for name in (*NAMES, "missing"):
            (self.folder / name).unlink()
        described, arrays = dump(encoders)
        with open(self.folder / "vocabularies", "wb") as stream:
            for array in arrays.values():
                stream.write(array)
        lengths = {name: len(array) for name, array in arrays.items()}
        dtype = str(next(iter(mappings)).dtype)
        return {**meta, "encoders": described, "lengths": lengths, "dtype": dtype}

    def _parse(self, bads: Sequence[BadLines]) -> int:
        """Text to files of columns; the number of rows."""
        plain = sum(file.stat().st_size for file in self.files if not _is_gzip(file))
        if self.rows is None:
            check_room(self.folder / "ids", plain * 9 // 8)  # columns and the result, of lines of 240 bytes
        total = 0
        with contextlib.ExitStack() as stack:
            labels, dense, missing, *columns = (
                stack.enter_context(open(self.folder / name, "wb"))
                for name in ("labels", "dense", "missing", *NAMES)
            )
            parsed = chunks(self.files, bads, chunk_bytes=self.chunk_bytes, labelled=self.labelled)
            for chunk, share in parsed:
                if self.rows is not None:
                    chunk = chunk.first(min(len(chunk), self.rows - total))
                for stream, values in (
                    (labels, chunk.labels),
                    (dense, chunk.dense),
                    (missing, chunk.missing),
                ):
                    stream.write(np.ascontiguousarray(values))
                for stream, values in zip(columns, chunk.categories, strict=True):
                    stream.write(values)
                total += len(chunk)
                self.progress("reading the log", share if self.rows is None else total / self.rows)
                if total == self.rows:
                    parsed.close()
                    break
        return total

    def _encode(self, total: int) -> tuple[dict[str, Vocabulary | RawValues], list[np.ndarray]]:
        """Values in files of columns become codes; (encoders, the ID of each code by feature)."""
        if total >= 1 << 31:
            raise DataError(f"{total} rows are too many for one log: at most {(1 << 31) - 1}")
        missing = map_file(self.folder / "missing", np.int32, (total,))
        counted = max(int(total * self.encoding.share), 1)
        done = itertools.count(1)

        def one(position: int) -> tuple[Vocabulary | RawValues, np.ndarray]:
            name = NAMES[position]
            column = np.memmap(self.folder / name, dtype=np.int32, mode="r+", shape=(total,))
            found: list[bytes] = []
            encode_values(column.view(np.ndarray), missing, position, counted, found)
            values, counts = (np.frombuffer(each, dtype=np.int64) for each in found)
            encoder = self.encoding.encoder(name, values, counts)
            self.progress("making vocabularies", next(done) / len(NAMES))
            return encoder, encoder.encode(values)

        with ThreadPoolExecutor(workers()) as pool:
            found = list(pool.map(one, range(len(NAMES))))
        dtype = np.result_type(*(ids.dtype for _, ids in found))
        encoders = {name: encoder for name, (encoder, _) in zip(NAMES, found, strict=True)}
        return encoders, [ids.astype(dtype, copy=False) for _, ids in found]

    def _assemble(self, total: int, mappings: Sequence[np.ndarray]) -> None:
        """Codes in files of columns become rows of IDs in one file."""
        dtype = mappings[0].dtype
        descriptor = os.open(self.folder / "ids", os.O_CREAT | os.O_WRONLY, 0o666)
        done = itertools.count(1)
        starts = range(0, total, ROWS_AT_ONCE)

        def some(start: int) -> None:
            rows = min(ROWS_AT_ONCE, total - start)
            block = np.empty((rows, len(NAMES)), dtype=dtype)
            for position, (name, mapping) in enumerate(zip(NAMES, mappings, strict=True)):
                codes = np.fromfile(self.folder / name, dtype=np.int32, count=rows, offset=4 * start)
                block[:, position] = mapping[codes]
            left = memoryview(block).cast("B")
            offset = start * len(NAMES) * dtype.itemsize
            while left:
                written = os.pwrite(descriptor, left, offset)
                left, offset = left[written:], offset + written
            self.progress("writing IDs", next(done) / len(starts))

        try:
            with ThreadPoolExecutor(workers()) as pool:
                for _ in pool.map(some, starts):
                    pass
        finally:
            os.close(descriptor)


def _is_gzip(file: Path) -> bool:
    if not file.is_file():
        return True  # a pipe: as little is known of its size
    with open(file, "rb") as stream:
        return stream.read(2) == b"\x1f\x8b"


def _open(
    folder: Path, meta: dict[str, Any], files: Sequence[Path], malformed: float, strict: bool, labelled: bool
) -> ClickDataset:
    """The dataset of a cache. ``DataError`` if more of its lines were malformed than are allowed now."""
    total, source = meta["rows"], ", ".join(map(str, files))
    bad = BadLines(files[0], strict, count=meta["malformed_lines"], first=list(meta["malformed_first"]))
    bad.settle(total, malformed)
    flat = map_file(folder / "vocabularies", np.int64, (sum(meta["lengths"].values()),))
    arrays, start = {}, 0
    for name, length in meta["lengths"].items():
        arrays[name] = flat[start : start + length]
        start += length
    encoders = restore(meta["encoders"], arrays)
    matrix = map_file(folder / "ids", meta["dtype"], (total, len(NAMES)))
    return ClickDataset(
        name="criteo",
        columns=[
            Column.of_checked(name, encoders[name].size, matrix[:, position], None)
            for position, name in enumerate(NAMES)
        ],
        labels=map_file(folder / "labels", np.float32, (total,)),
        dense=map_file(folder / "dense", np.float32, (total, NUM_INTEGERS)),
        info={"source": source, **bad.describe()},
        vocabularies=encoders,
        labelled=labelled,
        matrix=matrix,
    )
