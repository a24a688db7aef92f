"""Paths: the candidates of a choice, declared as data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mprec.data import Batch
from mprec.data.batching import num_features

__all__ = ["ScoringPath", "shape_digest", "unique_share"]


@dataclass(frozen=True)
class ScoringPath:
    """One complete way to answer a batch.

    ``model(batch)`` does the work; ``quality`` is any measure in which more is better, the same for all
    paths of a choice (AUC on the validation split, for checkpoints). ``shape`` identifies what was
    measured: a profile of another shape is not this path's. ``supports(batch_size)`` says which batches
    it can take at all (None: any). ``inputs`` are the numbers of features and of dense numbers that a batch
    must have, where they are known. ``note`` is for people: why it does not run as most paths do.
    """

    name: str
    representation: str
    quality: float
    model: Callable[[Any], Any]
    shape: str = ""
    supports: Callable[[int], bool] | None = None
    inputs: tuple[int, int] | None = None
    note: str = ""

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError("name: expected at least one character, got none")
        if self.quality != self.quality:
            raise ValueError(f"path {self.name!r}: quality: expected a number, got NaN")


def shape_digest(config: Any) -> str:
    """Sixteen hex digits of a JSON-able description."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16]


def unique_share(batch: Batch) -> float:
    """Distinct (feature, ID) pairs over all IDs of the batch; 1 for a batch without IDs. A few nanoseconds an
    ID."""
    if not len(batch):
        return 1.0
    num_features(batch)
    return batch.bags.unique_share()
