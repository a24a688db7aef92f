"""Arrival processes against what is known of their means and dispersions."""

import subprocess
import sys

import numpy as np
import pytest

from mprec.arrivals import Bursty, Diurnal, NormalSizes, Poisson, QuerySizes, Steps, Trace, arrivals_from

SECONDS = 400.0


def dispersion(times, window_s):
    """Variance over mean of the counts in windows: 1 for a Poisson process."""
    counts = np.histogram(times, np.arange(0.0, SECONDS + window_s / 2, window_s))[0]
    return counts.var() / counts.mean()


@pytest.mark.parametrize(
    "make", [Poisson, Bursty, Diurnal, lambda rate: Steps((0.5 * rate, 1.5 * rate), 1.0)]
)
def test_times_rise_within_the_duration_at_the_mean_rate_and_are_repeatable(make):
    process = make(200.0)
    times = process.times(SECONDS, np.random.default_rng(1))
    assert times.dtype == np.float64
    assert (np.diff(times) >= 0).all()
    assert times[0] >= 0
    assert times[-1] < SECONDS
    assert process.rate == 200.0
    assert len(times) / SECONDS == pytest.approx(200.0, rel=0.04)
    np.testing.assert_array_equal(times, process.times(SECONDS, np.random.default_rng(1)))


def test_poisson_gaps_are_exponential():
    gaps = np.diff(Poisson(100.0).times(SECONDS, np.random.default_rng(0)))
    assert gaps.mean() == pytest.approx(0.01, rel=0.03)
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.03)
    assert dispersion(Poisson(100.0).times(SECONDS, np.random.default_rng(0)), 0.5) == pytest.approx(
        1, abs=0.2
    )


def test_bursts_are_dispersed_as_the_two_states_say():
    """The index of dispersion of a two-state process over long windows (Fischer and Meier-Hellstern, 1993):
    1 + 2 p q (high - low)^2 / (mean (1 / burst_s + 1 / calm_s)), p and q being the states' shares."""
    process = Bursty(200.0, peak=2.0, burst_s=0.1, calm_s=0.2)
    high, low, p = 400.0, 100.0, 1 / 3
    expected = 1 + 2 * p * (1 - p) * (high - low) ** 2 / (200.0 * (1 / 0.1 + 1 / 0.2))
    found = dispersion(process.times(SECONDS, np.random.default_rng(2)), 2.0)
    assert found == pytest.approx(expected, rel=0.25)
    assert expected > 10


def test_a_day_has_its_trough_at_the_ends():
    times = Diurnal(100.0, swing=0.8).times(SECONDS, np.random.default_rng(3))
    counts = np.histogram(times, np.linspace(0, SECONDS, 41))[0] / (SECONDS / 40)
    middles = (np.arange(40) + 0.5) / 40
    np.testing.assert_allclose(counts, 100 * (1 - 0.8 * np.cos(2 * np.pi * middles)), atol=18)


def test_steps_keep_their_rates():
    times = Steps((50.0, 250.0), 10.0).times(SECONDS, np.random.default_rng(4))
    low = (times % 20) < 10
    assert low.sum() / (SECONDS / 2) == pytest.approx(50, rel=0.05)
    assert (~low).sum() / (SECONDS / 2) == pytest.approx(250, rel=0.05)


def test_a_trace_is_scaled_and_begins_again(tmp_path):
    file = tmp_path / "trace.csv"
    file.write_text("seconds,user\n10,a\n10.5,b\n12,c\n")
    rng = np.random.default_rng(0)
    np.testing.assert_allclose(Trace(file).times(5.0, rng), [0, 0.5, 2, 3, 3.5])
    assert Trace(file).rate == 1.0
    np.testing.assert_allclose(arrivals_from(f"trace:{file}", 2.0).times(1.6, rng), [0, 0.25, 1, 1.5])


@pytest.mark.parametrize(
    ("text", "message"),
    [("1\nx\n", "line 2"), ("1\nnan\n", "line 2"), ("", "two different"), ("3\n3\n", "two different")],
)
def test_a_bad_trace_is_refused(tmp_path, text, message):
    file = tmp_path / "trace"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        Trace(file)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Poisson(0.0), "rate"),
        (lambda: Poisson(float("nan")), "rate"),
        (lambda: Poisson(1.0).times(0.0, None), "seconds"),
        (lambda: Bursty(1.0, peak=3.5), "peak"),
        (lambda: Diurnal(1.0, swing=1.1), "swing"),
        (lambda: Steps((), 1.0), "rates"),
        (lambda: Steps((1.0, -1.0), 1.0), "rates"),
        (lambda: arrivals_from("often", 1.0), "arrivals.*'often'"),
        (lambda: arrivals_from("trace:", 1.0), "arrivals"),
        (lambda: NormalSizes(deviation=-1.0), "deviation"),
        (lambda: QuerySizes(mean=0), "mean"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_normal_sizes():
    sizes = NormalSizes().draw(50_000, np.random.default_rng(0))
    assert sizes.dtype == np.int64
    assert sizes.mean() == pytest.approx(165, rel=0.01)
    assert sizes.std() == pytest.approx(16, rel=0.02)
    assert NormalSizes(2.0, 50.0, 10).draw(1000, np.random.default_rng(0)).min() == 1


def test_neither_torch_nor_the_engine_is_imported():
    code = "import sys, mprec.arrivals; print(sorted({'torch', 'mprec.serving'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_sizes_are_lognormal_with_the_mean_asked_for():
    sizes = QuerySizes(mean=128, sigma=0.5, largest=10**6).draw(200_000, np.random.default_rng(0))
    assert sizes.mean() == pytest.approx(128, rel=0.01)
    assert np.log(sizes).std() == pytest.approx(0.5, rel=0.02)
    clipped = QuerySizes(mean=128, sigma=2.0).draw(10_000, np.random.default_rng(0))
    assert (clipped.min(), clipped.max()) == (1, 1024)
    assert (QuerySizes(mean=7, sigma=0).draw(10, np.random.default_rng(0)) == 7).all()
