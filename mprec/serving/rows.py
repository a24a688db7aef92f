"""From rows, as clients send them, to a batch."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import chain
from typing import Any, NoReturn

import numpy as np
import torch

from mprec.bags import Bags
from mprec.data import Batch, RawValues, Vocabulary

__all__ = ["MAX_IDS", "QueryTooLargeError", "rows_to_batch", "values_to_ids"]

MAX_IDS = 1 << 20  # of a query, over all samples and features


class QueryTooLargeError(ValueError):
    """A query has more samples or IDs than one query may."""


def rows_to_batch(
    ids: Sequence[Sequence[Any]] | np.ndarray,
    dense: Sequence[Sequence[float]] | np.ndarray | None,
    vocabularies: Sequence[int],
    num_dense: int,
    *,
    max_ids: int = MAX_IDS,
    may_hold_bools: bool = True,
) -> Batch:
    """A batch of B samples from a row (list, tuple) for each: ``ids[b][t]`` is sample b's ID of feature t,
    below ``vocabularies[t]``, or a list of IDs (a bag, which may be empty); ``dense[b]`` are its
    ``num_dense`` numbers (None where the model takes none). Labels are zeros.

    ``may_hold_bools=False`` saves looking for ``True`` and ``False``, which are no IDs and no numbers here,
    to a caller who knows that there are none.

    ``ValueError`` names the row and the feature of what is wrong: a row of another length, a value that is no
    integer or out of its range, a number that is none or not finite in float32. ``QueryTooLargeError``, which
    is one, for more than ``max_ids`` IDs.
    """
    ids, dense = (rows.tolist() if isinstance(rows, np.ndarray) else rows for rows in (ids, dense))
    if not _are_rows(ids) or not ids:
        raise ValueError("ids: expected at least one row")
    size, width = len(ids), len(vocabularies)
    if not all(map(_are_rows, ids)) or set(map(len, ids)) != {width}:
        wrong = next(b for b, row in enumerate(ids) if not _are_rows(row) or len(row) != width)
        raise ValueError(f"ids[{wrong}]: expected an entry for each of the {width} features")
    bounds = np.array(vocabularies, dtype=np.int64)
    entries = list(chain.from_iterable(ids))
    found = _single_ids(entries, bounds, may_hold_bools) or _bags(entries, bounds, max_ids, may_hold_bools)
    indices, offsets = found
    if len(indices) > max_ids:
        raise _too_many(max_ids)
    numbers = _dense(dense, size, num_dense, may_hold_bools)
    bags = Bags(torch.from_numpy(indices), torch.from_numpy(offsets), num_features=width)
    return Batch(torch.from_numpy(numbers), bags, torch.zeros(size))


def values_to_ids(
    values: Sequence[Sequence[Any]], names: Sequence[str], encoders: Sequence[Vocabulary | RawValues]
) -> list[list[Any]]:
    """Rows of IDs, as :func:`rows_to_batch` takes them, from rows of raw values: numbers, text, or None where
    one is missing, or lists of them. ``ValueError`` names the row and the feature of what is wrong.
    """
    width = len(encoders)
    for b, row in enumerate(values):
        if not _are_rows(row) or len(row) != width:
            raise ValueError(f"values[{b}]: expected an entry for each of the {width} features")
    columns = []
    for t, (name, encoder) in enumerate(zip(names, encoders, strict=True)):
        column: list[Any] = []
        for b, row in enumerate(values):
            is_bag = _are_rows(row[t])
            try:
                ids = encoder.ids_of(row[t] if is_bag else (row[t],)).tolist()
            except ValueError as error:
                raise ValueError(f"values[{b}][{t}], {name}: {error}") from None
            column.append(ids if is_bag else ids[0])
        columns.append(column)
    return [list(row) for row in zip(*columns, strict=True)]


def _are_rows(value: Any) -> bool:
    return type(value) is list or isinstance(value, list | tuple)


def _too_many(max_ids: int) -> QueryTooLargeError:
    return QueryTooLargeError(f"ids: expected at most {max_ids} IDs in all, got more")


def _integers(values: list, may_hold_bools: bool) -> np.ndarray | None:
    """int64 [n] of values that are integers of 64 bits; None if some are not."""
    if may_hold_bools and bool in set(map(type, values)):
        return None
    try:
        return np.array(array("q", values))  # takes integers alone, twice as fast as NumPy does
    except (TypeError, OverflowError):
        return None


def _single_ids(
    entries: list, bounds: np.ndarray, may_hold_bools: bool
) -> tuple[np.ndarray, np.ndarray] | None:
    """One ID for each sample and feature: the common case, checked as a whole. None if it is not that, or if
    something is wrong, which ``_bags`` then finds."""
    values = _integers(entries, may_hold_bools)
    if values is None:
        return None
    table = values.reshape(-1, len(bounds))
    if (table.view(np.uint64) >= bounds.view(np.uint64)).any():  # as unsigned, negative IDs are large
        return None
    return np.ascontiguousarray(table.T).reshape(-1), np.arange(table.size + 1)


def _bags(
    entries: list, bounds: np.ndarray, max_ids: int, may_hold_bools: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Feature-major CSR of the rows' bags, a feature at a time."""
    width = len(bounds)
    columns, lengths = [], np.ones((width, len(entries) // width), dtype=np.int64)
    total = 0
    for t, bound in enumerate(bounds.tolist()):
        column = entries[t::width]
        values = _integers(column, may_hold_bools)
        if values is None:
            bags = [entry if _are_rows(entry) else (entry,) for entry in column]
            lengths[t] = list(map(len, bags))
            values = _integers(list(chain.from_iterable(bags)), may_hold_bools)
        if values is None or (values.view(np.uint64) >= bound).any():
            _raise_for(column, t, bound)
        columns.append(values)
        total += len(values)
        if total > max_ids:
            raise _too_many(max_ids)
    return np.concatenate(columns), np.concatenate([[0], lengths.reshape(-1).cumsum()])


def _raise_for(column: list, feature: int, bound: int) -> NoReturn:
    for b, entry in enumerate(column):
        for value in entry if _are_rows(entry) else (entry,):
            if isinstance(value, bool) or not hasattr(value, "__index__") or not 0 <= value < bound:
                raise ValueError(f"ids[{b}][{feature}]: {value!r:.40} is not an integer in [0, {bound})")
    raise AssertionError("no ID is wrong")


def _dense(rows: Any, size: int, num_dense: int, may_hold_bools: bool) -> np.ndarray:
    if rows is None and num_dense == 0:
        return np.zeros((size, 0), dtype=np.float32)
    if not _are_rows(rows) or len(rows) != size:
        raise ValueError(f"dense: expected a row for each of the {size} rows of ids")
    if not all(map(_are_rows, rows)) or set(map(len, rows)) != {num_dense}:
        wrong = next(b for b, row in enumerate(rows) if not _are_rows(row) or len(row) != num_dense)
        raise ValueError(f"dense[{wrong}]: expected {num_dense} numbers")
    values = list(chain.from_iterable(rows))
    if not (may_hold_bools and bool in set(map(type, values))):
        try:
            with np.errstate(over="ignore"):
                numbers = np.array(array("d", values)).astype(np.float32)
        except (TypeError, OverflowError):
            pass
        else:
            if np.isfinite(numbers).all():
                return numbers.reshape(size, num_dense)
    for i, value in enumerate(values):
        b, column = divmod(i, num_dense)
        if isinstance(value, bool) or not hasattr(value, "__float__"):
            raise ValueError(f"dense[{b}][{column}]: {value!r:.40} is not a number")
        if not _is_finite(value):
            raise ValueError(f"dense[{b}][{column}]: {value!r:.40} is not finite in float32")
    raise AssertionError("no number is wrong")


def _is_finite(value: Any) -> bool:
    with np.errstate(over="ignore"):
        try:
            return bool(np.isfinite(np.float32(value)))
        except OverflowError:
            return False
