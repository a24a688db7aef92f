"""Latency over batch size: piecewise linear between measured points, and rising but where it truly falls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from scipy.optimize import isotonic_regression

__all__ = ["Curve", "crossovers", "falls"]

_NOISE = 0.1  # a median that falls by less with a larger batch does not truly fall


@dataclass(frozen=True)
class Curve:
    """Seconds per call at each of ``batch_sizes`` (rising).

    Between points the curve is linear in the batch size, as *fixed cost + cost per sample* is; above the
    last point it goes on with the last segment's slope, but not below the last point's cost per sample.
    """

    batch_sizes: tuple[int, ...]
    seconds: tuple[float, ...]

    @classmethod
    def fit(cls, batch_sizes: Sequence[int], seconds: Sequence[float], drops: Sequence[int] = ()) -> Curve:
        """The curve nearest to the points that falls nowhere but at ``drops``: isotonic least squares on
        log-seconds of each stretch between them. A drop is the number of batch sizes below it (see
        :func:`falls`).

        ``ValueError`` if there are no points, or a batch size or a time is not positive and finite.
        """
        if not len(batch_sizes) or len(batch_sizes) != len(seconds):
            raise ValueError(
                f"a curve needs as many times as batch sizes, got {len(seconds)} and {len(batch_sizes)}"
            )
        order = np.argsort(batch_sizes)
        sizes = np.asarray(batch_sizes)[order]
        times = np.asarray(seconds, dtype=np.float64)[order]
        if sizes[0] < 1 or (np.diff(sizes) == 0).any():
            raise ValueError(f"batch_sizes: expected distinct sizes of at least 1, got {sizes.tolist()}")
        if not (np.isfinite(times).all() and (times > 0).all()):
            raise ValueError(f"seconds: expected positive finite numbers, got {times.tolist()}")
        stretches = np.split(np.log(times), sorted(drops))
        smooth = np.exp(np.concatenate([isotonic_regression(part).x for part in stretches]))
        return cls(tuple(int(size) for size in sizes), tuple(float(t) for t in smooth))

    def at(self, batch_size: float | np.ndarray) -> float | np.ndarray:
        """Seconds for a batch of this size; ``batch_size`` may be an array."""
        inside = np.interp(batch_size, self.batch_sizes, self.seconds)
        last, end = self.batch_sizes[-1], self.seconds[-1]
        slope = end / last
        if len(self.batch_sizes) > 1:
            slope = max(slope, (end - self.seconds[-2]) / (last - self.batch_sizes[-2]))
        value = inside + slope * np.maximum(np.asarray(batch_size) - last, 0)
        return float(value) if np.ndim(value) == 0 else value

    def table(self, up_to: int) -> list[float]:
        """``[at(0), at(1), ..., at(up_to)]`` as Python floats: a look-up costs no arithmetic."""
        return self.at(np.arange(up_to + 1)).tolist()


def falls(medians: Sequence[float]) -> list[int]:
    """Positions before which latency truly falls with the batch, as where a second thread sets in: with eight
    decoders of 131 kFLOP each, 3 samples took 188 us in one thread and 6 took 113 us in two. Small falls are
    noise.
    """
    return [i for i, (low, high) in enumerate(pairwise(medians), 1) if high < (1 - _NOISE) * low]


def crossovers(first: Curve, second: Curve) -> list[float]:
    """Batch sizes at which one curve overtakes the other, within the range both were measured on."""
    low = max(first.batch_sizes[0], second.batch_sizes[0])
    high = min(first.batch_sizes[-1], second.batch_sizes[-1])
    knots = sorted({b for b in (*first.batch_sizes, *second.batch_sizes) if low <= b <= high})
    gaps = [first.at(b) - second.at(b) for b in knots]
    points, sign = [], 0  # the last sign of the gap: a stretch of equality is no crossing by itself
    for (b0, gap0), (b1, gap1) in pairwise(zip(knots, gaps, strict=True)):
        sign = int(np.sign(gap0)) or sign
        if sign and np.sign(gap1) == -sign:
            points.append(b0 + (b1 - b0) * gap0 / (gap0 - gap1))
    return points
