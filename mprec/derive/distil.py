"""Deep hash embeddings taught by rows instead of labels."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from mprec.derive.factorise import _weights
from mprec.derive.sensitivity import square_root
from mprec.nn import DeepHashEmbeddingBag, DheConfig

__all__ = ["distil", "shape_for"]

_STEPS, _BATCH, _RATE = 3000, 1024, 3e-3


def shape_for(vocabulary: int, dim: int, share: float = 0.25, seed: int = 0) -> DheConfig | None:
    """The largest decoder of 4h hashes and one hidden layer of h (a multiple of 8, at most 256) in ``share``
    of the bytes of a float32 table; None if there is none."""
    for hidden in range(256, 0, -8):
        config = DheConfig(k=4 * hidden, hidden=(hidden,), last_activation="none", seed=seed)
        # The coefficients of the hashes are four int32 each.
        if 4 * config.num_parameters(dim) + 16 * config.k <= share * 4 * vocabulary * dim:
            return config
    return None


def distil(
    rows: Tensor,
    counts: Tensor,
    config: DheConfig,
    mode: str = "sum",
    metric: Tensor | None = None,
    *,
    steps: int = _STEPS,
    seed: int = 0,
    progress: Callable[[float], object] | None = None,
) -> DeepHashEmbeddingBag:
    """A deep hash embedding whose vectors are near the ``rows`` ``[N, D]`` of IDs 0 to N - 1.

    Minimises the squared distance in ``metric`` ``[D, D]`` (as for :func:`mprec.derive.low_rank`), IDs drawn
    in proportion to the root of their count: by counts alone a few IDs would have all the decoder. The
    decoder learns rows of mean 0 and spread 1; mean, spread and metric go into its last layer, which is
    linear, when it is done. The same seed gives the same weights; the global random state is left alone.

    Args:
        config: ``last_activation`` is ignored: the last layer is linear.
        steps: of Adam over 1024 IDs each, at a rate that falls to zero.
        progress: called with the share done.

    Raises:
        ValueError: rows that are not finite, or counts that do not fit.
    """
    if not bool(torch.isfinite(rows).all()):
        raise ValueError("rows: expected finite numbers")
    if steps < 1:
        raise ValueError(f"steps: expected at least 1, got {steps}")
    count, dim = rows.shape
    weights = _weights(counts, count).sqrt()
    exact = rows.double()
    mean = (weights @ exact) / weights.sum()
    root, inverse = square_root(torch.eye(dim, dtype=torch.float64) if metric is None else metric)
    whitened = (exact - mean) @ root
    spread = float(((weights @ whitened.square()) / weights.sum()).mean().sqrt()) or 1.0
    targets = (whitened / spread).float()
    config = replace(config, last_activation="none")
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = DeepHashEmbeddingBag(dim, config, mode, include_last_offset=True)
    _standardise(module, count, generator)
    optimizer = torch.optim.Adam(module.parameters(), lr=_RATE, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * min(step / steps, 1)))
    )
    cumulative = weights.cumsum(0)
    size = min(_BATCH, 4 * count)
    each = torch.arange(size + 1)
    with torch.enable_grad():
        for step in range(steps):
            drawn = torch.rand(size, generator=generator, dtype=torch.float64) * cumulative[-1]
            ids = torch.searchsorted(cumulative, drawn, right=True).clamp(max=count - 1)
            optimizer.zero_grad()
            (module(ids, each) - targets[ids]).square().mean().backward()
            optimizer.step()
            schedule.step()
            if progress and step % 100 == 99:
                progress((step + 1) / steps)
    with torch.no_grad():
        last = spread * inverse  # of a vector: y = last @ z + mean
        weight, bias = module.weights[-1], module.biases[-1]
        bias.copy_(last @ bias.double() + mean)
        weight.copy_(last @ weight.double())
    return module.eval()


@torch.no_grad()
def _standardise(module: DeepHashEmbeddingBag, count: int, generator: torch.Generator) -> None:
    """Scale the untrained last layer so that the vectors of IDs below ``count`` have mean 0 and spread 1."""
    sample = min(count, 4096)
    ids = torch.randint(count, (sample,), generator=generator) if count > sample else torch.arange(count)
    vectors = module(ids, torch.arange(sample + 1))
    spread = vectors.std(0, correction=0)
    spread = torch.where(spread > 0, spread, 1)
    weight, bias = module.weights[-1], module.biases[-1]
    weight /= spread[:, None]
    bias.copy_((bias - vectors.mean(0)) / spread)
