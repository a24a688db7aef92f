"""Batches joined and cut.

Feature-major CSR keeps the bags of one feature together, so that neither is a plain concatenation.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mprec.bags import Bags
from mprec.data.dataset import Batch

__all__ = ["collate", "concatenate", "join", "num_features", "take"]


def num_features(batch: Batch) -> int:
    """Categorical features of a batch; ``ValueError`` if its offsets do not fit its samples."""
    samples, count, offsets = len(batch), batch.bags.num_features, batch.bags.offsets.shape[0]
    if samples < 1 or count < 0 or offsets != count * samples + 1:
        raise ValueError(
            f"offsets: expected {count * samples + 1} for bags of {count} features and {samples} samples, "
            f"got {offsets}"
        )
    return count


def join(batches: Sequence[Batch], starts: Sequence[int], stops: Sequence[int]) -> Batch:
    """Samples ``starts[i]`` to ``stops[i]`` of each batch i, one after another.

    Every batch has at least one sample and the same features as the others, without per-sample weights, on
    the CPU; ``ValueError`` otherwise. A single whole batch is given back as it is.
    """
    if not batches:
        raise ValueError("batches: expected at least one, got none")
    first = batches[0]
    if len(batches) == 1 and starts[0] == 0 and stops[0] == len(first):
        return first
    num_features(first)
    return Batch(
        _rows([batch.dense for batch in batches], starts, stops),
        Bags.join([batch.bags for batch in batches], [len(batch) for batch in batches], starts, stops),
        _rows([batch.labels for batch in batches], starts, stops),
    )


def _rows(tensors: list[torch.Tensor], starts: Sequence[int], stops: Sequence[int]) -> torch.Tensor:
    """The rows of each, joined. Only queries that were split are sliced: a slice costs as much as a copy."""
    return torch.cat(
        [
            tensor if start == 0 and stop == tensor.shape[0] else tensor[start:stop]
            for tensor, start, stop in zip(tensors, starts, stops, strict=True)
        ]
    )


def concatenate(batches: Sequence[Batch]) -> Batch:
    """The samples of all the batches, in order; see :func:`join`."""
    return join(batches, [0] * len(batches), [len(batch) for batch in batches])


def collate(rows: Batch | Sequence[Batch]) -> Batch:
    """``collate_fn`` of a DataLoader over a :class:`mprec.data.ClickDataset`, or over batches."""
    return rows if isinstance(rows, Batch) else concatenate(rows)


def take(batch: Batch, samples: slice) -> Batch:
    """The samples of a contiguous slice."""
    start, stop, step = samples.indices(len(batch))
    if step != 1:
        raise ValueError(f"samples: expected a contiguous slice, got step {step}")
    return join([batch], [start], [max(start, stop)])
