"""A finer grid of batch sizes where latency is not straight between those measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np

from mprec.dispatch.curve import Curve, falls
from mprec.dispatch.microbenchmark import Samples

__all__ = ["PASSES", "check_sizes", "errors", "median_curves", "refine"]

PASSES = 3
_TOLERANCE = 0.08


def refine(
    batch_sizes: Sequence[int],
    measure: Callable[[list[int]], Samples],
    go_on: Callable[[], bool] = lambda: True,
) -> list[int]:
    """``batch_sizes`` and those between them that a curve needs: gaps are bisected, and where the line misses
    a path's time in the (geometric) middle, the middle joins and its two halves are looked at in turn, three
    times at most, and while ``go_on()``. Thresholds, such as that of another thread, are so closed in on. A
    miss is more than 8 % off the median, and past the middle half of the calls: noise needs no points.
    """
    samples = measure(sorted(batch_sizes))
    gaps = list(pairwise(sorted(batch_sizes)))
    for _ in range(PASSES):
        if not go_on():
            break
        middles = {gap: round(math.sqrt(gap[0] * gap[1])) for gap in gaps}
        middles = {gap: middle for gap, middle in middles.items() if middle not in gap}
        if not middles:
            break
        found = measure(sorted(middles.values()))
        missed = _missed(median_curves(samples), found)
        gaps = []
        for (low, high), middle in middles.items():
            if middle in missed:
                samples |= {cell: values for cell, values in found.items() if cell[1] == middle}
                gaps += [(low, middle), (middle, high)]
    return sorted({*batch_sizes, *(size for _, size in samples)})


def _missed(curves: dict[str, Curve], samples: Samples) -> set[int]:
    """Batch sizes at which a curve is out of the samples' way."""
    missed = set()
    for cell, error in errors(curves, samples).items():
        name, size = cell
        low, high = np.quantile(samples[cell], (0.25, 0.75))
        if error > _TOLERANCE and not low <= curves[name].at(size) <= high:
            missed.add(size)
    return missed


def median_curves(samples: Samples) -> dict[str, Curve]:
    """Per path, the curve of its medians."""
    curves = {}
    for name in {name for name, _ in samples}:
        points = sorted(
            (size, float(np.median(v))) for (path, size), v in samples.items() if path == name and v
        )
        if points:
            sizes, medians = zip(*points, strict=True)
            curves[name] = Curve.fit(sizes, medians, falls(medians))
    return curves


def errors(curves: dict[str, Curve], samples: Samples) -> dict[tuple[str, int], float]:
    """Relative error of each curve against the median of each cell."""
    return {
        (name, size): abs(float(curves[name].at(size)) / float(np.median(values)) - 1)
        for (name, size), values in samples.items()
        if values and name in curves
    }


def check_sizes(batch_sizes: Sequence[int], measured: Sequence[int]) -> list[int]:
    """Batch sizes that were not ``measured``: about two thirds up each gap, where ``refine`` looks last."""
    between = [round(a ** (1 / 3) * b ** (2 / 3)) for a, b in pairwise(sorted(batch_sizes))]
    return sorted(set(between) - set(measured) - set(batch_sizes))
