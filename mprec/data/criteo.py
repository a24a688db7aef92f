"""Criteo's click log: ``label \\t 13 integers \\t 26 hexadecimal categories``, any of the 39 may be missing.

This is the format of ``train.txt`` of the Kaggle Display Advertising Challenge and of the Terabyte log's
``day_*`` files (also ``.gz``). The data's licence does not allow passing it on: bring your own copy.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mprec.data._text import BadLines, Fields, line_blocks
from mprec.data.dataset import ClickDataset, Column
from mprec.data.vocabulary import Vocabulary
from mprec.errors import DataError

__all__ = ["NUM_CATEGORIES", "NUM_INTEGERS", "Chunk", "chunks", "read"]

NUM_INTEGERS = 13
NUM_CATEGORIES = 26
MISSING = -1  # a category of its own: that a value is missing says something, too
NAMES = tuple(f"C{i}" for i in range(1, NUM_CATEGORIES + 1))


@dataclass(frozen=True)
class Chunk:
    """Consecutive good lines: ``labels`` uint8 [n]; ``integers`` int64 [n, 13], 0 where missing;
    ``categories`` int64 [n, 26], the 32-bit value or -1 where missing; ``lines`` [n], their line
    numbers.
    """

    labels: np.ndarray
    integers: np.ndarray
    categories: np.ndarray
    lines: np.ndarray


def chunks(path: Path | str, bad: BadLines, *, chunk_bytes: int = 1 << 24) -> Iterator[Chunk]:
    """Read a file of any size in bounded memory (about 15 times ``chunk_bytes``); bad lines go to ``bad``."""
    for first_line, text in line_blocks(Path(path), chunk_bytes):
        fields = Fields(text, first_line, b"\t", 1 + NUM_INTEGERS + NUM_CATEGORIES)
        labels, no_label, label_ok = fields.integers(slice(0, 1))
        label_ok &= ~no_label & ((labels == 0) | (labels == 1))
        integers, _, integer_ok = fields.integers(slice(1, 1 + NUM_INTEGERS))
        categories, missing, category_ok = fields.hexadecimals(slice(1 + NUM_INTEGERS, None))
        bad.add_block(
            [
                fields.wrong_counts(),
                fields.wrong_values(label_ok, 0, "the label must be 0 or 1"),
                fields.wrong_values(integer_ok, 1, "expected an integer or nothing"),
                fields.wrong_values(
                    category_ok, 1 + NUM_INTEGERS, "expected up to 8 hexadecimal digits or nothing"
                ),
            ]
        )
        ok = label_ok.all(axis=1) & integer_ok.all(axis=1) & category_ok.all(axis=1)
        yield Chunk(
            labels[ok, 0].astype(np.uint8),
            integers[ok],
            np.where(missing, MISSING, categories)[ok],
            fields.lines[ok],
        )


def read(
    path: Path | str,
    *,
    rows: int | None = None,
    min_count: int = 4,
    max_size: int | None = None,
    oov: int = 1,
    vocabulary_share: float = 0.8,
    vocabularies: Mapping[str, Vocabulary] | None = None,
    strict: bool = False,
    chunk_bytes: int = 1 << 24,
) -> ClickDataset:
    """Read a log (or its first ``rows`` good lines) into memory, 160 bytes a row; earlier lines are
    earlier clicks.

    Integers become ``log(1 + x)`` (missing and negative ones 0). A category value that occurs at least
    ``min_count`` times in the first ``vocabulary_share`` of the rows (the training part of the default
    split, so that nothing is learnt from later rows) has an ID of its own, at most ``max_size`` IDs to a
    feature; see :class:`Vocabulary`. ``vocabularies`` (by feature, ``C1`` ... ``C26``) applies those of
    an earlier log instead.

    Malformed lines are left out, counted and warned about with file and line; ``strict`` raises
    ``DataError`` at the first.
    """
    path = Path(path)
    if rows is not None and rows < 1:
        raise ValueError(f"rows must be at least 1, got {rows}")
    if not 0 < vocabulary_share <= 1:
        raise ValueError(f"vocabulary_share must be in (0, 1], got {vocabulary_share}")
    bad = BadLines(path, strict)
    labels, dense, categories, total = [], [], [], 0
    for chunk in chunks(path, bad, chunk_bytes=chunk_bytes):
        take = slice(None if rows is None else rows - total)
        labels.append(chunk.labels[take])
        dense.append(np.log1p(np.maximum(chunk.integers[take], 0)).astype(np.float32))
        # Half the memory: in 32 bits a missing value (-1) shares the code of the value ffffffff.
        categories.append(chunk.categories[take].astype(np.uint32))
        total += len(labels[-1])
        if total == rows:
            break
    bad.warn()
    if not total:
        raise DataError(f"{path} has no line in Criteo's format ({bad.count} malformed)")
    columns = []
    fit_rows = max(int(total * vocabulary_share), 1)
    for index, name in enumerate(NAMES):
        values = np.concatenate([chunk[:, index] for chunk in categories])
        if vocabularies is not None:
            vocabulary = vocabularies[name]
        else:
            vocabulary = Vocabulary.fit(values[:fit_rows], min_count=min_count, max_size=max_size, oov=oov)
        columns.append(Column(name, len(vocabulary), vocabulary.encode(values)))
    return ClickDataset(
        name="criteo",
        columns=columns,
        labels=np.concatenate(labels),
        dense=np.concatenate(dense),
        info={"source": str(path), **bad.describe()},
    )
