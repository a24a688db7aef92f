"""From rows, as clients send them, to a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from mprec.data import Batch

__all__ = ["MAX_IDS", "rows_to_batch"]

_LARGEST = float(np.finfo(np.float32).max)
MAX_IDS = 1 << 20  # of a query, over all samples and features


def rows_to_batch(
    ids: Sequence[Sequence[Any]],
    dense: Sequence[Sequence[float]] | None,
    vocabularies: Sequence[int],
    num_dense: int,
    *,
    max_ids: int = MAX_IDS,
) -> Batch:
    """A batch of B samples from a row for each: ``ids[b][t]`` is sample b's ID of feature t, below
    ``vocabularies[t]``, or a list of IDs (a bag, which may be empty); ``dense[b]`` are its ``num_dense``
    numbers (None where the model takes none). Labels are zeros.

    ``ValueError`` names the row and the feature of what is wrong: a row of another length, a value that is no
    integer or out of its range, a number that is none or not finite, more than ``max_ids`` IDs.
    """
    if not isinstance(ids, Sequence) or isinstance(ids, str) or not len(ids):
        raise ValueError("ids: expected at least one row")
    indices, offsets = _single_ids(ids, vocabularies, max_ids) or _bags(ids, vocabularies, max_ids)
    size = len(ids)
    return Batch(_dense(dense, size, num_dense), indices, offsets, torch.zeros(size))


def _single_ids(ids, vocabularies, max_ids: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    """One ID for each sample and feature: the common case, checked as a whole. None if it is not that, or if
    something is wrong, which ``_bags`` then finds."""
    try:
        table = np.array(ids)
    except (ValueError, OverflowError, TypeError):  # ragged, or beyond 64 bits
        return None
    shape = (len(ids), len(vocabularies))
    if table.dtype != np.int64 or table.shape != shape or table.size > max_ids:
        return None
    # NumPy takes True for 1: rows with truth values are looked at one by one.
    if (table < 0).any() or (table >= vocabularies).any() or _has_bool(ids):
        return None
    return torch.from_numpy(np.ascontiguousarray(table.T).reshape(-1)), torch.arange(table.size + 1)


def _has_bool(ids) -> bool:
    return any(True in row and any(value is True for value in row) for row in ids) or any(
        False in row and any(value is False for value in row) for row in ids
    )


def _bags(ids, vocabularies, max_ids: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Feature-major CSR of the rows' bags."""
    for b, row in enumerate(ids):
        if not isinstance(row, Sequence) or isinstance(row, str) or len(row) != len(vocabularies):
            raise ValueError(f"ids[{b}] must have an entry for each of the {len(vocabularies)} features")
    indices, lengths = [], [0]
    for t, vocabulary in enumerate(vocabularies):
        for b, row in enumerate(ids):
            bag = row[t] if isinstance(row[t], list | tuple) else (row[t],)
            for value in bag:
                if type(value) is not int or not 0 <= value < vocabulary:
                    raise ValueError(f"ids[{b}][{t}]: {value!r:.40} is not an integer in [0, {vocabulary})")
            indices += bag
            lengths.append(len(bag))
            if len(indices) > max_ids:
                raise ValueError(f"ids: expected at most {max_ids} IDs in all, got more")
    return torch.tensor(indices, dtype=torch.int64), torch.tensor(lengths).cumsum(0)


def _dense(rows, size: int, num_dense: int) -> torch.Tensor:
    if rows is None and num_dense == 0:
        return torch.zeros(size, 0)
    if not isinstance(rows, Sequence) or isinstance(rows, str) or len(rows) != size:
        raise ValueError(f"dense must have a row for each of the {size} rows of ids")
    try:
        numbers = np.array(rows)
    except (ValueError, OverflowError, TypeError):
        numbers = np.zeros(0)
    if numbers.shape == (size, num_dense) and numbers.dtype.kind in "if" and not _has_bool(rows):
        numbers = numbers.astype(np.float32)
        if np.isfinite(numbers).all():
            return torch.from_numpy(numbers)
    for b, row in enumerate(rows):
        if not isinstance(row, Sequence) or isinstance(row, str) or len(row) != num_dense:
            raise ValueError(f"dense[{b}] must be {num_dense} numbers")
        for i, value in enumerate(row):
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ValueError(f"dense[{b}][{i}]: {value!r:.40} is not a number")
            if not -_LARGEST <= value <= _LARGEST:
                raise ValueError(f"dense[{b}][{i}]: {value!r:.40} is not finite in float32")
    return torch.tensor([[float(value) for value in row] for row in rows], dtype=torch.float32).view(
        size, num_dense
    )
