"""How the latency of a path follows the share of unique IDs: equal IDs are decoded once, and where IDs
repeat, caches hold more of them.

Time at a share u = time at the highest share seen x *factor*, and factor = 1 + slope x (u - highest), but no
less than at the lowest share seen: a line may fall to nothing beyond. (The highest, because batches of all
sizes have some of few repetitions: at the mean share of each size, times need not rise with the size.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["ShareEffect"]

_APART = 0.05  # shares that differ by less say nothing
_STANDARD_ERRORS = 4.0  # a slope of fewer than this is noise
_SMALL = 0.01  # effects over the shares seen that are not worth knowing
_LEAST = 0.1  # of a factor: a line through calls of several kinds may fall to nothing
_TRIMMED = 0.05  # calls left out as delayed by other work


@dataclass(frozen=True)
class ShareEffect:
    """Of one path at one batch size: the highest share seen, the factor's ``slope``, and its ``least`` value,
    at the lowest share seen."""

    highest: float
    slope: float = 0.0
    least: float = 1.0

    @classmethod
    def fit(
        cls,
        calls: tuple[Sequence[float], Sequence[float]],
        repeated: tuple[Sequence[float], Sequence[float]] = ((), ()),
    ) -> ShareEffect:
        """From (seconds, shares) of the calls; of those whose IDs were ``repeated`` too, where the calls' own
        shares are too much alike to tell."""
        highest = float(np.max(calls[1]))
        line = _line(*calls) or _line(*(np.concatenate(pair) for pair in zip(calls, repeated, strict=True)))
        if line is None:
            return cls(highest)
        start, rise, lowest = line
        slope = rise / (start + rise * highest)  # not by 0: the line rises, and has positive points below
        return cls(highest, slope, max(1 + slope * (lowest - highest), _LEAST))

    def factor(self, share: np.ndarray) -> np.ndarray:
        """Of the time at the highest share."""
        return np.maximum(1 + self.slope * (share - self.highest), self.least)


def _line(seconds: Sequence[float], shares: Sequence[float]) -> tuple[float, ...] | None:
    """(seconds at share 0, rise per unit of share, lowest share) by least squares without the calls farthest
    above the line; None if there is no significant rise: more unique IDs never cost less."""
    t, u = np.asarray(seconds), np.asarray(shares)
    for last in (False, True):
        if len(t) < 3 or np.ptp(u) < _APART:
            return None
        rise, start = np.polyfit(u, t, 1)
        above = t - (start + rise * u)
        if not last:
            keep = above <= np.quantile(above, 1 - _TRIMMED)
            t, u = t[keep], u[keep]
    error = np.sqrt(np.sum(above**2) / (len(t) - 2) / np.sum((u - u.mean()) ** 2))
    mean = start + rise * np.mean(shares)
    if rise <= _STANDARD_ERRORS * error or rise * np.ptp(u) <= _SMALL * mean:
        return None
    return float(start), float(rise), float(u.min())
