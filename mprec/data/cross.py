"""Crosses of features: columns whose IDs are pairs of two other columns' IDs.

A model whose features meet in products alone cannot give a pair of IDs an effect of its own; a crossed column
has a vector for each. A pair (a, b) is number ``a |B| + b`` of ``|A| |B|``. Where that is more than ``size``,
its ID is a hash of the number below ``size`` instead, and pairs may share one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from mprec.data.dataset import ClickDataset, Column
from mprec.data.vocabulary import RawValues
from mprec.errors import DataError

__all__ = ["SIZE", "cross"]

SIZE = 1 << 20


def cross(dataset: ClickDataset, pairs: Sequence[str], size: int = SIZE) -> ClickDataset:
    """The dataset with a column more for each of ``pairs``: of ``user:genres`` it is ``user_x_genres``.

    One of the two may be a column of bags; the cross is then one of bags, of a pair for each of its IDs.
    ``size``: the most IDs of a crossed column. ``info["crosses"]`` says what was done.

    ``DataError`` for what is no pair of two features of the dataset, a pair that is there twice, two columns
    of bags, and a feature whose raw values are its IDs.
    """
    if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size < 1 << 31:
        raise DataError(f"cross_size: expected an integer from 1 to 2^31 - 1, got {size!r}")
    columns = [*dataset.columns, *(_crossed(dataset, pair, size) for pair in pairs)]
    info: dict[str, Any] = {**dataset.info, "crosses": {"pairs": list(pairs), "size": size}}
    return dataclasses.replace(dataset, columns=columns, matrix=None, info=info)


def _crossed(dataset: ClickDataset, pair: str, size: int) -> Column:
    names = pair.split(":")
    if len(names) != 2 or names[0] == names[1]:
        raise DataError(f"cross: expected two features joined by a colon, got {pair!r}")
    try:
        first, second = map(dataset.column, names)
    except KeyError as error:
        raise DataError(f"cross {pair!r}: {error.args[0]}") from None
    if raw := [name for name in names if isinstance(dataset.vocabularies.get(name), RawValues)]:
        raise DataError(f"cross {pair!r}: the raw values of {raw[0]!r} are its IDs: give it a vocabulary")
    if first.offsets is not None and second.offsets is not None:
        raise DataError(f"cross {pair!r}: at most one of the two may have several IDs a row")
    bags = first if first.offsets is not None else second
    if bags.offsets is None:
        a, b = first.ids, second.ids
    else:
        lengths = np.diff(bags.offsets)
        a, b = (c.ids if c is bags else np.repeat(c.ids, lengths) for c in (first, second))
    count = first.vocabulary * second.vocabulary
    ids = a.astype(np.int64) * second.vocabulary + b
    if count > size:
        ids, count = (_mixed(ids.view(np.uint64)) % np.uint64(size)).astype(np.int64), size
    return Column("_x_".join(names), count, ids.astype(np.int32), bags.offsets)


def _mixed(numbers: np.ndarray) -> np.ndarray:
    """SplitMix64's output function (Steele, Lea and Flood, OOPSLA 2014): every bit depends on every bit."""
    with np.errstate(over="ignore"):
        numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))
