"""What one path is expected to take: its profile, corrected by what is observed while serving.

Prediction = profiled latency at this batch size (and share of unique IDs) x the path's correction, which
follows observed over profiled means. The rules that make it steady:

- *Robust*: a correction follows the mean of the last sixteen calls without the three slowest and the three
  fastest (of up to six calls: the middle one or two), so one hiccup moves nothing. A median jumps more
  where batches are of two kinds, as with a cache that some of them miss.
- *Hysteresis*: a correction in use changes only when the followed one has moved by more than 10 %; between
  such steps a choice is a pure function of its arguments.
- *Forgiving*: a path that is not chosen is not observed, so after 40 batches of others its slowness is
  forgotten and it is tried again. One call that finds it as slow as before brings the correction back.
"""

from __future__ import annotations

import math
from collections import deque

import numpy as np

from mprec.dispatch.paths import Path
from mprec.dispatch.profile import Profile

__all__ = ["Prediction"]

_WINDOW = 16  # calls whose trimmed mean is followed
_TRIM = 3  # calls left out at either end
_GAIN = 0.4  # share of the way to that mean that one call moves the followed correction
_DEAD_BAND = math.log(1.1)
_LIMIT = math.log(1000.0)  # no observation counts for more than this
_FORGET = 40  # calls of other paths after which a path's slowness is forgotten
_STALE = 8  # calls of other paths after which old observations of a path are forgotten


class Prediction:
    """Of one path. Lists are indexed by batch size, in seconds, and reach up to the profile's largest."""

    def __init__(self, path: Path, profile: Profile, statistic: str, condition: str, up_to: int) -> None:
        self.path = path
        self.last = up_to
        self.tail = _table(path, profile, statistic, condition, up_to)
        self.typical = _table(path, profile, "mean", condition, up_to)
        # With a share u of unique IDs the tail is max(base + u * slope, floor), where it was profiled at two.
        seen, self.slope = _unique_share_slopes(profile, path.name, statistic, up_to)
        self.base = [t - u * s for t, u, s in zip(self.tail, seen, self.slope, strict=True)]
        self.floor = [0.1 * t for t in self.tail]
        self.correction = 1.0  # in use
        self._followed = 0.0  # its logarithm
        self._forgotten = 0.0  # what was followed when it was forgotten, until the next call
        self._recent: deque[float] = deque(maxlen=_WINDOW)
        self._idle = 0

    def scale(self, batch_size: int) -> float:
        """Beyond the largest profiled batch, times grow in proportion."""
        return max(1.0, batch_size / self.last)

    def tail_at(self, batch_size: int, unique_share: float | None = None) -> float:
        """Predicted tail latency. ``Dispatcher.choose`` has the same formula written out."""
        i = min(batch_size, self.last)
        value = self.tail[i]
        if unique_share is not None:
            value = max(self.base[i] + unique_share * self.slope[i], self.floor[i])
        return value * (self.scale(batch_size) * self.correction)

    def typical_at(self, batch_size: int) -> float:
        """Predicted mean latency."""
        return self.typical[min(batch_size, self.last)] * self.scale(batch_size) * self.correction

    def observe(self, batch_size: int, seconds: float, unique_share: float | None) -> None:
        """A call took so long."""
        expected = self.typical_at(batch_size) / self.correction
        if unique_share is not None:
            expected *= self.tail_at(batch_size, unique_share) / self.tail_at(batch_size)
        if not 0.0 < expected < math.inf:
            return
        ratio = max(-_LIMIT, min(_LIMIT, math.log(seconds) - math.log(expected)))
        if self._idle > _STALE:
            self._recent.clear()
        self._idle = 0
        if self._forgotten and ratio > self._forgotten - _DEAD_BAND:
            self._followed = self._forgotten
        self._forgotten = 0.0
        self._recent.append(ratio)
        drop = min(_TRIM, (len(self._recent) - 1) // 2)
        kept = sorted(self._recent)[drop : len(self._recent) - drop]
        self._followed += _GAIN * (sum(kept) / len(kept) - self._followed)
        if abs(self._followed - math.log(self.correction)) > _DEAD_BAND:
            self.correction = math.exp(self._followed)

    def passed_over(self) -> None:
        """Another path took the batch."""
        self._idle += 1
        if self._idle >= _FORGET and self.correction > 1.0:
            self._forgotten = self._forgotten or self._followed
            self._followed, self.correction = 0.0, 1.0


def _table(path: Path, profile: Profile, statistic: str, condition: str, up_to: int) -> list[float]:
    table = profile.curve(path.name, statistic, condition).table(up_to)
    if path.supports is not None:
        table = [t if b and path.supports(b) else math.inf for b, t in enumerate(table)]
    return table


def _unique_share_slopes(profile: Profile, name: str, statistic: str, up_to: int):
    """(unique share the profile saw, seconds per unit of share) at each batch size; no slope where it was
    profiled at one share only."""
    sizes = np.arange(up_to + 1)
    seen = np.interp(sizes, *profile.unique_shares(name))
    if "repeated" not in profile.cells[name]:
        return seen.tolist(), [0.0] * (up_to + 1)
    low = np.interp(sizes, *profile.unique_shares(name, "repeated"))
    gap = profile.curve(name, statistic).at(sizes) - profile.curve(name, statistic, "repeated").at(sizes)
    apart = seen - low > 0.05
    # More unique IDs never cost less: a negative slope is noise.
    slope = np.where(apart, np.maximum(gap, 0.0) / np.where(apart, seen - low, 1.0), 0.0)
    return seen.tolist(), slope.tolist()
