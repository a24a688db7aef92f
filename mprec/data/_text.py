"""Delimited text read in large blocks: fields located and converted with numpy, bad lines accounted for."""

from __future__ import annotations

import glob
import gzip
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mprec.errors import DataError

__all__ = ["BadLines", "Fields", "find_files", "line_blocks", "open_binary"]

MAX_LINE = 1 << 20
GZIP = b"\x1f\x8b"
BOM = b"\xef\xbb\xbf"


def open_binary(path: Path):
    """A file opened for reading bytes, decompressed if it begins as gzip's do."""
    try:
        file = open(path, "rb")  # noqa: SIM115 - for the caller to close
        if file.peek(2)[:2] != GZIP:
            return file
        unzipped = gzip.GzipFile(fileobj=file)
        unzipped.myfileobj = file  # to be closed with it
        return unzipped
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error


def find_files(path: Path | str | Sequence[Path | str], pattern: str) -> list[Path]:
    """The files that a path, a pattern (``logs/day_*``), a folder (its files of ``pattern``), or several of
    these stand for; numbers in names are in their order. ``DataError`` if there are none.
    """
    if not isinstance(path, str | Path):
        return [file for each in path for file in find_files(each, pattern)]
    here = Path(path)
    if here.is_dir():
        found = [file for file in here.glob(pattern) if file.is_file()]
        if not found:
            raise DataError(f"{here}: no file {pattern} in this folder; name the files, or a pattern of them")
    elif here.exists():
        return [here]
    elif not glob.has_magic(str(path)):
        raise DataError(f"cannot read {path}: No such file or directory")
    else:
        found = [Path(name) for name in glob.glob(str(path)) if Path(name).is_file()]
        if not found:
            raise DataError(f"{path}: no file has a name of this pattern")

    def order(file: Path) -> list:
        return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", str(file))]

    return sorted(found, key=order)


@dataclass
class BadLines:
    """Lines that could not be read: all counted, the first few kept as ``file:line: reason``.

    With ``strict`` the first one raises ``DataError`` instead.
    """

    path: Path
    strict: bool = False
    keep: int = 20
    count: int = 0
    first: list[str] = field(default_factory=list)

    @property
    def is_full(self) -> bool:
        """Has it as many messages as it keeps?"""
        return len(self.first) >= self.keep and not self.strict

    def add(self, line: int, reason: str) -> None:
        message = f"{self.path}:{line}: {reason}"
        if self.strict:
            raise DataError(message)
        self.count += 1
        if len(self.first) < self.keep:
            self.first.append(message)

    def add_block(self, findings: Sequence[tuple[np.ndarray, Callable[[int], str]]]) -> None:
        """A block's findings: vectors of line numbers, each with a function from position to reason.

        A line found more than once counts once, for the first reason. Only reasons that are kept are
        formatted.
        """
        lines = np.concatenate([lines for lines, _ in findings])
        source = np.repeat(np.arange(len(findings)), [len(lines) for lines, _ in findings])
        position = np.concatenate([np.arange(len(lines)) for lines, _ in findings])
        unique, first = np.unique(lines, return_index=True)
        room = 1 if self.strict else max(self.keep - len(self.first), 0)
        for line, index in zip(unique[:room], first[:room], strict=True):
            self.add(int(line), findings[source[index]][1](int(position[index])))
        self.count += max(len(unique) - room, 0)

    def settle(self, good: int, allowed: float) -> None:
        """Say, once per file, how many lines were left out and which came first; beside so many ``good``
        ones ``DataError`` if they are more than the share that is ``allowed``, or any with ``strict``.
        """
        if not self.count:
            return
        shown = "\n  ".join(self.first)
        more = f"\n  and {self.count - len(self.first)} more" if self.count > len(self.first) else ""
        if self.strict:
            raise DataError(self.first[0])
        if self.count > allowed * (self.count + good):
            raise DataError(
                f"{self.path}: {self.count} of {self.count + good} lines are malformed, more than "
                f"{100 * allowed:g} %; leaving them out may bias what is learnt (the option malformed=SHARE "
                f"allows more):\n  {shown}{more}"
            )
        warnings.warn(f"{self.count} malformed line(s) left out:\n  {shown}{more}", stacklevel=4)

    def describe(self) -> dict:
        return {"malformed_lines": self.count, "malformed_first": list(self.first)}


def line_blocks(path: Path, block_bytes: int) -> Iterator[tuple[int, np.ndarray, int]]:
    """(number of the first line, bytes, position in the file as it is on disk) of blocks of whole lines, each
    ended by a newline. A byte order mark is left out.

    Memory is bounded by ``block_bytes`` plus one line, however large the file.
    """
    line, rest = 1, b""
    with open_binary(path) as file:
        raw = getattr(file, "fileobj", file)  # a compressed one has it
        position = 0
        if file.peek(len(BOM)).startswith(BOM):
            file.read(len(BOM))
        while True:
            try:
                block = file.read(block_bytes)
            except (OSError, EOFError) as error:  # a truncated or foreign .gz
                raise DataError(f"cannot read {path} after line {line - 1}: {error}") from error
            if not block:
                break
            cut = block.rfind(b"\n") + 1
            if not cut:
                rest += block
                if len(rest) > max(MAX_LINE, block_bytes):
                    raise DataError(f"{path}:{line}: a line of over {len(rest)} bytes; is this a text file?")
                continue
            whole = np.frombuffer(rest + block[:cut] if rest else memoryview(block)[:cut], dtype=np.uint8)
            rest = block[cut:]
            if raw.seekable():
                position = raw.tell()
            yield line, whole, position
            line += int(np.count_nonzero(whole == ord("\n")))
    if rest:
        yield line, np.frombuffer(rest + b"\n", dtype=np.uint8), position


def _digit_table(digits: bytes) -> np.ndarray:
    table = np.full(256, 255, dtype=np.uint8)
    for text in (digits.lower(), digits.upper()):
        table[list(text)] = np.arange(len(digits))
    return table


_DECIMAL = _digit_table(b"0123456789")
_HEX = _digit_table(b"0123456789abcdef")


class Fields:
    """Where the fields of a block's lines begin and end; only lines with the right number of them are
    ``good``.

    ``starts`` and ``ends`` [lines, fields] are byte positions in ``text``; ``lines`` [lines] are line
    numbers.
    """

    def __init__(self, text: np.ndarray, first_line: int, separator: bytes, fields: int) -> None:
        newlines = np.flatnonzero(text == ord("\n"))
        begins = np.concatenate([[0], newlines[:-1] + 1])
        separators = np.flatnonzero(text == ord(separator))
        found = np.diff(np.searchsorted(separators, np.append(begins, newlines[-1]))) + 1
        good = found == fields
        if not good.all():
            separators = separators[np.repeat(good, found - 1)]
            begins, newlines = begins[good], newlines[good]
        # A carriage return before the newline belongs to neither.
        newlines = newlines - (text[np.maximum(newlines - 1, 0)] == ord("\r"))
        inner = separators.reshape(len(begins), fields - 1)
        self.text = text
        self.lines = first_line + np.flatnonzero(good)
        self.starts = np.column_stack([begins, inner + 1])
        self.ends = np.column_stack([inner, np.maximum(newlines, self.starts[:, -1])])
        self._wrong = first_line + np.flatnonzero(~good), found[~good], fields

    def wrong_counts(self) -> tuple[np.ndarray, Callable[[int], str]]:
        """The lines with another number of fields, as ``BadLines.add_block`` takes them."""
        lines, found, expected = self._wrong
        return lines, lambda i: f"expected {expected} fields, found {found[i]}"

    def wrong_values(
        self, valid: np.ndarray, first_column: int, what: str
    ) -> tuple[np.ndarray, Callable[[int], str]]:
        """The lines where some of ``valid`` [lines, columns] is false, as ``BadLines.add_block`` takes
        them.
        """
        rows = np.flatnonzero(~valid.all(axis=1))

        def reason(i: int) -> str:
            column = first_column + int(np.argmin(valid[rows[i]]))
            start, end = self.starts[rows[i], column], self.ends[rows[i], column]
            text = bytes(self.text[start : min(end, start + 40)]).decode("utf-8", "replace")
            return f"field {column + 1}: {what}, found {text!r}"

        return self.lines[rows], reason

    def integers(self, columns: slice) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Decimal int64 of some columns: (values, missing, valid), each [lines, columns]; missing reads
        as 0.
        """
        starts = self.starts[:, columns].copy()
        negative = self.text[starts] == ord("-")
        starts += negative
        values, valid = self._parse(starts, self.ends[:, columns], _DECIMAL, 10, 18)
        empty = starts == self.ends[:, columns]
        return np.where(negative, -values, values), empty & ~negative, valid & ~(empty & negative)

    def hexadecimals(self, columns: slice) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Up to 8 hexadecimal digits of some columns, as int64: (values, missing, valid)."""
        starts, ends = self.starts[:, columns], self.ends[:, columns]
        values, valid = self._parse(starts, ends, _HEX, 16, 8)
        return values, starts == ends, valid

    def _parse(self, starts, ends, table, base: int, max_digits: int) -> tuple[np.ndarray, np.ndarray]:
        """One digit position of every field at a time."""
        lengths = ends - starts
        valid = lengths <= max_digits
        values = np.zeros(starts.shape, dtype=np.int64)
        last = len(self.text) - 1
        for position in range(min(int(lengths.max(initial=0)), max_digits)):
            inside = lengths > position
            digit = table[self.text[np.minimum(starts + position, last)]]
            values = np.where(inside, values * base + digit, values)
            valid &= ~inside | (digit < base)
        return values, valid
