import numpy as np
import pytest
from scheduling import load, paths

from mprec.simulate import SimulatedExecutor, SimulatedPath, simulate


def one(seconds, quality=0.5, size=10):
    return [SimulatedExecutor("cpu", [SimulatedPath("p", quality, [seconds] * (size + 1))])]


def test_a_queue_with_fixed_times_is_that_of_queueing_theory():
    """M/D/1 with batches of one: the mean wait is rho s / (2 (1 - rho)) (Pollaczek and Khinchine)."""
    rng = np.random.default_rng(0)
    service, rho = 1e-3, 0.7
    times = np.cumsum(rng.exponential(service / rho, 60_000))
    result = simulate(
        one(service, size=1), times, np.ones(60_000, int), sla_s=1.0, noise=0.0, max_batch=1, admission=False
    )
    wait = result.latencies.mean() - service
    assert wait == pytest.approx(rho * service / (2 * (1 - rho)), rel=0.05)
    assert result.utilisation["cpu"] == pytest.approx(rho, rel=0.02)
    assert result.correct_per_s == pytest.approx(0.5 * rho / service, rel=0.02)


def test_equal_seeds_give_equal_results():
    times, sizes = load("three", 0.7, 0.3)
    executors = [SimulatedExecutor("cpu", paths("three"))]
    a, b, c = (simulate(executors, times, sizes, sla_s=0.01, seed=seed) for seed in (1, 1, 2))
    assert a.correct_per_s == b.correct_per_s
    assert (a.latencies == b.latencies).all()
    assert (a.latencies != c.latencies).any()


def test_every_query_is_counted_once():
    times, sizes = load("three", 2.0, 0.3)
    result = simulate([SimulatedExecutor("cpu", paths("three"))], times, sizes, sla_s=0.01)
    answered = np.isfinite(result.latencies)
    assert sum(result.samples.values()) == sizes[answered].sum()
    assert result.refused == pytest.approx(1 - answered.mean())
    assert result.missed == pytest.approx(1 - (result.latencies <= 0.01).mean())


def test_work_of_the_engine_counts():
    """Where each query costs more than its path does, fewer are served, and the scheduler knows it."""
    ratios = []
    for seed in range(4):
        times, sizes = load("three", 0.9, 0.5, seed=seed)
        executors = [SimulatedExecutor("cpu", paths("three"))]
        without = simulate(executors, times, sizes, sla_s=0.01)
        slower = simulate(executors, times, sizes, sla_s=0.01, query_s=3e-4)
        assert slower.correct_per_s < 0.9 * without.correct_per_s
        assert slower.late < 0.02
        one = [SimulatedExecutor("cpu", paths("three")[:1])]
        alone = simulate(one, times, sizes, sla_s=0.01, query_s=3e-4)
        ratios.append(slower.correct_per_s / alone.correct_per_s)
    assert np.mean(ratios) > 0.975


def test_slas_may_differ_by_query():
    times, sizes = np.array([0.0, 0.0, 0.0]), np.array([10, 10, 10])
    result = simulate(one(1e-3), times, sizes, sla_s=np.array([1.0, 0.0025, 0.5]), noise=0.0, max_batch=10)
    assert (result.latencies * 1e3).round().tolist() == [1, 2, 3]
    with pytest.raises(ValueError, match="times and sizes"):
        simulate(one(1e-3), times, sizes[:2], sla_s=1.0)
