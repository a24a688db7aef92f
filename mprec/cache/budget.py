"""How many bytes of a cache each feature gets."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mprec._native import RowCache

__all__ = ["Counts", "HotIds", "hottest", "split_budget"]

#: How often each ID was seen: a tensor ``[vocabulary]``, or IDs and their counts.
Counts = Tensor | tuple[Tensor, Tensor]

#: Places of a feature's rows are chosen by hash, so a full cache holds about this share of as many IDs.
_FILL = 0.93


@dataclass(frozen=True)
class HotIds:
    """IDs int64 ``[n]``, the most frequent first, and their counts ``[n]``."""

    ids: Tensor
    counts: Tensor


def hottest(counts: Counts, name: str = "counts") -> HotIds:
    """The IDs that were seen, the most frequent first (equal ones by ID).

    Raises:
        ValueError: negative IDs or counts, or shapes that do not fit.
    """
    ids, seen = counts if isinstance(counts, tuple) else (None, counts)
    seen = torch.as_tensor(seen)
    if seen.dim() != 1:
        raise ValueError(f"{name}: expected 1 dimension, got {seen.dim()}")
    ids = torch.arange(len(seen)) if ids is None else torch.as_tensor(ids, dtype=torch.int64)
    if ids.shape != seen.shape:
        raise ValueError(f"{name}: {len(ids)} IDs, but {len(seen)} counts")
    if seen.numel() and (seen.min() < 0 or ids.min() < 0):
        raise ValueError(
            f"{name}: expected IDs and counts >= 0, got {int(ids.min())} and {seen.min().item()}"
        )
    kept = seen > 0
    ids, seen = ids[kept], seen[kept]
    order = torch.argsort(seen, descending=True, stable=True)
    return HotIds(ids[order], seen[order])


def split_budget(
    nbytes: int,
    dims: Mapping[str, int],
    vocabularies: Mapping[str, int | None],
    hot: Mapping[str, HotIds] | None = None,
    costs: Mapping[str, float] | None = None,
) -> dict[str, int]:
    """Bytes for each feature's cache, at most ``nbytes`` in all; 0: too little to be worth a cache.

    With frequencies, bytes go to the rows that save most decoder work per byte: the k-th hottest ID of a
    feature saves its count x the cost of decoding. Taking rows in that order is optimal (but for rounding),
    as every row of a feature has the same size. Without, every feature gets an equal share, and what small
    vocabularies leave over goes to the others.

    Args:
        dims: floats in a row.
        vocabularies: IDs there are; ``None``: no bound.
        hot: frequencies, for the features where they are known.
        costs: of decoding one row, in any one unit; default: equal.
    """
    if nbytes < 0:
        raise ValueError(f"nbytes: expected >= 0, got {nbytes}")
    most = {
        name: nbytes if size is None else min(nbytes, RowCache.bytes_for(dims[name], _room(size)))
        for name, size in vocabularies.items()
    }
    if hot:
        shares = _by_savings(nbytes, dims, hot, costs or {})
        return {name: min(shares.get(name, 0), most[name]) for name in dims}
    shares, left = {}, nbytes
    for done, name in enumerate(sorted(dims, key=lambda n: most[n])):
        share = min(most[name], left // (len(dims) - done))
        shares[name] = share if share >= RowCache.bytes_for(dims[name], 1) else 0
        left -= shares[name]
    return {name: shares[name] for name in dims}


def _room(rows: int) -> int:
    return int(rows / _FILL) + 12


def _by_savings(nbytes, dims, hot, costs) -> dict[str, int]:
    names = [name for name in dims if name in hot and len(hot[name].ids)]
    empty = {name: RowCache.bytes_for(dims[name], 1) for name in names}
    # The bytes of one more row, on average over a large cache.
    each = {name: (RowCache.bytes_for(dims[name], 6000) - empty[name]) / 5994 / _FILL for name in names}
    savings = [
        hot[name].counts.numpy().astype(np.float64) * costs.get(name, 1.0) / each[name] for name in names
    ]
    feature = np.repeat(np.arange(len(names)), [len(s) for s in savings])
    order = np.argsort(-np.concatenate(savings), kind="stable") if names else np.empty(0, int)
    feature = feature[order]
    room = nbytes - sum(empty.values())
    spent = np.cumsum(np.array([each[name] for name in names])[feature]) if names else np.empty(0)
    taken = np.bincount(feature[: np.searchsorted(spent, room, side="right")], minlength=len(names))
    return {
        name: int(empty[name] + count * each[name]) if count else 0
        for name, count in zip(names, taken, strict=True)
    }
