import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from mprec.dispatch.scheduler import FluidPrice

columns = st.lists(
    st.lists(st.tuples(st.floats(0.1, 1.0), st.floats(1e-7, 1e-4)), min_size=1, max_size=4),
    min_size=1,
    max_size=3,
)


def optimum(executors, rate):
    """The linear program, solved by scipy."""
    flat = [(e, q, tau) for e, paths in enumerate(executors) for q, tau in paths]
    limits = [[tau if e == k else 0.0 for e, _, tau in flat] for k in range(len(executors))]
    limits.append([1.0] * len(flat))
    # Samples are counted in units of the rate, to keep the program's numbers near one.
    a = np.array(limits) * np.array([rate] * len(executors) + [1.0])[:, None]
    result = linprog([-q for _, q, _ in flat], A_ub=a, b_ub=[1.0] * len(a))
    return -result.fun * rate


@settings(deadline=None, max_examples=200)
@given(columns, st.floats(1e3, 1e8))
def test_the_optimum_is_the_linear_program_s(executors, rate):
    price = FluidPrice(executors)
    assert price.quality_per_second(rate) == pytest.approx(optimum(executors, rate), rel=1e-6)


@settings(deadline=None)
@given(columns, st.lists(st.floats(1.0, 1e9), min_size=2, max_size=20))
def test_a_sample_is_worth_less_the_more_come(executors, rates):
    price = FluidPrice(executors)
    values = [price.sample(rate) for rate in sorted(rates)]
    assert values == sorted(values, reverse=True)
    seconds = [price.second(0, value) for value in values]
    assert seconds == sorted(seconds)


def test_idle_time_has_no_price_and_overload_is_paid_by_goodput():
    price = FluidPrice([[(0.70, 2.5e-6), (0.72, 2e-5)]])
    assert price.sample(1e3) == price.best == 0.72
    assert price.second(0, 0.72) == 0.0
    assert price.capacity == pytest.approx(1 / 2.5e-6)
    assert price.sample(2 * price.capacity) == 0.0
    assert price.second(0, 0.0) == price.goodput == pytest.approx(0.70 / 2.5e-6)
    # Between the two capacities both paths are on the optimal face: their reduced profits vanish together.
    value = price.sample(2e5)
    second = price.second(0, value)
    assert 0.70 - value - second * 2.5e-6 == pytest.approx(0, abs=1e-12)
    assert 0.72 - value - second * 2e-5 == pytest.approx(0, abs=1e-12)


def test_a_path_that_is_worse_in_everything_sets_no_price():
    """The lines of two paths, one of them dominated, cross above the best quality, where nobody is."""
    price = FluidPrice([[(0.72, 2e-6), (0.71, 2.1e-6)]])
    assert price.best == price.sample(1e3) == 0.72


def test_paths_that_cannot_run_count_for_nothing():
    price = FluidPrice([[(0.9, math.inf), (0.7, 1e-5)], [(0.8, 1e-5)]])
    assert price.best == 0.8
    assert price.capacity == pytest.approx(2e5)
