"""What it costs others that an executor is taken for a while.

Two effects, both in seconds of work that is lost in the end:

- :class:`Overflow`: the queue grows, and may reach its bound before it is empty again.
- :class:`Latest`: a query that arrives meanwhile may come too late, however fast it is served then.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence

__all__ = ["Latest", "Overflow"]

_STEEPEST = 30.0  # exponent beyond which a chance is 0 or 1
_THIRDS = (-1.09, 0.0, 1.09)  # means of the thirds of a normal distribution


class Overflow:
    """Work lost at the queue's bound.

    A second of work that is added is made up for by the next idle time, unless the queue has grown to its
    bound before. With a compound Poisson stream seen as Brownian motion of drift ``load - 1`` and variance
    ``load * grain`` per second (``grain``: variance over mean of arriving work, in seconds), a queue of w
    seconds reaches the bound b before it is empty with chance

        (exp(theta w) - 1) / (exp(theta b) - 1),    theta = 2 (1 - load) / (load * grain)

    (gambler's ruin; see for example Karlin and Taylor, A Second Course in Stochastic Processes, chapter 15).
    """

    def __init__(self, load: float, grain: float, bound: float) -> None:
        exponent = 2 * (1 - load) * bound / max(load * grain, 1e-12)
        exponent = max(-_STEEPEST, min(_STEEPEST, exponent))
        self._bound, self._theta = bound, exponent / bound
        self._flat = abs(exponent) < 1e-3
        self._scale = 2 * bound if self._flat else math.expm1(exponent)

    def lost(self, backlog: float, more: float) -> float:
        """Seconds lost if ``backlog`` seconds of work wait and ``more`` are added: the chance's integral."""
        if more <= 0:
            return 0.0
        end = backlog + more
        beyond = 0.0
        if end > self._bound:
            beyond = end - max(self._bound, backlog)
            end = self._bound
            if backlog >= end:
                return beyond
        if self._flat:
            return beyond + (end * end - backlog * backlog) / self._scale
        grown = (math.exp(self._theta * end) - math.exp(self._theta * backlog)) / self._theta
        return beyond + (grown - (end - backlog)) / self._scale


class Latest:
    """How long executors may be taken before queries of the sizes that arrive cannot be met any more.

    ``seconds`` are times on the fastest path of a sample of queries, ``sizes`` their sizes, ``spread`` the
    deviation of the logarithm of such a time.
    """

    def __init__(self, seconds: Sequence[float], sizes: Sequence[int], sla: float, spread: float) -> None:
        factors = [math.exp(z * spread) for z in _THIRDS]
        total = len(factors) * sum(sizes)
        starts = sorted(
            (sla - each * factor, size / total)
            for each, size in zip(seconds, sizes, strict=True)
            for factor in factors
        )
        self._starts: list[float] = []
        self._sums = [(0.0, 0.0)]  # of weights, and of weights times starts
        for start, weight in starts:
            if start > 0:  # others are lost in any case
                before, moment = self._sums[-1]
                self._starts.append(start)
                self._sums.append((before + weight, moment + weight * start))

    def missed(self, seconds: float) -> float:
        """Mean over arriving samples of the time in which an arrival is lost, if executors are taken so
        long."""
        weight, moment = self._sums[bisect_right(self._starts, seconds)]
        return weight * seconds - moment
