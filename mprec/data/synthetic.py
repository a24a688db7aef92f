"""Seeded click logs with Zipf-distributed IDs and a planted model, so that the best possible quality is
known.

The click probability of a sample is ``sigmoid(bias + z)`` where ``z`` is the sum of one effect per ID, a
dot product of hidden vectors for every pair of features, and a linear term in the dense numbers; it is
scaled to a standard deviation of ``signal``. Labels are drawn from it: no model can beat the AUC and
log-loss of these probabilities, which ``info`` reports.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mprec.data.dataset import ClickDataset, Column
from mprec.metrics import auc, log_loss

__all__ = ["read"]

HIDDEN = 4  # length of the planted hidden vectors


def read(
    *,
    rows: int = 100_000,
    seed: int = 0,
    features: int = 8,
    vocabulary: int | Sequence[int] = 10_000,
    zipf: float = 1.05,
    bag: int = 1,
    dense: int = 4,
    signal: float = 1.5,
    click_share: float = 0.3,
) -> ClickDataset:
    """Draw a log; equal arguments give equal logs.

    ``vocabulary`` is the size of the largest feature, the others shrinking by powers of two thirds (or
    all sizes); ID popularity follows ``rank ** -zipf`` in a shuffled order; with ``bag`` > 1 the last
    feature has bags of 0 to ``bag`` IDs, with the mean of their effects. ``click_share`` is roughly the
    share of positive labels.
    """
    for name, value, least in [
        ("rows", rows, 1),
        ("features", features, 1),
        ("bag", bag, 1),
        ("dense", dense, 0),
    ]:
        if value < least:
            raise ValueError(f"{name}: expected at least {least}, got {value}")
    if not 0 < click_share < 1:
        raise ValueError(f"click_share: expected in (0, 1), got {click_share}")
    if isinstance(vocabulary, int):
        sizes = [max(int(vocabulary * (2 / 3) ** i), 2) for i in range(features)]
    else:
        sizes = list(vocabulary)
        features = len(sizes)
    if min(sizes) < 1:
        raise ValueError(f"vocabulary: expected at least one ID in each vocabulary, got {sizes}")
    rng = np.random.default_rng(seed)
    columns = []
    score = np.zeros(rows)
    hidden_sum, square_sum = np.zeros((rows, HIDDEN)), np.zeros(rows)
    for index, size in enumerate(sizes):
        offsets = None
        if bag > 1 and index == features - 1:
            offsets = np.concatenate([[0], np.cumsum(rng.integers(0, bag + 1, rows))])
        ids = _zipf_ids(rng, size, zipf, rows if offsets is None else offsets[-1])
        column = Column(f"f{index}", size, ids, offsets)
        columns.append(column)
        score += _pooled(rng.standard_normal((size, 1)), column)[:, 0]
        hidden = _pooled(rng.standard_normal((size, HIDDEN)) / HIDDEN**0.5, column)
        hidden_sum += hidden
        square_sum += (hidden**2).sum(axis=1)
    # Sum over pairs s < t of <v_s, v_t>, from the square of the sum; as much variance as the effects have.
    pairs = ((hidden_sum**2).sum(axis=1) - square_sum) / 2
    if features > 1:
        score += pairs / ((features - 1) / 2 / HIDDEN) ** 0.5
    numbers = rng.standard_normal((rows, dense)).astype(np.float32)
    score += numbers @ rng.standard_normal(dense)
    score = (score - score.mean()) / max(score.std(), 1e-12) * signal
    bias = (
        np.log(click_share / (1 - click_share)) * (1 + signal**2 * np.pi / 8) ** 0.5
    )  # probit approximation
    probabilities = 1 / (1 + np.exp(-(score + bias)))
    labels = rng.random(rows) < probabilities
    return ClickDataset(
        name="synthetic",
        columns=columns,
        dense=numbers,
        labels=labels,
        probabilities=probabilities,
        info={
            "source": f"synthetic, seed {seed}",
            "best_auc": auc(labels, probabilities),
            "best_log_loss": log_loss(labels, probabilities),
        },
    )


def _zipf_ids(rng: np.random.Generator, size: int, exponent: float, count: int) -> np.ndarray:
    cumulative = np.cumsum(np.arange(1, size + 1, dtype=np.float64) ** -exponent)
    ranks = np.searchsorted(cumulative, rng.random(count) * cumulative[-1])
    return rng.permutation(size).astype(np.int32)[ranks]


def _pooled(values: np.ndarray, column: Column) -> np.ndarray:
    """Rows of ``values`` for a column's IDs; bags give their mean, empty ones 0."""
    picked = values[column.ids]
    if column.offsets is None:
        return picked
    sums = np.concatenate([np.zeros((1, values.shape[1])), np.cumsum(picked, axis=0)])
    lengths = np.diff(column.offsets)[:, None]
    return (sums[column.offsets[1:]] - sums[column.offsets[:-1]]) / np.maximum(lengths, 1)
