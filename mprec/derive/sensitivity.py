"""How much a model's answers move with a feature's vector.

A compact form of a table has a small error in every row, and what matters is what these do to the answers.
The log-loss of a model against its own answers grows, to second order, by ``1/2 e' G e`` for an error e of a
feature's pooled vector, where G is the mean over samples of ``p (1 - p) g g'``, p the probability and g the
logit's gradient: the Fisher information of that vector. Labels are not needed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mprec.data import ClickDataset
from mprec.models import DLRM

__all__ = ["sensitivity", "square_root"]


def sensitivity(
    model: DLRM, dataset: ClickDataset, rows: int = 100_000, batch_size: int = 4096
) -> dict[str, Tensor]:
    """G of each feature, float64 ``[D, D]`` with D its columns in the collection's output, from the first
    ``rows`` of a seeded shuffle of the dataset.
    """
    if not len(dataset):
        raise ValueError(f"{dataset.name}: no rows to see the model's answers on")
    dims = list(model.embeddings.output_dims)
    totals = [torch.zeros(dim, dim, dtype=torch.float64) for dim in dims]
    seen = 0
    for batch in dataset.batches(batch_size, seed=0):
        with torch.no_grad():
            pooled = model.embeddings(batch.bags)
        pooled = pooled.clone().requires_grad_()
        with torch.enable_grad():
            logits = model.score(batch.dense, model.mix(pooled, model._mixing))
            (slopes,) = torch.autograd.grad(logits.sum(), pooled)
        share = logits.detach().sigmoid()
        scaled = (slopes * (share * (1 - share)).sqrt()[:, None]).double()
        for total, part in zip(totals, scaled.split(dims, dim=1), strict=True):
            total.addmm_(part.T, part)
        seen += len(batch)
        if seen >= rows:
            break
    return {f.name: total / seen for f, total in zip(model.embeddings.features, totals, strict=True)}


def square_root(matrix: Tensor, ridge: float = 1e-3) -> tuple[Tensor, Tensor]:
    """(H, inverse of H) with ``H H = matrix + ridge * mean of its diagonal * I``; symmetric, float64. The
    ridge keeps directions that the sample says nothing about from being thrown away for nothing.
    """
    dim = len(matrix)
    level = float(matrix.trace()) / dim
    values, vectors = torch.linalg.eigh(
        matrix + (ridge * level if level > 0 else 1.0) * torch.eye(dim, dtype=matrix.dtype)
    )
    values = values.clamp(min=values[-1] * 1e-12)
    return vectors * values.sqrt() @ vectors.T, vectors * values.rsqrt() @ vectors.T
