"""From raw category values to IDs.

A raw value is first a *key*, an integer: a number itself, 32 bits of hexadecimal digits, or 62 bits of a
hash of text. Of n texts two share a key with a probability of about n² / 2^63. Nothing else of the text is
kept, so a model's file holds no one's words. A missing value's key is -1: that a value is missing says
something, too.

Keys become IDs by a :class:`Vocabulary`, in which frequent values have one each, or, for deep hash
embeddings, which need none, by being them (:class:`RawValues`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["KINDS", "MISSING", "RawValues", "Vocabulary", "dump", "key_of", "restore", "same_ids"]

MISSING = -1
#: Kinds of raw values -> how many keys they can have.
KINDS = {"integer": 1 << 62, "hexadecimal": 1 << 32, "text": 1 << 62}


def key_of(value: Any, kind: str) -> int:
    """The key of a raw value as it comes in JSON or Python: None and the empty string are missing.

    ``ValueError`` for what is none of its kind: no integer in [-2^62, 2^62), not up to 8 hexadecimal digits.
    """
    if value is None or value == "":
        return MISSING
    if kind == "text" and isinstance(value, str):
        digest = hashlib.blake2b(value.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        return int.from_bytes(digest, "little") >> 2
    if kind == "hexadecimal" and isinstance(value, str) and len(value) <= 8:
        # int() would take signs, spaces and underscores, too.
        if all(letter in "0123456789abcdefABCDEF" for letter in value):
            return int(value, 16)
    elif kind == "integer" and hasattr(value, "__index__") and not isinstance(value, bool):
        number = value.__index__()
        if -KINDS[kind] <= number < KINDS[kind]:
            # -1 stands for missing: a number that is it makes room.
            return number if number >= 0 else number - 1
    expected = {"text": "a string", "hexadecimal": "up to 8 hexadecimal digits", "integer": "an integer"}[
        kind
    ]
    raise ValueError(f"expected {expected} or null, got {value!r:.40}")


class _Encoder:
    """What ``Vocabulary`` and ``RawValues`` share: raw values, by way of their keys."""

    kind: str

    def ids_of(self, values: Iterable[Any]) -> np.ndarray:
        """IDs of raw values, int64 [n]. ``ValueError`` as of :func:`key_of`."""
        keys = np.fromiter((key_of(value, self.kind) for value in values), dtype=np.int64)
        return self.encode(keys).astype(np.int64)


@dataclass(frozen=True)
class Vocabulary(_Encoder):
    """IDs ``[0, oov)`` are for values outside the vocabulary; value ``values[i]`` has ID ``oov +
    by_value[i]``.

    IDs grow as frequency falls. With ``oov=1`` all rare and unseen values share ID 0; with more, a value
    is hashed to one of them, so that unseen values differ a little.
    """

    values: np.ndarray  # int64 keys, sorted
    ranks: np.ndarray  # of each value by falling frequency; ties by value
    oov: int = 1
    kind: str = "integer"

    def __len__(self) -> int:
        return self.oov + len(self.values)

    @property
    def size(self) -> int:
        """IDs are below it."""
        return len(self)

    @classmethod
    def fit(cls, column: np.ndarray, **options: Any) -> Vocabulary:
        """The values that occur at least ``min_count`` times, the most frequent ``max_size - oov`` of
        them. Options as of :meth:`from_counts`.
        """
        return cls.from_counts(*np.unique(column, return_counts=True), **options)

    @classmethod
    def from_counts(
        cls,
        values: np.ndarray,
        counts: np.ndarray,
        *,
        min_count: int = 1,
        max_size: int | None = None,
        oov: int = 1,
        kind: str = "integer",
    ) -> Vocabulary:
        """As :meth:`fit`, from distinct values and how often each occurs."""
        check_options(min_count, max_size, oov)
        enough = counts >= min_count
        values, counts = values[enough], counts[enough]
        order = np.lexsort((values, -counts))  # by falling count, then by value
        return cls.in_order(values[order][: None if max_size is None else max_size - oov], oov, kind)

    @classmethod
    def in_order(cls, values: np.ndarray, oov: int, kind: str) -> Vocabulary:
        """The vocabulary in which these values have the IDs ``oov``, ``oov + 1``, and so on."""
        ranks = np.argsort(values, kind="stable")
        return cls(values[ranks], ranks, oov, kind)

    def ordered(self) -> np.ndarray:
        """The values by ID."""
        ordered = np.empty_like(self.values)
        ordered[self.ranks] = self.values
        return ordered

    def encode(self, column: np.ndarray) -> np.ndarray:
        """IDs of the keys, int32 (int64 if the vocabulary needs it)."""
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


@dataclass(frozen=True)
class RawValues(_Encoder):
    """IDs that are the values themselves, for deep hash embeddings: 0 for a missing one, else the key plus 1.

    Rare and new values are told apart as frequent ones are. A negative integer has no ID: ``ValueError``.
    """

    kind: str

    @property
    def size(self) -> int:
        """IDs are below it."""
        return KINDS[self.kind] + 1

    def encode(self, column: np.ndarray) -> np.ndarray:
        """IDs of the keys, int64."""
        if len(column) and column.min() < MISSING:
            raise ValueError(f"raw values: expected at least 0, got {int(column.min()) + 1}")
        return np.asarray(column, dtype=np.int64) + 1


def same_ids(a: Vocabulary | RawValues, b: Vocabulary | RawValues) -> bool:
    """Do both make the same IDs of every value?"""
    if type(a) is not type(b) or a.kind != b.kind:
        return False
    if isinstance(a, RawValues):
        return True
    return a.oov == b.oov and np.array_equal(a.values, b.values) and np.array_equal(a.ranks, b.ranks)


def check_options(min_count: int, max_size: int | None, oov: int) -> None:
    """``ValueError`` unless a vocabulary can be made so."""
    if min_count < 1:
        raise ValueError(f"min_count: expected at least 1, got {min_count}")
    if oov < 1:
        raise ValueError(f"oov: expected at least 1 (an ID for unseen values), got {oov}")
    if max_size is not None and max_size < oov:
        raise ValueError(f"max_size: expected at least {oov} for as many unseen IDs, got {max_size}")


def _hash_values(values: np.ndarray, buckets: int) -> np.ndarray:
    """Multiplicative hash (Knuth) of integers to ``[0, buckets)``: high bits of x * (2^64 / golden ratio)."""
    product = values.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return ((product >> np.uint64(32)) * np.uint64(buckets) >> np.uint64(32)).astype(np.int64)


def dump(encoders: Mapping[str, Vocabulary | RawValues]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """(JSON types, int64 arrays), both by feature: what :func:`restore` makes the encoders of."""
    described, arrays = {}, {}
    for name, encoder in encoders.items():
        described[name] = {"kind": encoder.kind}
        if isinstance(encoder, Vocabulary):
            described[name]["oov"] = encoder.oov
            arrays[name] = np.asarray(encoder.ordered(), dtype=np.int64)
    return described, arrays


def restore(
    described: Mapping[str, Any], arrays: Mapping[str, np.ndarray]
) -> dict[str, Vocabulary | RawValues]:
    """What was dumped. ``KeyError``, ``TypeError`` or ``ValueError`` if it is something else."""
    encoders: dict[str, Vocabulary | RawValues] = {}
    for name, told in described.items():
        if told["kind"] not in KINDS:
            raise ValueError(f"feature {name!r}: unknown kind {told['kind']!r}")
        if "oov" in told:
            encoders[name] = Vocabulary.in_order(np.asarray(arrays[name]), int(told["oov"]), told["kind"])
        else:
            encoders[name] = RawValues(told["kind"])
    return encoders
