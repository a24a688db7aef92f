"""What a second of an executor's time and a waiting sample are worth, by a linear program.

Path p on executor e answers one sample in tau[e, p] seconds with quality q[e, p]. If samples come at a rate
R, the most quality per second of any mixture x[e, p] (samples per second) is the linear program

    maximise    sum q[e, p] x[e, p]
    subject to  sum over p of tau[e, p] x[e, p] <= 1    for each e     (price of a second: lambda[e])
                sum over e, p of x[e, p]        <= R                   (value of a sample: v)

Its dual has one free number, since a given v fixes every price:

    lambda[e] = max over p of (q[e, p] - v) / tau[e, p],  but at least 0

v falls as R rises: below the capacity of the best paths a sample is worth its full quality and time is worth
nothing; above the capacity of the fastest ones another sample is worth nothing, and a second is worth the
greatest goodput. Between them v has a few steps. They are found once, so that a price costs one search.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from itertools import combinations

__all__ = ["FluidPrice"]


class FluidPrice:
    """Dual prices of the program above. ``executors[e]`` lists (quality, seconds per sample) of e's paths.

    ``best`` is the greatest quality, ``capacity`` the greatest rate of which nothing need be refused,
    ``goodput`` the most quality per second.
    """

    def __init__(self, executors: Sequence[Sequence[tuple[float, float]]]) -> None:
        self._executors = [[(q, tau) for q, tau in paths if tau < math.inf] for paths in executors]
        points = {q for paths in self._executors for q, _ in paths if q > 0}
        for paths in self._executors:
            for (q, tau), (other_q, other_tau) in combinations(paths, 2):
                if tau != other_tau:
                    point = (q * other_tau - other_q * tau) / (other_tau - tau)
                    if point > 0:
                        points.add(point)
        self._values, self._rates = [], []
        points = sorted(points, reverse=True)
        for value, below in zip(points, [*points[1:], 0.0], strict=True):
            rate = self._served((value + below) / 2)
            if not self._rates or rate > self._rates[-1]:
                self._values.append(value)
                self._rates.append(rate)
        self._values.append(0.0)
        self.best = max(points, default=0.0)  # the value of a sample where there is time for all
        self.goodput = sum(self.second(e, 0.0) for e in range(len(executors)))
        self.capacity = sum(1 / min(tau for _, tau in paths) for paths in self._executors if paths)

    def sample(self, rate: float) -> float:
        """Value v of one more sample where samples come at ``rate`` per second."""
        return self._values[bisect_left(self._rates, rate)]

    def second(self, executor: int, value: float) -> float:
        """Price of a second of ``executor`` where a sample is worth ``value``."""
        return max((max(q - value, 0.0) / tau for q, tau in self._executors[executor]), default=0.0)

    def quality_per_second(self, rate: float) -> float:
        """The program's optimum: no mixture of paths has more, however it is scheduled."""
        value = self.sample(rate)
        return sum(self.second(e, value) for e in range(len(self._executors))) + rate * value

    def _served(self, value: float) -> float:
        """Samples per second if every executor takes its best path at this value."""
        rate = 0.0
        for paths in self._executors:
            gains = [((q - value) / tau, tau) for q, tau in paths if q > value]
            if gains:
                rate += 1 / max(gains)[1]
        return rate
