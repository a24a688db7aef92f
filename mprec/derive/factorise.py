"""Rows of low rank, by a weighted singular value decomposition."""

from __future__ import annotations

import torch
from torch import Tensor

from mprec.derive.sensitivity import square_root
from mprec.nn import LowRankTable

__all__ = ["code_limits", "low_rank"]


@torch.no_grad()
def low_rank(rows: Tensor, counts: Tensor, rank: int, metric: Tensor | None = None) -> LowRankTable:
    """The table of rank ``rank`` about a mean row that is nearest to ``rows`` ``[N, D]``.

    Minimises ``sum over i of counts[i] |rows[i] - row of rank r|^2``, lengths taken in ``metric`` ``[D, D]``
    (see :func:`mprec.derive.sensitivity`; None: the identity): by Eckart and Young (Psychometrika 1, 1936)
    the leading singular vectors of the rows less their mean, each scaled by the root of its count. IDs that
    never occur have no say in the projection, and the codes that fit them best. Memory: a few float64 copies
    of the rows. Ranks above D, or N, are filled up with zeros.
    """
    if rank < 1:
        raise ValueError(f"rank: expected at least 1, got {rank}")
    weights = _weights(counts, len(rows))
    dim = rows.shape[1]
    exact = rows.double()
    mean = (weights @ exact) / weights.sum()
    root, inverse = square_root(torch.eye(dim, dtype=torch.float64) if metric is None else metric)
    whitened = (exact - mean) @ root
    # Eigenvectors of the D x D moments are the right singular vectors: N does not matter.
    moments = (whitened * weights[:, None]).T @ whitened
    _, vectors = torch.linalg.eigh(moments)
    leading = vectors.flip(1)[:, :rank]
    codes, projection = whitened @ leading, leading.T @ inverse
    if rank > dim:
        codes = torch.nn.functional.pad(codes, (0, rank - dim))
        projection = torch.nn.functional.pad(projection, (0, 0, 0, rank - dim))
    return LowRankTable(codes.float(), projection.float(), mean.float())


def code_limits(table: LowRankTable, counts: Tensor) -> Tensor:
    """What an int8 column should hold: the largest code ``[r]`` of an ID that occurs. Others are clipped: a
    row that was never trained must not make the steps of all others coarse."""
    seen = counts > 0
    codes = table.codes[seen] if bool(seen.any()) else table.codes
    return codes.abs().amax(0)


def _weights(counts: Tensor, rows: int) -> Tensor:
    weights = counts.double()
    if weights.shape != (rows,) or bool((weights < 0).any()):
        raise ValueError(f"counts: expected {rows} counts >= 0, got shape {tuple(counts.shape)}")
    return weights if bool(weights.any()) else torch.ones_like(weights)
