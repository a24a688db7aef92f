"""Click logs in memory, and the batches that models read.

A log is a list of columns, one per categorical feature, with dense numbers, labels and times beside them. A
batch is feature-major CSR (FBGEMM's and TorchRec's layout): the bag of sample ``b`` for feature ``t`` is
``indices[offsets[t * B + b] : offsets[t * B + b + 1]]``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from mprec.errors import DataError

__all__ = ["Batch", "ClickDataset", "Column"]

SPLITS = ("time", "user-time")


@dataclass(frozen=True)
class Batch:
    """B samples: ``dense`` float32 [B, num_dense], ``indices`` int64 [n], ``offsets`` int64 [T*B+1],
    ``labels`` float32 [B]. A pytree of these four.
    """

    dense: torch.Tensor
    indices: torch.Tensor
    offsets: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return self.labels.shape[0]  # len(tensor) costs several times as much

    def to(self, device: torch.device | str) -> Batch:
        return Batch(*(tensor.to(device) for tensor in (self.dense, self.indices, self.offsets, self.labels)))

    def pin_memory(self) -> Batch:
        """In page-locked memory, for DataLoader."""
        tensors = self.dense, self.indices, self.offsets, self.labels
        return Batch(*(tensor.pin_memory() for tensor in tensors))


torch.export.register_dataclass(Batch, serialized_type_name="mprec.data.Batch")


@dataclass(frozen=True)
class Column:
    """IDs of one feature over all rows, each in ``[0, vocabulary)``.

    Without ``offsets`` a row has one ID, ``ids[row]``. With ``offsets`` [rows+1] it has a bag of them,
    ``ids[offsets[row] : offsets[row + 1]]``, possibly empty.
    """

    name: str
    vocabulary: int
    ids: np.ndarray
    offsets: np.ndarray | None = None

    def __post_init__(self) -> None:
        ids = np.ascontiguousarray(self.ids)
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise DataError(
                f"feature {self.name!r}: ids must be a vector of integers, not {ids.dtype} {ids.shape}"
            )
        if len(ids) and (ids.min() < 0 or ids.max() >= self.vocabulary):
            bad = ids.min() if ids.min() < 0 else ids.max()
            raise DataError(f"feature {self.name!r}: ID {bad} is outside [0, {self.vocabulary})")
        object.__setattr__(self, "ids", ids)
        if self.offsets is not None:
            offsets = np.ascontiguousarray(self.offsets, dtype=np.int64)
            if offsets[0] != 0 or offsets[-1] != len(ids) or (np.diff(offsets) < 0).any():
                raise DataError(
                    f"feature {self.name!r}: offsets must rise from 0 to the number of IDs, {len(ids)}"
                )
            object.__setattr__(self, "offsets", offsets)

    def __len__(self) -> int:
        return len(self.ids) if self.offsets is None else len(self.offsets) - 1

    def take(self, rows: np.ndarray) -> Column:
        """The same feature over the given rows, in their order."""
        if self.offsets is None:
            return replace(self, ids=self.ids[rows])
        ids, lengths = self.bags(rows)
        return replace(self, ids=ids, offsets=np.concatenate([[0], np.cumsum(lengths)]))

    def bags(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """IDs of the given rows, bag after bag, and the bags' lengths (only for a column with offsets)."""
        lengths = self.offsets[rows + 1] - self.offsets[rows]
        # Position of every wanted ID: its bag's start in this column, plus its place within the bag.
        skipped = self.offsets[rows] - (np.cumsum(lengths) - lengths)
        return self.ids[np.repeat(skipped, lengths) + np.arange(lengths.sum())], lengths


@dataclass(frozen=True)
class ClickDataset(torch.utils.data.Dataset):
    """A click log: ``columns`` (one per feature), ``dense`` float32 [rows, num_dense], ``labels`` {0, 1}
    [rows].

    ``times`` [rows] orders the rows for ``split`` (row order if None); ``users`` [rows] groups them for
    ``split="user-time"``. ``probabilities`` [rows] is known only for synthetic logs: the click
    probability that each label was drawn with. ``info`` (JSON-able) says where the data came from and
    what was skipped.

    A ``torch.utils.data.Dataset``: a row is a :class:`Batch` of one sample, and a DataLoader with
    ``collate_fn=mprec.data.collate`` asks for all rows of a batch at once.
    """

    name: str
    columns: Sequence[Column]
    labels: np.ndarray
    dense: np.ndarray | None = None
    times: np.ndarray | None = None
    users: np.ndarray | None = None
    probabilities: np.ndarray | None = None
    default_split: str = "time"
    info: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        set_ = object.__setattr__
        rows = len(self.labels)
        set_(self, "columns", tuple(self.columns))
        set_(self, "labels", np.ascontiguousarray(self.labels, dtype=np.float32))
        dense = np.zeros((rows, 0)) if self.dense is None else self.dense
        set_(self, "dense", np.ascontiguousarray(dense, dtype=np.float32))
        for name, values in [
            *((f"feature {column.name!r}", column) for column in self.columns),
            *((name, getattr(self, name)) for name in ("dense", "times", "users", "probabilities")),
        ]:
            if values is not None and len(values) != rows:
                raise DataError(f"{self.name}: {name} has {len(values)} rows, labels have {rows}")
        if not np.isin(self.labels, (0, 1)).all():
            raise DataError(f"{self.name}: labels must be 0 or 1")
        names = [column.name for column in self.columns]
        if len(set(names)) != len(names):
            raise DataError(f"{self.name}: feature names must be unique, got {names}")
        # One ID per row is the common case: those columns side by side make a batch one gather.
        single = [column.ids for column in self.columns if column.offsets is None]
        set_(self, "_single", np.stack(single) if single else np.zeros((0, rows), dtype=np.int32))
        # ... and the columns become views of that, so that nothing is held twice.
        views = iter(self._single)
        set_(
            self,
            "columns",
            tuple(replace(c, ids=next(views)) if c.offsets is None else c for c in self.columns),
        )

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def features(self) -> list[tuple[str, int]]:
        """(name, vocabulary size) of every categorical feature, in batch order."""
        return [(column.name, column.vocabulary) for column in self.columns]

    @property
    def num_dense(self) -> int:
        return self.dense.shape[1]

    def column(self, name: str) -> Column:
        for column in self.columns:
            if column.name == name:
                return column
        raise KeyError(f"no feature {name!r} in {self.name}; it has {[c.name for c in self.columns]}")

    def counts(self, name: str) -> np.ndarray:
        """How often each ID of a feature occurs: int64 [vocabulary]."""
        column = self.column(name)
        return np.bincount(column.ids, minlength=column.vocabulary)

    def batch(self, rows: slice | np.ndarray | Sequence[int]) -> Batch:
        """The samples of the given rows (a slice, or row numbers in any order, repeats allowed)."""
        if not isinstance(rows, slice):
            rows = np.asarray(rows)
            rows = rows.astype(np.int64) if rows.size == 0 else rows
            if rows.dtype.kind not in "iu" or rows.ndim != 1:
                raise TypeError(
                    f"rows must be a slice or a vector of integers, not {rows.dtype} {rows.shape}"
                )
        labels = self.labels[rows]
        size = len(labels)
        single = self._single[:, rows]
        if len(single) == len(self.columns):
            indices, lengths = single.reshape(-1), None
        else:
            indices, lengths = self._gather_bags(single, rows, size)
        if lengths is None:
            offsets = np.arange(len(indices) + 1)
        else:
            offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
            np.cumsum(lengths, out=offsets[1:])
        return Batch(
            dense=torch.from_numpy(np.ascontiguousarray(self.dense[rows])),
            indices=torch.from_numpy(indices.astype(np.int64)),
            offsets=torch.from_numpy(offsets),
            labels=torch.from_numpy(np.ascontiguousarray(labels)),
        )

    def _gather_bags(self, single: np.ndarray, rows, size: int) -> tuple[np.ndarray, np.ndarray]:
        numbers = np.arange(len(self))[rows]
        ids, lengths = [], []
        views = iter(single)
        for column in self.columns:
            if column.offsets is None:
                ids.append(next(views))
                lengths.append(np.ones(size, dtype=np.int64))
            else:
                bag_ids, bag_lengths = column.bags(numbers)
                ids.append(bag_ids)
                lengths.append(bag_lengths)
        return np.concatenate(ids), np.concatenate(lengths)

    def __getitem__(self, row: int) -> Batch:
        size = len(self)
        if not -size <= row < size:
            raise IndexError(f"row {row} of {size}")
        return self.batch([row % size])

    def __getitems__(self, rows: Sequence[int]) -> Batch:
        """For DataLoader: :meth:`batch`."""
        return self.batch(rows)

    def batches(self, batch_size: int, *, seed: int | None = None) -> Iterator[Batch]:
        """All rows once, ``batch_size`` at a time (the last may be smaller); shuffled if ``seed`` is
        given.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        order = None if seed is None else np.random.default_rng(seed).permutation(len(self))
        for start in range(0, len(self), batch_size):
            rows = slice(start, start + batch_size)
            yield self.batch(rows if order is None else order[rows])

    def take(self, rows: slice | np.ndarray) -> ClickDataset:
        """A dataset of the given rows, in their order."""
        numbers = np.arange(len(self))[rows]

        def pick(values):
            return None if values is None else values[numbers]

        return replace(
            self,
            columns=[column.take(numbers) for column in self.columns],
            labels=self.labels[numbers],
            dense=self.dense[numbers],
            times=pick(self.times),
            users=pick(self.users),
            probabilities=pick(self.probabilities),
        )

    def split(
        self, fractions: Sequence[float] = (0.8, 0.1, 0.1), by: str | None = None
    ) -> tuple[ClickDataset, ...]:
        """Cut into parts, earlier rows first, e.g. (train, valid, test); never a random split.

        ``by="time"`` cuts the whole log at points in time, as a deployed model meets it; users who joined
        late are then unknown to training. ``by="user-time"`` cuts each user's own history, so every user
        with a few rows is in every part: the one to use for logs such as MovieLens, where most users rate
        everything in one sitting and a cut in time leaves mostly cold users. The default is the dataset's
        ``default_split``. Rows of equal time keep their order in the log.
        """
        by = self.default_split if by is None else by
        if by not in SPLITS:
            raise ValueError(f"by must be one of {', '.join(SPLITS)}, got {by!r}")
        if any(f < 0 for f in fractions) or abs(sum(fractions) - 1) > 1e-6:
            raise ValueError(f"fractions must not be negative and must add up to 1, got {tuple(fractions)}")
        if by == "user-time" and self.users is None:
            raise ValueError(f"{self.name} names no users: split it by time")
        order = np.arange(len(self)) if self.times is None else np.argsort(self.times, kind="stable")
        edges = np.cumsum(fractions)[:-1]
        if by == "time":
            position = (np.arange(len(order)) + 0.5) / max(len(order), 1)
        else:
            position = _position_within(self.users[order])
        part = np.searchsorted(edges, position, side="right")
        return tuple(self.take(order[part == index]) for index in range(len(fractions)))

    def describe(self) -> dict[str, Any]:
        """What a checkpoint should remember about its data (JSON-able)."""
        return {
            "name": self.name,
            "rows": len(self),
            "num_dense": self.num_dense,
            "features": [list(feature) for feature in self.features],
            "positive_share": float(self.labels.mean()) if len(self) else None,
            **self.info,
        }


def _position_within(groups: np.ndarray) -> np.ndarray:
    """For each row, where it stands among its group's rows, in (0, 1): (rank + 1/2) / size of the group."""
    if not len(groups):
        return np.zeros(0)
    by_group = np.argsort(groups, kind="stable")
    _, starts, sizes = np.unique(groups[by_group], return_index=True, return_counts=True)
    rank = np.arange(len(groups)) - np.repeat(starts, sizes)
    position = np.empty(len(groups))
    position[by_group] = (rank + 0.5) / np.repeat(sizes, sizes)
    return position
