"""What arrives: how many samples per second, how unevenly, in queries of which sizes, with how much time
left.

All averages fade with time, measured in latency targets (SLAs): these are the times that decide.
"""

from __future__ import annotations

import math

__all__ = ["Traffic"]

_SLOW_SLAS, _FAST_SLAS = 10.0, 2.0  # over which arrivals are averaged: steadily, and to notice a burst
_WINDOW_SLAS = 2.0  # in which arrivals are counted for their variance
_WINDOWS, _FEW_WINDOWS = 64, 16  # over which that is averaged, and needed to trust it
_SIZES = 64  # queries remembered
_LEAST_S = 1e-6


class Traffic:
    """``sla`` is the mean time to deadline of queries, ``query_size`` their mean size, ``sizes`` the sizes of
    the last queries. ``burst_size`` is the mean size of the query that a random sample belongs to.
    """

    def __init__(self) -> None:
        self.sla = 0.0
        self.query_size = self.burst_size = 1.0
        self.sizes: list[int] = []
        self.arrivals = 0
        self._slow, self._fast = _Rate(), _Rate()
        self._dispersion = _Dispersion()

    def count(self, now: float, size: int, left: float) -> None:
        """A query of ``size`` samples arrives with ``left`` seconds to its deadline."""
        left = max(left, _LEAST_S)
        self.sla += (left - self.sla) * (0.05 if self.arrivals else 1.0)
        self._slow.count(now, size, _SLOW_SLAS * self.sla)
        self._fast.count(now, size, _FAST_SLAS * self.sla)
        self._dispersion.count(now, size, _WINDOW_SLAS * self.sla)
        if self.arrivals < _SIZES:
            self.sizes.append(size)
        else:
            self.sizes[self.arrivals % _SIZES] = size
        self.arrivals += 1
        if self.arrivals % 16 == 0 or self.arrivals == 1:
            total = sum(self.sizes)
            self.query_size = total / len(self.sizes)
            self.burst_size = sum(size * size for size in self.sizes) / total

    def rate(self, now: float) -> float:
        """Samples per second: the steady average, or the quick one where it is greater by more than its
        standard deviation."""
        if not self.arrivals:
            return 0.0
        slow, fast = self._slow.at(now), self._fast.at(now)
        if fast <= slow:
            return slow
        return max(slow, fast * (1 - math.sqrt(self.burst_size / (2 * self._fast.memory_s * fast))))

    @property
    def dispersion(self) -> float:
        """Variance over mean of the samples that arrive in a window. ``burst_size`` where queries arrive
        independently, more where they come in bursts."""
        return max(self.burst_size, self._dispersion.samples)


class _Rate:
    """Samples per second, with weights that fall by e in ``memory_s`` seconds. What came before the first
    sample counts as a silence of ``memory_s / 4``."""

    def __init__(self) -> None:
        self.memory_s = 0.0
        self._sum = self._weight = 0.0
        self._at: float | None = None

    def count(self, now: float, samples: int, memory_s: float) -> None:
        if self._at is None:
            self._at, self._weight = now, memory_s / 4
        self.memory_s = memory_s
        self._fade(now)
        self._sum += samples

    def at(self, now: float) -> float:
        self._fade(now)
        return self._sum / self._weight

    def _fade(self, now: float) -> None:
        if now > self._at:
            kept = math.exp((self._at - now) / self.memory_s)
            self._sum *= kept
            self._weight = self._weight * kept + self.memory_s * (
                1 - kept
            )  # the time that the sum stands for
            self._at = now


class _Dispersion:
    """Variance over mean of the samples in a window."""

    def __init__(self) -> None:
        self._start: float | None = None
        self._here = 0
        self._mean = self._square = 0.0
        self._windows = 0

    def count(self, now: float, samples: int, window_s: float) -> None:
        if self._start is None:
            self._start = now
        passed = (now - self._start) / window_s
        if passed >= 1:
            for here in [self._here] + [0] * min(int(passed) - 1, _WINDOWS):
                self._windows += 1
                gain = 1 / min(self._windows, _WINDOWS)
                self._mean += gain * (here - self._mean)
                self._square += gain * (here * here - self._square)
            self._start, self._here = now, 0
        self._here += samples

    @property
    def samples(self) -> float:
        """0 before a few windows are over."""
        if self._windows < _FEW_WINDOWS or not self._mean:
            return 0.0
        return max(self._square - self._mean**2, 0.0) / self._mean
