"""Loads and paths for tests of the scheduler in virtual time."""

import math

import numpy as np

from mprec.dispatch.scheduler import FluidPrice
from mprec.simulate import SimulatedExecutor, SimulatedPath, simulate

MAX_BATCH = 2048
# name -> (quality, seconds per batch, seconds per sample)
SYSTEMS = {
    "three": {"fast": (0.700, 60e-6, 2.5e-6), "mid": (0.708, 120e-6, 7e-6), "best": (0.716, 300e-6, 22e-6)},
    "close": {"fast": (0.720, 80e-6, 3.0e-6), "best": (0.722, 100e-6, 3.6e-6)},
    "far": {"fast": (0.700, 50e-6, 1.0e-6), "best": (0.730, 500e-6, 30e-6)},
}


def paths(system, wrong=1.0):
    """The system's paths; calls take ``wrong`` times what the scheduler is told."""
    made = []
    for name, (quality, fixed, each) in SYSTEMS[system].items():
        curve = fixed + each * np.arange(MAX_BATCH + 1)
        made.append(SimulatedPath(name, quality, curve.tolist(), (wrong * curve).tolist()))
    return made


def load(system, share, seconds, seed=0, wrong=1.0, bursty=False, most=30_000):
    """Arrival times and lognormal sizes at ``share`` of the fastest path's capacity."""
    rng = np.random.default_rng(seed)
    sizes = np.clip(rng.lognormal(math.log(128) - 0.5, 1.0, most), 1, 1024).astype(int)
    fixed, each = min((path[1:] for path in SYSTEMS[system].values()), key=lambda cost: cost[1])
    rate = share / wrong / (fixed / 4 + each * sizes.mean())
    if bursty:  # 0.2 s at 1.8 times the rate, 0.2 s at 0.2 times, on average
        times, now, high = [], 0.0, True
        while now < seconds and len(times) < most:
            end = now + rng.exponential(0.2)
            while now < end and len(times) < most:
                now += rng.exponential(1 / (rate * (1.8 if high else 0.2)))
                times.append(now)
            high = not high
        times = np.array(times)
    else:
        times = np.cumsum(rng.exponential(1 / rate, most))
    count = min(max(int(np.searchsorted(times, seconds)), 2000), len(times))
    return times[:count], sizes[:count]


def contest(system, times, sizes, wrong=1.0, **options):
    """(the dispatcher's result, the best static path's)."""
    made = paths(system, wrong)
    statics = [simulate([SimulatedExecutor("cpu", [path])], times, sizes, **options) for path in made]
    chosen = simulate([SimulatedExecutor("cpu", made)], times, sizes, **options)
    return chosen, max(statics, key=lambda result: result.correct_per_s)


def fluid_bound(system, times, sizes, wrong=1.0):
    """The most correct predictions per second of any mixture of paths, in batches of 400."""
    columns = [(q, wrong * (fixed + 400 * each) / 400) for q, fixed, each in SYSTEMS[system].values()]
    return FluidPrice([columns]).quality_per_second(sizes.sum() / (times[-1] - times[0]))
