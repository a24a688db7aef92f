"""What one path is expected to take: its profile, corrected by what is observed while serving.

Prediction = profiled latency at this batch size (and share of unique IDs) x the path's correction, which
follows observed over profiled means (at that share). The rules that make it steady:

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

from mprec.dispatch.paths import ScoringPath
from mprec.dispatch.profile import Profile

__all__ = ["Prediction"]

_WINDOW = 16  # calls whose trimmed mean is followed
_TRIM = 3  # calls left out at either end
_GAIN = 0.4  # share of the way to that mean that one call moves the followed correction
_DEAD_BAND = math.log(1.1)
_LIMIT = math.log(1000.0)  # no observation counts for more than this
_FORGET = 40  # calls of other paths after which a path's slowness is forgotten
_STALE = 8  # calls of other paths after which old observations of a path are forgotten


class _Estimate:
    """One statistic of one path, in seconds by batch size: ``plain``, of inputs like the profile's, or, where
    the share u of unique IDs is known, max(base + u * slope, floor); ``floor`` and ``ceiling`` are its values
    at the lowest and the highest share that was profiled."""

    def __init__(
        self, path: ScoringPath, profile: Profile, statistic: str, condition: str, up_to: int
    ) -> None:
        able = [path.supports is None or (b and path.supports(b)) for b in range(up_to + 1)]

        def table(same_share: bool) -> np.ndarray:
            curve = profile.curve(path.name, statistic, condition, same_share)
            return np.where(able, curve.table(up_to), math.inf)

        self.plain = table(False).tolist()
        ceiling, sizes = table(True), np.arange(up_to + 1)
        known, effects = profile.share_effects(path.name, condition)
        highest, slope, least = (
            np.interp(sizes, known, values)
            for values in zip(*((e.highest, e.slope, e.least) for e in effects), strict=True)
        )
        self.base = (ceiling * (1 - slope * highest)).tolist()
        self.slope = np.where(able, slope * np.where(able, ceiling, 0.0), 0.0).tolist()
        self.floor, self.ceiling = (ceiling * least).tolist(), ceiling.tolist()

    def at(self, i: int, unique_share: float | None) -> float:
        if unique_share is None:
            return self.plain[i]
        return max(self.base[i] + unique_share * self.slope[i], self.floor[i])


class Prediction:
    """Of one path. Lists are indexed by batch size, in seconds, and reach up to the profile's largest."""

    def __init__(
        self, path: ScoringPath, profile: Profile, statistic: str, condition: str, up_to: int
    ) -> None:
        self.path = path
        self.last = up_to
        self._tail = _Estimate(path, profile, statistic, condition, up_to)
        self._typical = _Estimate(path, profile, "mean", condition, up_to)
        self.base, self.slope, self.floor = self._tail.base, self._tail.slope, self._tail.floor
        self.known = {None: self._tail.plain, "lowest": self.floor, "highest": self._tail.ceiling}
        self.correction = 1.0  # in use
        self._followed = 0.0  # its logarithm
        self._forgotten = 0.0  # what was followed when it was forgotten, until the next call
        self._recent: deque[float] = deque(maxlen=_WINDOW)
        self._idle = 0

    def scale(self, batch_size: int) -> float:
        """Beyond the largest profiled batch, times grow in proportion."""
        return max(1.0, batch_size / self.last)

    def tail_at(self, batch_size: int, unique_share: float | None = None) -> float:
        """Predicted tail latency. ``Dispatcher`` has the same formula written out."""
        value = self._tail.at(min(batch_size, self.last), unique_share)
        return value * (self.scale(batch_size) * self.correction)

    def typical_at(self, batch_size: int, unique_share: float | None = None) -> float:
        """Predicted mean latency."""
        value = self._typical.at(min(batch_size, self.last), unique_share)
        return value * (self.scale(batch_size) * self.correction)

    def observe(self, batch_size: int, seconds: float, unique_share: float | None) -> None:
        """A call took so long."""
        expected = self.typical_at(batch_size, unique_share) / self.correction
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
