"""Click logs in memory or in mapped files, and the batches that models read.

A log is a list of columns, one per categorical feature, with dense numbers, labels and times beside them. The
bags of a batch (:class:`mprec.bags.Bags`) are in FBGEMM's and TorchRec's order, feature after feature.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree

from mprec.bags import Bags
from mprec.data.vocabulary import RawValues, Vocabulary
from mprec.errors import DataError

__all__ = ["Batch", "ClickDataset", "Column"]

SPLITS = ("time", "user-time")


@dataclass(eq=False)  # not frozen: Lightning sets the fields of a copy
class Batch:
    """B samples: ``dense`` float32 ``[B, num_dense]``, ``bags`` of all T features (``indices`` int64 ``[n]``,
    ``offsets`` int64 ``[T * B + 1]``), ``labels`` float32 ``[B]``. A pytree of these tensors.

    Models pool the bags in each feature's own mode. Making one checks nothing.
    """

    dense: torch.Tensor
    bags: Bags
    labels: torch.Tensor

    indices = property(attrgetter("bags.indices"), doc="Those of ``bags``.")
    offsets = property(attrgetter("bags.offsets"), doc="Those of ``bags``.")

    def __len__(self) -> int:
        return self.labels.shape[0]  # len(tensor) costs several times as much

    def moved(self, move: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        """The same samples in what ``move`` makes of each tensor."""
        return Batch(move(self.dense), self.bags.moved(move), move(self.labels))

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        return self.moved(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """In page-locked memory, for DataLoader."""
        return self.moved(torch.Tensor.pin_memory)

    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors by name."""
        found = {
            "dense": self.dense,
            "indices": self.bags.indices,
            "offsets": self.bags.offsets,
            "labels": self.labels,
        }
        if self.bags.per_sample_weights is not None:
            found["per_sample_weights"] = self.bags.per_sample_weights
        return found


def _with_names(batch: Batch) -> tuple[list[tuple[Any, torch.Tensor]], list]:
    """A pytree's leaves and what is no tensor, which exported programs write down as JSON."""
    found = batch.tensors()
    _, _, mode, _, features, *others = batch.bags
    leaves = [(pytree.GetAttrKey(name), tensor) for name, tensor in found.items()]
    return leaves, [list(found), mode, None if features is None else list(features), *others]


def _without_names(batch: Batch) -> tuple[list[torch.Tensor], list]:
    leaves, context = _with_names(batch)
    return [tensor for _, tensor in leaves], context


def _of_leaves(leaves: Iterable[Any], context: list) -> Batch:
    names, mode, features, *others = context
    found = dict(zip(names, leaves, strict=True))
    weights = found.get("per_sample_weights")
    bags = Bags(found["indices"], found["offsets"], mode, weights, features, *others)
    return Batch(found["dense"], bags, found["labels"])


pytree.register_pytree_node(
    Batch,
    _without_names,
    _of_leaves,
    serialized_type_name="mprec.data.Batch",
    to_dumpable_context=json.dumps,
    from_dumpable_context=json.loads,
    flatten_with_keys_fn=_with_names,
)


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

    @classmethod
    def of_checked(cls, *values: Any) -> Column:
        """A column of IDs that are known to be in order: of a checked one, or of a cache."""
        column = object.__new__(cls)
        for name, value in zip(("name", "vocabulary", "ids", "offsets"), values, strict=True):
            object.__setattr__(column, name, value)
        return column

    def __post_init__(self) -> None:
        ids = np.asarray(self.ids)
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise DataError(
                f"feature {self.name!r}: ids: expected a vector of integers, got {ids.dtype} {ids.shape}"
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
            return Column.of_checked(self.name, self.vocabulary, self.ids[rows], None)
        ids, lengths = self.bags(rows)
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        return Column.of_checked(self.name, self.vocabulary, ids, offsets)

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
    what was skipped. ``vocabularies`` (by feature, where known) are what raw values became IDs by: with
    them a trained model can be asked about another log. A log that is not ``labelled`` was read without
    labels: they are all 0, and nothing can be learnt or measured. ``matrix`` [rows, features with one ID a
    row] holds the IDs of those features side by side, so that a row of a batch is in one place; their columns
    are views of it. It is made if it is not given.

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
    vocabularies: Mapping[str, Vocabulary | RawValues] = field(default_factory=dict)
    labelled: bool = True
    matrix: np.ndarray | None = field(default=None, repr=False)

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
        if not ((self.labels == 0) | (self.labels == 1)).all():
            raise DataError(f"{self.name}: labels: expected 0 or 1")
        names = [column.name for column in self.columns]
        if len(set(names)) != len(names):
            raise DataError(f"{self.name}: feature names: expected each once, got {names}")
        single = [column.ids for column in self.columns if column.offsets is None]
        if self.matrix is None:
            set_(self, "matrix", np.stack(single, axis=1) if single else np.zeros((rows, 0), dtype=np.int32))
        elif self.matrix.shape != (rows, len(single)):
            raise DataError(
                f"{self.name}: matrix: expected {(rows, len(single))} IDs, got {self.matrix.shape}"
            )
        # The columns are views of it, so that nothing is held twice.
        views = iter(self.matrix.T)
        columns = [
            Column.of_checked(c.name, c.vocabulary, next(views), None) if c.offsets is None else c
            for c in self.columns
        ]
        set_(self, "columns", tuple(columns))

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
        """How often each ID of a feature occurs: int64 [vocabulary]. ``ValueError`` for one of raw values."""
        column = self.column(name)
        if isinstance(self.vocabularies.get(name), RawValues):
            raise ValueError(f"feature {name!r} has raw values for IDs: there is no table of their counts")
        return np.bincount(column.ids, minlength=column.vocabulary)

    def batch(self, rows: slice | np.ndarray | Sequence[int]) -> Batch:
        """The samples of the given rows (a slice, or row numbers in any order, repeats allowed)."""
        if not isinstance(rows, slice):
            rows = np.asarray(rows)
            rows = rows.astype(np.int64) if rows.size == 0 else rows
            if rows.dtype.kind not in "iu" or rows.ndim != 1:
                raise TypeError(
                    f"rows: expected a slice or a vector of integers, got {rows.dtype} {rows.shape}"
                )
        labels = self.labels[rows]
        size = len(labels)
        single = np.ascontiguousarray(self.matrix[rows].T)
        if len(single) == len(self.columns):
            indices, lengths = single.reshape(-1), None
        else:
            indices, lengths = self._gather_bags(single, rows, size)
        if lengths is None:
            offsets = np.arange(len(indices) + 1)
        else:
            offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
            np.cumsum(lengths, out=offsets[1:])
        indices, offsets = torch.from_numpy(indices.astype(np.int64)), torch.from_numpy(offsets)
        return Batch(
            torch.from_numpy(np.ascontiguousarray(self.dense[rows])),
            Bags(indices, offsets, num_features=len(self.columns)),
            torch.from_numpy(np.ascontiguousarray(labels)),
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

    def batches(self, batch_size: int, *, seed: int | None = None, first: int = 0) -> Iterator[Batch]:
        """All rows once, ``batch_size`` at a time (the last may be smaller); shuffled if ``seed`` is
        given. ``first``: the batches before that one are left out.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
        order = None if seed is None else np.random.default_rng(seed).permutation(len(self))
        for start in range(first * batch_size, len(self), batch_size):
            rows = slice(start, start + batch_size)
            yield self.batch(rows if order is None else order[rows])

    def take(self, rows: slice | np.ndarray) -> ClickDataset:
        """A dataset of the given rows, in their order; of a slice, in the same memory where rows have one ID
        each.
        """

        def pick(values):
            return None if values is None else values[rows]

        bags = any(column.offsets is not None for column in self.columns)
        numbers = np.arange(len(self))[rows] if bags else None
        matrix = self.matrix[rows]
        views = iter(matrix.T)
        return replace(
            self,
            columns=[
                Column.of_checked(column.name, column.vocabulary, next(views), None)
                if column.offsets is None
                else column.take(numbers)
                for column in self.columns
            ],
            matrix=matrix,
            labels=self.labels[rows],
            dense=self.dense[rows],
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
        if not self.labelled:
            raise DataError(f"{self.name} was read without labels: it can be scored, not split into parts")
        part = self.parts(fractions, by)
        if (part[1:] >= part[:-1]).all():  # the rows' own order: slices, of which nothing is copied
            cuts = [0, *np.searchsorted(part, np.arange(1, len(fractions))), len(self)]
            return tuple(self.take(slice(a, b)) for a, b in itertools.pairwise(cuts))
        order = np.arange(len(self)) if self.times is None else np.argsort(self.times, kind="stable")
        part = part[order]
        return tuple(self.take(order[part == index]) for index in range(len(fractions)))

    def parts(self, fractions: Sequence[float] = (0.8, 0.1, 0.1), by: str | None = None) -> np.ndarray:
        """The number of the part that each row falls into when the log is ``split``: int8 [rows]."""
        by = self.default_split if by is None else by
        if by not in SPLITS:
            raise ValueError(f"by: expected one of {', '.join(SPLITS)}, got {by!r}")
        if any(f < 0 for f in fractions) or abs(sum(fractions) - 1) > 1e-6:
            raise ValueError(
                f"fractions: expected numbers of at least 0 that add up to 1, got {tuple(fractions)}"
            )
        if by == "user-time" and self.users is None:
            raise ValueError(f"{self.name} names no users: split it by time")
        edges = np.cumsum(fractions)[:-1]
        rows = len(self)
        if by == "time" and self.times is None:
            # Row i stands at (i + 1/2) / rows.
            cuts = np.ceil(edges * rows - 0.5).astype(int).clip(0, rows)
            return np.searchsorted(cuts, np.arange(rows), side="right").astype(np.int8)
        order = np.arange(rows) if self.times is None else np.argsort(self.times, kind="stable")
        if by == "time":
            position = (np.arange(rows) + 0.5) / max(rows, 1)
        else:
            position = _position_within(self.users[order])
        part = np.empty(rows, dtype=np.int8)
        part[order] = np.searchsorted(edges, position, side="right")
        return part

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
