"""The load of a simulation: arrivals and query sizes of :mod:`mprec.arrivals`, no longer than need be."""

from __future__ import annotations

import math

import numpy as np

from mprec.arrivals import QuerySizes, arrivals_from

__all__ = ["ARRIVALS", "LEAST_SLAS", "draw"]

ARRIVALS = ("poisson", "bursty", "diurnal")
#: A load must last so many SLAs: in a shorter one the queue, as long as the SLA, hides overload.
LEAST_SLAS = 8


def draw(
    arrivals: str,
    qps: float,
    seconds: float,
    *,
    sizes: QuerySizes | None = None,
    most: int | None = None,
    least_s: float = 0.0,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """(times float64 [n], rising seconds; sizes int64 [n], samples) of about ``qps * seconds`` queries.

    ``arrivals`` as for :func:`mprec.arrivals.arrivals_from`. ``sizes``: of the queries (None:
    ``QuerySizes()``). ``most``: shorten the load so that no more than about so many queries are expected,
    though not to less than ``least_s``. ``ValueError`` for unknown arrivals, or a rate or duration that is
    not positive and finite.
    """
    for name, value in (("qps", qps), ("seconds", seconds)):
        if not 0 < value < math.inf:
            raise ValueError(f"{name}: expected a finite number above 0, got {value!r}")
    if most is not None:
        seconds = min(seconds, max(most / qps, least_s))
    rng = np.random.default_rng(seed)
    times = arrivals_from(arrivals, qps).times(seconds, rng)
    if not len(times):
        times = np.array([0.0])
    return times, (sizes or QuerySizes()).draw(len(times), rng)
