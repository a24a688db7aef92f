"""Batches joined and cut. Feature-major CSR keeps the bags of one feature together, so neither is a plain
concatenation.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from mprec.data.dataset import Batch

__all__ = ["concatenate", "num_features", "take"]


def num_features(batch: Batch) -> int:
    """Categorical features of a batch; ``ValueError`` if its offsets do not fit its samples."""
    samples, bags = len(batch), len(batch.offsets) - 1
    if samples < 1 or bags < 0 or bags % samples:
        raise ValueError(f"offsets of length {bags + 1} do not describe bags of {samples} samples")
    return bags // samples


def concatenate(batches: Sequence[Batch]) -> Batch:
    """The samples of all the batches, in order. Each must have at least one sample; all the same features,
    and be in the CPU's memory. (In NumPy, whose calls on small arrays cost a third of torch's.)
    """
    if len(batches) == 1:
        return batches[0]
    if not batches:
        raise ValueError("batches must name at least one batch")
    counts = {num_features(batch) for batch in batches}
    if len(counts) > 1:
        raise ValueError(f"batches have different numbers of features: {sorted(counts)}")
    features = counts.pop()
    lengths, blocks = [], []  # blocks[batch][feature]: its IDs
    for batch in batches:
        offsets, indices = batch.offsets.numpy(), batch.indices.numpy()
        lengths.append((offsets[1:] - offsets[:-1]).reshape(features, -1))
        ends = offsets[:: lengths[-1].shape[1]].tolist()
        blocks.append([indices[ends[t] : ends[t + 1]] for t in range(features)])
    bags = np.concatenate(lengths, axis=1).reshape(-1)
    offsets = np.zeros(len(bags) + 1, dtype=bags.dtype)
    np.cumsum(bags, out=offsets[1:])
    return Batch(
        dense=torch.cat([batch.dense for batch in batches]),
        indices=torch.from_numpy(
            np.concatenate([block for each in zip(*blocks, strict=True) for block in each])
        ),
        offsets=torch.from_numpy(offsets),
        labels=torch.cat([batch.labels for batch in batches]),
    )


def take(batch: Batch, samples: slice) -> Batch:
    """The samples of a contiguous slice."""
    start, stop, step = samples.indices(len(batch))
    if step != 1:
        raise ValueError(f"samples must be a contiguous slice, got step {step}")
    if (start, stop) == (0, len(batch)):
        return batch
    features = num_features(batch)
    bags = torch.arange(features).unsqueeze(1) * len(batch)
    begins, ends = batch.offsets[(bags + start).view(-1)], batch.offsets[(bags + max(stop, start)).view(-1)]
    lengths = batch.offsets.diff().view(features, -1)[:, start:stop].reshape(-1)
    offsets = lengths.new_zeros(len(lengths) + 1)
    torch.cumsum(lengths, 0, out=offsets[1:])
    blocks = [batch.indices[b:e] for b, e in zip(begins.tolist(), ends.tolist(), strict=True)]
    return Batch(
        dense=batch.dense[start:stop],
        indices=torch.cat(blocks) if blocks else batch.indices[:0],
        offsets=offsets,
        labels=batch.labels[start:stop],
    )
