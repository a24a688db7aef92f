"""How fast the machine is now, compared with its profile.

The logarithm of observed over profiled time of a call of path p is modelled as

    y = machine + deviation[p] + noise

``machine`` is common to all paths of an executor: a busy neighbour or a lower clock slows them all. It is a
random walk. ``deviation[p]`` is what one path differs from that; it is small and reverts to zero with time. A
Kalman filter follows them together. Since what is known grows old by itself, old observations are forgotten
with time, and a path that has not run for a while is expected to follow the machine.

Two rules make the filter robust. An observation further than three standard deviations away counts as if it
were just three away, so that one hiccup moves little. If the next one lies as far away on the same side, the
machine has changed: its variance then grows by the square of the distance, so that the estimate moves there
at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

__all__ = ["Correction"]

_WANDER = 0.05  # variance that the machine's factor gains in a second
_UNKNOWN = 0.25  # variance of the machine's factor after a long silence
_PROFILED = 0.02  # the same right after profiling
_DEVIATION = 0.02  # variance of a path's deviation before anything is known of it
_REVERSION_S = 5.0  # time in which a deviation that is not observed falls to 1/e
_NOISE = 0.15**2  # variance of a call at first; followed later
_NOISE_RANGE = (0.02**2, 0.5**2)
_NOISE_GAIN = 0.02
_OUTLIER = 3.0  # standard deviations
_LIMIT = math.log(1000.0)  # no observation counts for more than this


class Correction:
    """Factors between profiled and expected times of the paths ``names`` on one executor.

    ``factors[name]`` is read freely; ``observe`` changes it. ``noise`` is the variance of a call's logarithm.
    Times are seconds on any one clock.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._place = {name: i for i, name in enumerate(names, start=1)}
        # The machine, then the paths' deviations. There are few: lists cost less than arrays.
        self._mean = [0.0] * (1 + len(self._place))
        first = [_PROFILED] + [_DEVIATION] * len(self._place)
        self._covariance = [[v if i == j else 0.0 for j in range(len(first))] for i, v in enumerate(first)]
        self._known = _PROFILED  # the machine's variance when last observed
        self._seen = -math.inf
        self._suspect = 0.0  # the last observation's distance, if it was an outlier
        self.noise = _NOISE
        self.factors = dict.fromkeys(self._place, 1.0)

    def spread(self, now: float, calls: float = 1.0) -> float:
        """Standard deviation of the logarithm of the next call's time, or of the mean of several, around the
        expected one."""
        older = _WANDER * (now - self._seen) if now > self._seen else 0.0
        return math.sqrt(self.noise / calls + min(_UNKNOWN, self._known + older))

    def observe(self, name: str, ratio: float, now: float) -> None:
        """A call of path ``name`` that ended at ``now`` took ``ratio`` times what the profile says.

        Ratios that are not positive and finite are ignored. A clock that was set back counts as one that
        stood still. ``KeyError`` for an unknown path.
        """
        i = self._place[name]
        if not 0.0 < ratio < math.inf:
            return
        self._age(now)
        mean, covariance = self._mean, self._covariance
        off = max(-_LIMIT, min(_LIMIT, math.log(ratio))) - (mean[0] + mean[i])
        total = covariance[0][0] + 2 * covariance[0][i] + covariance[i][i] + self.noise
        bound = _OUTLIER * math.sqrt(total)
        if abs(off) <= bound:
            self._suspect = 0.0
            low, high = _NOISE_RANGE
            self.noise = min(high, max(low, self.noise + _NOISE_GAIN * (off * off - total)))
        elif off * self._suspect > 0:
            off, self._suspect = min(off, self._suspect, key=abs), 0.0
            covariance[0][0] += off * off
            total += off * off
        else:
            self._suspect, off = off, math.copysign(bound, off)
        gain = [a + b for a, b in zip(covariance[0], covariance[i], strict=True)]
        for j, each in enumerate(gain):
            part = each / total
            mean[j] += part * off
            covariance[j] = [c - part * g for c, g in zip(covariance[j], gain, strict=True)]
        self._known = covariance[0][0] + 2 * covariance[0][i] + covariance[i][i]
        self.factors = {name: math.exp(mean[0] + mean[j]) for name, j in self._place.items()}

    def _age(self, now: float) -> None:
        """Bring what is known to ``now``."""
        if self._seen == -math.inf:
            self._seen = now
        elapsed = max(now - self._seen, 0.0)
        self._seen = now
        kept = math.exp(-elapsed / _REVERSION_S)
        rows = self._covariance
        first = [rows[0][0]] + [kept * c for c in rows[0][1:]]
        first[0] = min(_UNKNOWN, first[0] + _WANDER * elapsed)
        fresh, square = (1 - kept * kept) * _DEVIATION, kept * kept
        for j in range(1, len(rows)):
            self._mean[j] *= kept
            rows[j] = [first[j]] + [square * c for c in rows[j][1:]]
            rows[j][j] += fresh
        rows[0] = first
