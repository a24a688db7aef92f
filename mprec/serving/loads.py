"""Loads: queries of real samples, each with the time when it is due."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from mprec.arrivals import LOGNORMAL_SIZES, Arrivals, Sizes
from mprec.data import Batch, ClickDataset

__all__ = ["Arrival", "generate", "generate_from"]

_MOST_DISTINCT = 8192  # queries of a load


@dataclass(frozen=True)
class Arrival:
    """A query that is due ``at_s`` seconds after the load's start."""

    at_s: float
    batch: Batch


def generate(
    dataset: ClickDataset, qps: float, queries: int, *, sizes: Sizes = LOGNORMAL_SIZES, seed: int = 0
) -> list[Arrival]:
    """A Poisson load of exactly ``queries`` queries at ``qps`` per second on average, each of random rows of
    ``dataset``.
    """
    if not 0 < qps < math.inf:
        raise ValueError(f"qps: expected a positive finite number, got {qps}")
    if queries < 1:
        raise ValueError(f"queries: expected at least 1, got {queries}")
    rng = np.random.default_rng(seed)
    return _with_batches(np.cumsum(rng.exponential(1 / qps, queries)), dataset, sizes, rng)


def generate_from(
    dataset: ClickDataset,
    arrivals: Arrivals,
    seconds: float,
    *,
    sizes: Sizes = LOGNORMAL_SIZES,
    seed: int = 0,
) -> list[Arrival]:
    """The queries that come by ``arrivals`` within ``seconds``, each of random rows of ``dataset``.

    ``ValueError`` if there are none.
    """
    rng = np.random.default_rng(seed)
    times = arrivals.times(seconds, rng)
    if not len(times):
        raise ValueError(f"seconds: expected a duration in which queries arrive, got {seconds} at {arrivals}")
    return _with_batches(times, dataset, sizes, rng)


def _with_batches(
    times: np.ndarray, dataset: ClickDataset, sizes: Sizes, rng: np.random.Generator
) -> list[Arrival]:
    if not len(dataset):
        raise ValueError(f"{dataset.name}: no rows to ask about")
    # Loads of more queries than this ask some of them again: memory is bounded.
    distinct = min(len(times), _MOST_DISTINCT)
    batches = [dataset.batch(rng.integers(len(dataset), size=size)) for size in sizes.draw(distinct, rng)]
    order = range(distinct) if distinct == len(times) else rng.integers(distinct, size=len(times))
    return [Arrival(float(at), batches[i]) for at, i in zip(times, order, strict=True)]
