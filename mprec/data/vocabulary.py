"""From raw category values to IDs: frequent values get one each, the rest share out-of-vocabulary IDs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

__all__ = ["Vocabulary"]


@dataclass(frozen=True)
class Vocabulary:
    """IDs ``[0, oov)`` are for values outside the vocabulary; value ``values[i]`` has ID ``oov +
    by_value[i]``.

    IDs grow as frequency falls. With ``oov=1`` all rare and unseen values share ID 0; with more, a value
    is hashed to one of them, so that unseen values differ a little.
    """

    values: np.ndarray  # sorted
    ranks: np.ndarray  # of each value by falling frequency; ties by value
    oov: int = 1

    def __len__(self) -> int:
        return self.oov + len(self.values)

    @classmethod
    def fit(
        cls, column: np.ndarray, *, min_count: int = 1, max_size: int | None = None, oov: int = 1
    ) -> Vocabulary:
        """The values that occur at least ``min_count`` times, the most frequent ``max_size - oov`` of
        them.
        """
        if min_count < 1:
            raise ValueError(f"min_count must be at least 1, got {min_count}")
        if oov < 1:
            raise ValueError(f"oov must be at least 1 (an ID for unseen values), got {oov}")
        if max_size is not None and max_size < oov:
            raise ValueError(
                f"max_size must leave room for the {oov} out-of-vocabulary ID(s), got {max_size}"
            )
        values, counts = np.unique(column, return_counts=True)
        order = np.argsort(-counts, kind="stable")
        order = order[: np.count_nonzero(counts >= min_count)]
        if max_size is not None:
            order = order[: max_size - oov]
        by_value = np.sort(order)
        ranks = np.empty(len(order), dtype=np.int64)
        ranks[np.searchsorted(by_value, order)] = np.arange(len(order))
        return cls(values[by_value], ranks, oov)

    def encode(self, column: np.ndarray) -> np.ndarray:
        """IDs of the values, int32 (int64 if the vocabulary needs it)."""
        dtype = np.int32 if len(self) <= np.iinfo(np.int32).max else np.int64
        if not len(self.values):
            known = np.zeros(len(column), dtype=bool)
            place = np.zeros(len(column), dtype=np.int64)
        else:
            place = np.minimum(np.searchsorted(self.values, column), len(self.values) - 1)
            known = self.values[place] == column
        ids = np.empty(len(column), dtype=dtype)
        ids[known] = self.oov + self.ranks[place[known]]
        ids[~known] = _hash_values(column[~known], self.oov) if self.oov > 1 else 0
        return ids


def _hash_values(values: np.ndarray, buckets: int) -> np.ndarray:
    """Multiplicative hash (Knuth) of integers to ``[0, buckets)``: high bits of x * (2^64 / golden ratio)."""
    product = values.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return ((product >> np.uint64(32)) * np.uint64(buckets) >> np.uint64(32)).astype(np.int64)
