"""The text of Criteo's format, parsed a block at a time by native code on several threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mprec._native import read_criteo
from mprec.data._cache import workers
from mprec.data._text import BadLines, Fields, line_blocks

__all__ = ["NUM_CATEGORIES", "NUM_INTEGERS", "Chunk", "chunks"]

NUM_INTEGERS = 13
NUM_CATEGORIES = 26
_LABEL = b"0\t"  # of a line that has none


@dataclass(frozen=True)
class Chunk:
    """Consecutive good lines: ``labels`` float32 [n]; ``dense`` float32 [n, 13], ``log(1 + x)`` of the
    integers, 0 where they are missing or negative; ``categories`` int32 [26, n], the bits of 32-bit values, 0
    where missing; ``missing`` int32 [n], whose bit c says that category c is.
    """

    labels: np.ndarray
    dense: np.ndarray
    categories: np.ndarray
    missing: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    @classmethod
    def empty(cls, rows: int) -> Chunk:
        """Room for so many rows."""
        return cls(
            np.empty(rows, np.float32),
            np.empty((rows, NUM_INTEGERS), np.float32),
            np.empty((NUM_CATEGORIES, rows), np.int32),
            np.empty(rows, np.int32),
        )

    def first(self, rows: int) -> Chunk:
        return Chunk(self.labels[:rows], self.dense[:rows], self.categories[:, :rows], self.missing[:rows])


def chunks(
    files: Sequence[Path], bads: Sequence[BadLines], *, chunk_bytes: int = 1 << 24, labelled: bool = True
) -> Iterator[tuple[Chunk, float]]:
    """(good lines of a block of text, share of the bytes of all files that have been read), in order.

    A chunk is to be used before the next one is asked for: its memory is used again. Bad lines go to the
    file's ``bads``. Lines that are not ``labelled`` lack the first field, and get the label 0.
    """
    sizes = [file.stat().st_size for file in files]
    free: list[Chunk] = []

    def parse(text: np.ndarray) -> tuple[Chunk, int, list]:
        lines = int(np.count_nonzero(text == ord("\n")))
        room = free.pop() if free else Chunk.empty(0)
        if len(room) < lines:
            room = Chunk.empty(lines + lines // 8)
        good, _, wrong = read_criteo(text, room.labels, room.dense, room.categories, room.missing)
        return room, good, wrong

    def blocks() -> Iterator[tuple[BadLines, int, np.ndarray, float]]:
        for number, (file, bad) in enumerate(zip(files, bads, strict=True)):
            for first_line, text, position in line_blocks(file, chunk_bytes):
                share = (sum(sizes[:number]) + position) / max(sum(sizes), 1)
                yield bad, first_line, text if labelled else _with_labels(text), share

    threads = workers()
    waiting: deque[tuple[BadLines, int, np.ndarray, float, Future]] = deque()
    with ThreadPoolExecutor(threads) as pool:

        def finish() -> tuple[Chunk, Chunk, float]:
            bad, first_line, text, share, future = waiting.popleft()
            room, good, wrong = future.result()
            _explain(bad, first_line, text, wrong, labelled)
            return room, room.first(good), share

        for block in blocks():
            waiting.append((*block, pool.submit(parse, block[2])))
            if len(waiting) > threads + 1:
                room, chunk, share = finish()
                yield chunk, share
                free.append(room)
        while waiting:
            room, chunk, share = finish()
            yield chunk, share
            free.append(room)


def _with_labels(text: np.ndarray) -> np.ndarray:
    """The lines, each with the label 0 before it."""
    lines = text[:-1].tobytes().replace(b"\n", b"\n" + _LABEL)
    return np.frombuffer(_LABEL + lines + b"\n", dtype=np.uint8)


def _explain(
    bad: BadLines, first_line: int, text: np.ndarray, wrong: list[tuple[int, int, int]], labelled: bool
) -> None:
    """Count bad lines and say of the first ones what is wrong with them."""
    first = int(labelled)  # the first field after the label
    expected = first + NUM_INTEGERS + NUM_CATEGORIES
    for line, begin, end in wrong:
        if bad.is_full:
            bad.count += 1
            continue
        own = text[begin if labelled else begin + len(_LABEL) : end + 1]
        fields = Fields(own, first_line + line, b"\t", expected)
        if not len(fields.lines):
            found = fields.wrong_counts()[1](0)
            commas = int(np.count_nonzero(own == ord(",")))
            if labelled and found.endswith(f" {expected - 1}"):
                found += " (Criteo's test.txt has no labels: labelled=false)"
            elif commas >= expected - 1:
                found += f" ({commas} commas, where tabs are expected)"
            bad.add(first_line + line, found)
            continue
        reasons = [
            (fields.integers(slice(0, first)), 0, "the label must be 0 or 1"),
            (fields.integers(slice(first, first + NUM_INTEGERS)), first, "expected an integer or nothing"),
            (
                fields.hexadecimals(slice(first + NUM_INTEGERS, None)),
                first + NUM_INTEGERS,
                "expected up to 8 hexadecimal digits or nothing",
            ),
        ]
        for (_, _, valid), column, what in reasons:
            rows, reason = fields.wrong_values(valid, column, what)
            if len(rows):
                bad.add(first_line + line, reason(0))
                break
        else:  # an integer, but none that a label can be
            bad.add(
                first_line + line,
                fields.wrong_values(np.zeros((1, 1), dtype=bool), 0, "the label must be 0 or 1")[1](0),
            )
