"""When queries arrive in a simulation, and how large they are.

Arrivals are Poisson with a rate that is constant, jumps (*bursty*) or swings (*diurnal*); over whole periods
its mean is the rate asked for.
"""

from __future__ import annotations

import math

import numpy as np

from mprec.serving.loadtest import QuerySizes

__all__ = ["ARRIVALS", "LEAST_SLAS", "draw"]

ARRIVALS = ("poisson", "bursty", "diurnal")
#: A load must last so many SLAs: in a shorter one the queue, as long as the SLA, hides overload.
LEAST_SLAS = 8
_BURST_S = 0.2  # half of it at 1.8 times the rate, half at 0.2 times
_SWING = 0.8  # of the diurnal rate, up and down, over one period: the whole load


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

    ``sizes``: of the queries (None: ``QuerySizes()``). ``most``: shorten the load so that no more than about
    so many queries are expected, though not to less than ``least_s``. ``ValueError`` for unknown arrivals, or
    a rate or duration that is not positive and finite.
    """
    if arrivals not in ARRIVALS:
        raise ValueError(f"arrivals: expected one of {', '.join(ARRIVALS)}, got {arrivals!r}")
    for name, value in (("qps", qps), ("seconds", seconds)):
        if not 0 < value < math.inf:
            raise ValueError(f"{name}: expected a finite number above 0, got {value!r}")
    if most is not None:
        seconds = min(seconds, max(most / qps, least_s))
    rng = np.random.default_rng(seed)
    # Thinning (Lewis and Shedler): draw at the greatest rate, keep an arrival with its rate's share of that.
    peak = {"poisson": 1.0, "bursty": 1.8, "diurnal": 1.0 + _SWING}[arrivals]
    times = np.sort(rng.uniform(0.0, seconds, max(1, rng.poisson(peak * qps * seconds))))
    if arrivals == "bursty":
        period = min(_BURST_S, seconds)
        rate = np.where(times % period < period / 2, 1.8, 0.2)
    elif arrivals == "diurnal":
        rate = 1 - _SWING * np.cos(2 * np.pi * times / seconds)
    else:
        rate = np.ones(len(times))
    times = times[rng.uniform(0.0, peak, len(times)) < rate]
    if not len(times):
        times = np.array([0.0])
    return times, (sizes or QuerySizes()).draw(len(times), rng)
