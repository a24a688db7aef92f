import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad

from mprec.dispatch.scheduler import Latest, Overflow


@settings(deadline=None)
@given(st.floats(0.05, 3.0), st.floats(1e-5, 1e-2), st.floats(0, 0.02), st.floats(0, 0.02))
def test_lost_work_is_the_integral_of_the_chance_to_overflow(load, grain, backlog, more):
    bound = 0.01
    theta = max(-30.0, min(30.0, 2 * (1 - load) * bound / (load * grain))) / bound

    def chance(w):
        if w >= bound:
            return 1.0
        if abs(theta * bound) < 1e-3:
            return w / bound
        return math.expm1(theta * w) / math.expm1(theta * bound)

    wanted = quad(chance, backlog, backlog + more, points=[bound], epsabs=1e-12, limit=200)[0]
    assert Overflow(load, grain, bound).lost(backlog, more) == pytest.approx(wanted, rel=1e-3, abs=1e-9)


@pytest.mark.parametrize("load", [0.7, 1.0, 1.2])
def test_the_chance_is_that_of_a_random_walk(load):
    """Work that arrives in grains, one at a time, against a server that works all the time."""
    rng = np.random.default_rng(1)
    grain, bound, start, more = 0.05, 1.0, 0.4, 0.02
    hits, walks = 0, 4000
    work = np.full(walks, start)
    alive = np.ones(walks, bool)
    while alive.any():
        gaps = rng.exponential(grain / load, walks)
        work = np.where(alive, work - gaps, work)
        alive &= work > 0
        work = np.where(alive, work + grain, work)
        full = alive & (work >= bound)
        hits += full.sum()
        alive &= ~full
    lost = Overflow(load, grain, bound).lost(start - more / 2, more)
    assert lost / more == pytest.approx(hits / walks, abs=0.06)


def test_work_that_takes_no_longer_loses_nothing():
    assert Overflow(0.5, 1e-3, 0.01).lost(0.005, -1.0) == 0.0


@settings(deadline=None)
@given(st.lists(st.integers(1, 1000), min_size=1, max_size=20), st.floats(0, 0.03))
def test_missed_time_is_the_mean_over_samples_that_arrive(sizes, taken):
    sla, spread = 0.01, 0.2
    seconds = [1e-4 + 5e-6 * size for size in sizes]
    wanted = 0.0
    for size, each in zip(sizes, seconds, strict=True):
        for z in (-1.09, 0.0, 1.09):
            start = sla - each * math.exp(z * spread)
            if start > 0:
                wanted += size / (3 * sum(sizes)) * max(taken - start, 0.0)
    assert Latest(seconds, sizes, sla, spread).missed(taken) == pytest.approx(wanted, abs=1e-12)
