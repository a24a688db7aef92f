import math

import numpy as np
import pytest

from mprec.dispatch.scheduler import Correction


def feed(correction, name, factor, calls, now=0.0, gap=1e-3, noise=0.0, rng=None):
    for _ in range(calls):
        now += gap
        ratio = factor * (math.exp(rng.normal(0, noise)) if noise else 1.0)
        correction.observe(name, ratio, now)
    return now


def test_the_machine_s_factor_is_common_to_all_paths():
    correction = Correction(["a", "b"])
    feed(correction, "a", 3.0, 100)
    assert correction.factors["a"] == pytest.approx(3.0, rel=0.02)
    assert correction.factors["b"] == pytest.approx(3.0, rel=0.25)  # never seen, and not believed to be at 1


def test_a_path_may_differ_from_the_machine():
    correction = Correction(["a", "b"])
    now = 0.0
    for _ in range(300):
        now = feed(correction, "a", 1.0, 1, now)
        now = feed(correction, "b", 1.3, 1, now)
    assert correction.factors["a"] == pytest.approx(1.0, rel=0.03)
    assert correction.factors["b"] == pytest.approx(1.3, rel=0.03)


def test_what_a_path_differs_by_is_forgotten_with_time():
    correction = Correction(["a", "b"])
    now = 0.0
    for _ in range(300):
        now = feed(correction, "a", 1.0, 1, now)
        now = feed(correction, "b", 1.5, 1, now)
    assert correction.factors["b"] > 1.4
    feed(correction, "a", 1.0, 300, now, gap=0.1)
    assert correction.factors["b"] == pytest.approx(1.0, rel=0.05)


def test_noise_is_averaged_and_its_size_is_learnt():
    rng = np.random.default_rng(0)
    for noise in (0.05, 0.3):
        correction = Correction(["a"])
        now = feed(correction, "a", 1.0, 2000, noise=noise, rng=rng)
        assert math.sqrt(correction.noise) == pytest.approx(noise, rel=0.35)
        seen = []
        for _ in range(500):
            now = feed(correction, "a", 1.0, 1, now, noise=noise, rng=rng)
            seen.append(math.log(correction.factors["a"]))
        assert np.std(seen) < 0.4 * noise


def test_one_hiccup_moves_little_and_a_change_moves_at_once():
    correction = Correction(["a"])
    now = feed(correction, "a", 1.0, 200)
    now = feed(correction, "a", 50.0, 1, now)
    assert correction.factors["a"] < 1.2
    now = feed(correction, "a", 1.0, 50, now)
    assert correction.factors["a"] == pytest.approx(1.0, rel=0.05)
    now = feed(correction, "a", 50.0, 2, now)
    assert correction.factors["a"] == pytest.approx(50.0, rel=0.2)
    feed(correction, "a", 1.0, 2, now)
    assert correction.factors["a"] == pytest.approx(1.0, rel=0.2)


@pytest.mark.parametrize("first", [191.0, 2.7])
@pytest.mark.parametrize("pause", [0.0, 10.0])
def test_a_cold_first_call_is_not_blamed_on_its_path(first, pause):
    """Else a worse path would be taken for seconds after every pause."""
    correction = Correction(["a", "b"])
    now = feed(correction, "a", 1.0, 200) if pause else 0.0
    now = feed(correction, "a", first, 1, now + pause)
    now = feed(correction, "a", 1.0, 20, now)
    assert correction.factors["a"] == pytest.approx(1.0, rel=0.05)
    assert correction.factors["a"] / correction.factors["b"] == pytest.approx(1.0, abs=0.03)


def test_calls_that_get_warm_are_not_blamed_on_their_path():
    """Of two paths the better one is taken again and again, though after every pause it is slow at first."""
    rng = np.random.default_rng(0)
    wrong, profiled = 0, np.array([1.0, 1.09])
    for _ in range(20):
        correction, now = Correction(["a", "b"]), 0.0
        for _pause in range(5):
            now += 10.0
            slow, calls = rng.choice([1.5, 3, 20, 190]), rng.choice([0.3, 1, 3])
            for call in range(200):
                expected = profiled * list(correction.factors.values())
                best = int(expected[1] < 0.98 * expected[0])
                wrong += best
                now += 1e-3
                ratio = 0.9 * (1 + (slow - 1) * math.exp(-call / calls)) * math.exp(rng.normal(0, 0.06))
                correction.observe("ab"[best], ratio, now, seconds=1e-3)
    assert wrong < 0.03 * 20 * 5 * 200


def test_a_long_call_is_no_pause():
    slow, quick = Correction(["a"]), Correction(["a"])
    for i in range(50):
        slow.observe("a", 1.5, i + 0.999, seconds=0.999)
        quick.observe("a", 1.5, i + 0.999)
    assert slow.noise < 0.5 * quick.noise  # after a pause nothing is learnt about the noise


def test_predictions_grow_uncertain_while_nothing_is_seen():
    correction = Correction(["a"])
    now = feed(correction, "a", 1.0, 300)
    spreads = [correction.spread(now + silence) for silence in (0.0, 0.1, 1.0, 10.0, 100.0)]
    assert spreads == sorted(spreads)
    assert spreads[2] > 1.2 * spreads[0]
    assert spreads[-1] == spreads[-2]  # up to a bound


def test_what_is_no_time_is_ignored():
    correction = Correction(["a"])
    for ratio in (0.0, -1.0, math.nan, math.inf):
        correction.observe("a", ratio, 1.0)
    assert correction.factors == {"a": 1.0}
    with pytest.raises(KeyError):
        correction.observe("b", 1.0, 1.0)
    correction.observe("a", 2.0, 5.0)
    correction.observe("a", 2.0, 1.0)  # a clock that was set back
    assert math.isfinite(correction.factors["a"])
