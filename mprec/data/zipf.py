"""Batches for measurements where there is no log to draw them from."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from mprec.bags import Bags
from mprec.data.dataset import Batch

__all__ = ["EXPONENT", "zipf_batches"]

EXPONENT = 1.05  #: of IDs where nobody has said how often they repeat


def zipf_batches(
    vocabularies: Sequence[int], num_dense: int = 0
) -> Callable[[int, np.random.Generator], Batch]:
    """A function ``draw(batch_size, rng)`` of batches with one ID for each feature, whose frequency falls as
    (about) rank ** -1.05, and ``num_dense`` standard normal numbers; labels are 0.

    Frequent IDs are scattered over a vocabulary as hashing or the order of a log would scatter them.
    ``ValueError`` if a vocabulary is empty or ``num_dense`` negative.
    """
    if wrong := [size for size in vocabularies if size < 1]:
        raise ValueError(f"vocabularies: expected sizes of at least 1, got {wrong[0]}")
    if num_dense < 0:
        raise ValueError(f"num_dense: expected at least 0, got {num_dense}")
    sizes = np.asarray(vocabularies, dtype=np.int64).reshape(-1, 1)
    tails = 1 - (sizes + 1.0) ** (1 - EXPONENT)

    def draw(batch_size: int, rng: np.random.Generator) -> Batch:
        # The continuous distribution's quantiles, rounded down.
        rank = (1 - rng.random((len(sizes), batch_size)) * tails) ** (1 / (1 - EXPONENT)) - 1
        # Neighbours in rank are none in memory.
        ids = np.minimum(rank.astype(np.int64), sizes - 1) * 2_654_435_761 % sizes
        dense = rng.standard_normal((batch_size, num_dense), dtype=np.float32)
        indices, offsets = torch.from_numpy(ids.reshape(-1)), torch.arange(ids.size + 1)
        bags = Bags(indices, offsets, num_features=len(sizes))
        return Batch(torch.from_numpy(dense), bags, torch.zeros(batch_size))

    return draw
