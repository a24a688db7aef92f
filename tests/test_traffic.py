import numpy as np
import pytest

from mprec.dispatch.scheduler import Traffic


def stream(rate, seconds, seed=0, sizes=(64,), start=0.0):
    rng = np.random.default_rng(seed)
    now = start
    while (now := now + rng.exponential(1 / rate)) < start + seconds:
        yield now, int(rng.choice(sizes))


def test_rate_sizes_and_sla_of_a_steady_stream():
    traffic = Traffic()
    rates = []
    for now, size in stream(2000, 3.0, sizes=(32, 96)):
        traffic.count(now, size, 0.01)
        rates.append(traffic.rate(now))
    assert np.mean(rates[200:]) == pytest.approx(2000 * 64, rel=0.15)
    assert traffic.sla == pytest.approx(0.01)
    assert traffic.query_size == pytest.approx(64, rel=0.2)
    assert traffic.burst_size == pytest.approx((32**2 + 96**2) / 128, rel=0.2)
    assert traffic.dispersion == pytest.approx(traffic.burst_size, rel=0.6)


def test_a_burst_is_noticed_within_two_slas_and_silence_is_believed():
    traffic = Traffic()
    for now, size in stream(200, 1.0):
        traffic.count(now, size, 0.01)
    for now, size in stream(4000, 0.02, start=1.0):
        traffic.count(now, size, 0.01)
    assert traffic.rate(now) > 0.4 * 4000 * 64
    assert traffic.rate(now + 1.0) < 0.01 * 4000 * 64


def test_bursts_show_in_the_dispersion():
    steady, bursty = Traffic(), Traffic()
    for now, size in stream(1000, 4.0):
        steady.count(now, size, 0.01)
    for second in range(40):
        rate = 1900 if second % 2 else 100
        for now, size in stream(rate, 0.1, seed=second, start=0.1 * second):
            bursty.count(now, size, 0.01)
    assert bursty.dispersion > 4 * steady.dispersion


def test_before_anything_came():
    assert Traffic().rate(1.0) == 0.0
