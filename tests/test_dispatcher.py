import itertools
import math
import random
import sys

import pytest
from dispatch_fakes import fake_path, fake_profile
from hypothesis import given, settings
from hypothesis import strategies as st

from mprec.dispatch import Dispatcher

COSTS = {"table": (50e-6, 1e-6), "dhe": (200e-6, 8e-6), "hybrid": (260e-6, 10e-6)}
QUALITY = {"table": 0.78, "dhe": 0.79, "hybrid": 0.795}


def dispatcher(costs=COSTS, quality=QUALITY, **options):
    paths = [fake_path(name, quality[name], *cost) for name, cost in costs.items()]
    return Dispatcher(paths, fake_profile(costs), **options)


@pytest.mark.parametrize(
    ("batch_size", "sla_s", "queued_s", "expected"),
    [
        (1, 1e-3, 0.0, "hybrid"),
        (128, 2e-3, 0.0, "hybrid"),
        (128, 1.7e-3, 0.0, "dhe"),
        (128, 2e-3, 0.4e-3, "dhe"),
        (128, 1e-3, 0.0, "table"),
        (2048, 1e-3, 0.0, "table"),  # none meets: the fastest
        (128, math.inf, 0.0, "hybrid"),
        (128, 0.0, 0.0, "table"),
        (100_000, 1.5, 0.0, "hybrid"),  # above the profile's grid
        (100_000, 0.2, 0.0, "table"),
    ],
)
def test_known_choices(batch_size, sla_s, queued_s, expected):
    assert dispatcher().choose(batch_size, sla_s, queued_s).name == expected


costs = st.tuples(st.floats(1e-6, 1e-3), st.floats(0, 1e-5))
groups = st.lists(st.tuples(costs, st.sampled_from([0.7, 0.75, 0.8])), min_size=1, max_size=6)
sizes = st.one_of(st.integers(1, 2048), st.integers(2049, 10**6))


def build(group):
    names = [f"p{i}" for i in range(len(group))]
    return dispatcher(
        {name: cost for name, (cost, _) in zip(names, group, strict=True)},
        {name: quality for name, (_, quality) in zip(names, group, strict=True)},
    )


def scramble(d, seed):
    """Some history, so that corrections are not all 1."""
    rng = random.Random(seed)
    for _ in range(30):
        path = rng.choice(d.paths).name
        d.observe(path, rng.randint(1, 4096), d.predict(64, path) * math.exp(rng.gauss(0, 1)))


@settings(deadline=None)
@given(groups, sizes, st.floats(0, 1), st.floats(0, 0.01), st.integers(0, 9), st.none() | st.floats(0, 1))
def test_choice_is_the_best_that_meets_else_the_fastest(group, size, sla, queued, seed, share):
    d = build(group)
    scramble(d, seed)
    explained = d.choose(size, sla, queued, unique_share=share, explain=True)
    assert d.choose(size, sla, queued, unique_share=share) is explained.path
    times = {p: d.predict(size, p.name, unique_share=share) for p in d.paths}
    meeting = [p for p in d.paths if times[p] <= sla - queued]
    chosen = explained.path
    if not meeting:
        assert times[chosen] == min(times.values())
    else:
        assert chosen in meeting
        best = max(p.quality for p in meeting)
        assert chosen.quality == best
        assert times[chosen] == min(times[p] for p in meeting if p.quality == best)


@settings(deadline=None)
@given(groups, sizes, st.floats(0, 0.1), st.floats(0, 0.1), st.floats(0, 0.01), st.integers(0, 9))
def test_quality_is_monotone_in_the_sla_once_it_can_be_met(group, size, sla, more, queued, seed):
    d = build(group)
    scramble(d, seed)
    tight, loose = (d.choose(size, s, queued, explain=True) for s in (sla, sla + more))
    if any(c.meets for c in tight.candidates):  # else the fastest was taken, whatever its quality
        assert loose.path.quality >= tight.path.quality


@settings(deadline=None)
@given(groups, sizes, st.floats(0, 0.1), st.floats(0, 0.05), st.floats(0, 0.05))
def test_waiting_is_the_same_as_a_tighter_sla(group, size, sla, queued, more):
    d = build(group)
    assert d.choose(size, sla + queued, queued) == d.choose(size, sla + queued - queued)
    tight, loose = (d.choose(size, sla, q, explain=True) for q in (queued + more, queued))
    if any(c.meets for c in tight.candidates):
        assert loose.path.quality >= tight.path.quality


def serve(d, batches, slow_from, slow_to, factor, sla_s=2e-3, seed=0):
    """Names chosen for batches of 128 while `hybrid` is slowed down by `factor` in a stretch of them."""
    rng, chosen = random.Random(seed), []
    for i in range(batches):
        name = d.choose(128, sla_s).name
        fixed, per_sample = COSTS[name]
        seconds = (fixed + per_sample * 128) * math.exp(rng.gauss(0, 0.03))
        if name == "hybrid" and slow_from <= i < slow_to:
            seconds *= factor
        d.observe(name, 128, seconds)
        chosen.append(name)
    return chosen


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("lasts", [60, 150, 700])
@pytest.mark.parametrize("factor", [3.0, 30.0])
def test_a_slowdown_moves_the_choice_within_50_batches_and_back_within_50_of_its_end(factor, lasts, seed):
    end = 100 + lasts
    chosen = serve(dispatcher(), end + 200, 100, end, factor, seed=seed)
    assert set(chosen[:100]) == {"hybrid"}
    away = chosen[100:end]
    assert away.index("dhe") < 50
    assert away[50:].count("hybrid") <= len(away[50:]) / 40 + 1  # tried again now and then, no more
    back = chosen[end:]
    assert back.index("hybrid") < 50
    assert set(back[back.index("hybrid") :]) == {"hybrid"}


def test_a_path_that_is_tried_and_found_slow_leaves_again_at_once():
    chosen = serve(dispatcher(), 1000, 0, 1000, 3.0)
    tries = [len(list(run)) for name, run in itertools.groupby(chosen) if name == "hybrid"]
    assert len(tries) > 10
    assert set(tries[1:]) == {1}


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.floats(0.5, 8.0), min_size=3, max_size=3),
    st.floats(0.2e-3, 4e-3),
    st.floats(0.0, 0.03),
    st.integers(0, 99),
)
def test_never_flaps(factors, sla_s, noise, seed):
    """Whatever the machine's true speed, a choice changes when it is learned, and then once per retry."""
    d, rng = dispatcher(), random.Random(seed)
    factor = dict(zip(COSTS, factors, strict=True))
    names = []
    for _ in range(600):
        name = d.choose(128, sla_s).name
        fixed, per_sample = COSTS[name]
        d.observe(name, 128, (fixed + 128 * per_sample) * factor[name] * math.exp(rng.uniform(-noise, noise)))
        names.append(name)
    steady = names[100:]
    switches = sum(a != b for a, b in itertools.pairwise(steady))
    assert switches <= 2 * 2 * (len(steady) / 40 + 1)  # there and back, of two paths that may be retried


def test_single_hiccups_and_small_noise_move_nothing():
    d = dispatcher()
    rng = random.Random(1)
    for i in range(500):
        assert d.choose(128, 2e-3).name == "hybrid"
        noise = 30.0 if i % 10 == 5 else math.exp(rng.gauss(0, 0.03))
        d.observe("hybrid", 128, (260e-6 + 1280e-6) * noise)
    assert set(d.corrections.values()) == {1.0}


def test_does_not_flap_at_the_edge():
    """A path whose observed time hovers about the target is not chosen and left in turn."""
    d = dispatcher()
    rng = random.Random(2)
    names = []
    for _ in range(300):
        name = d.choose(128, 2.05e-3).name
        names.append(name)
        fixed, per_sample = COSTS[name]
        d.observe(name, 128, (fixed + 128 * per_sample) * math.exp(rng.gauss(0.05, 0.08)))
    switches = sum(a != b for a, b in itertools.pairwise(names))
    assert switches <= 12


def test_paths_that_do_not_take_a_batch_size():
    costs = {"gemv": (1e-6, 5e-6), "gemm": (20e-6, 1e-6)}
    paths = [
        fake_path("gemv", 0.0, *costs["gemv"], supports=lambda size: size <= 4),
        fake_path("gemm", 0.0, *costs["gemm"], supports=lambda size: size <= 1024),
    ]
    d = Dispatcher(paths, fake_profile(costs))
    assert d.choose(1, 0.0).name == "gemv"
    assert d.choose(5, 0.0).name == "gemm"
    for explain in (False, True):
        with pytest.raises(ValueError, match="2000"):
            d.choose(2000, 1.0, explain=explain)


def with_share_effect():
    """A dispatcher that knows of `dhe` that it takes half the time where a quarter of the IDs is unique."""
    profile = fake_profile(COSTS)
    profile.cells["dhe"]["warm"] |= {
        "share_slope": [2 / 3] * 12,
        "share_least": [0.5] * 12,
    }
    paths = [fake_path(name, QUALITY[name], *cost) for name, cost in COSTS.items()]
    return Dispatcher(paths, profile)


def test_unique_share_moves_the_prediction():
    d = with_share_effect()
    full, half, few = (d.predict(512, "dhe", unique_share=share) for share in (1.0, 0.625, 0.25))
    assert full == pytest.approx(d.predict(512, "dhe"))
    assert few == pytest.approx(full / 2)
    assert half == pytest.approx(0.75 * full)
    assert d.predict(512, "dhe", unique_share=0.1) == few
    assert d.choose(512, 4e-3).name == "table"
    assert d.choose(512, 4e-3, unique_share=0.3).name == "dhe"
    assert d.choose(4096, 32e-3).name == "table"
    assert d.choose(4096, 32e-3, unique_share=0.3).name == "dhe"


def test_unique_ids_are_counted_only_if_the_choice_depends_on_them():
    d, counted = with_share_effect(), []

    def count():
        counted.append(0.3)
        return 0.3

    assert d.choose(512, 5.4e-3, unique_share=count).name == "dhe"  # even with all IDs unique
    assert d.choose(512, 2e-3, unique_share=count).name == "table"  # even at the lowest share
    assert not counted
    assert d.choose(512, 4e-3, unique_share=count).name == "dhe"
    assert len(counted) == 1
    assert "dhe" in str(d.choose(512, 4e-3, unique_share=count, explain=True))
    with pytest.raises(ValueError, match=r"unique_share: expected in \[0, 1\], got 1.5"):
        d.choose(512, 4e-3, unique_share=lambda: 1.5)


def test_few_unique_ids_do_not_pass_for_a_faster_machine():
    d = with_share_effect()
    for _ in range(20):
        d.observe("dhe", 512, d.expect(512, "dhe") / 2, unique_share=0.25)
    assert d.corrections["dhe"] == 1.0
    for _ in range(20):
        d.observe("dhe", 512, (200e-6 + 512 * 8e-6) / 2)
    assert d.corrections["dhe"] == pytest.approx(0.5, rel=0.1)


@pytest.mark.parametrize(("size", "share"), [(128, None), (128, 0.7), (5000, 0.7)])
def test_a_decision_does_not_depend_on_the_size_of_the_profile(size, share):
    """What it takes is in ``benchmarks/compare_dispatch.py``: 2 microseconds among twelve paths."""

    def lines(batch_sizes) -> int:
        costs = {f"p{i}": (1e-4, 1e-6 * i) for i in range(12)}
        profile = fake_profile(costs, batch_sizes)
        for name in costs:
            profile.cells[name]["warm"]["share_slope"] = [0.5] * len(batch_sizes)
        d = Dispatcher([fake_path(name, 0.01 * i, *costs[name]) for i, name in enumerate(costs)], profile)
        count = 0

        def trace(frame, event, arg):
            nonlocal count
            count += event == "line"
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            d.choose(size, 0.0, 0.0, share)  # none meets: all are looked at
        finally:
            sys.settrace(before)
        return count

    few = lines((1, 2048))
    assert 12 < few < 12 * 20
    assert lines(tuple(range(1, 2049))) == few


def test_explanation_reads_well():
    text = str(dispatcher().choose(128, 1.7e-3, 1e-4, explain=True))
    assert "dhe (highest quality of the paths predicted to meet the target)" in text
    assert text.count("misses") == 1
    assert text.count("meets") == 2


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ((0, 1.0), "batch_size"),
        ((-3, 1.0), "-3"),
        ((8, math.nan), "sla_s"),
        ((8, 1.0, -1.0), "queued_s"),
        ((8, 1.0, 0.0, math.nan), "unique_share"),
    ],
)
def test_bad_arguments(arguments, match):
    with pytest.raises(ValueError, match=match):
        dispatcher().choose(*arguments)


def test_bad_paths():
    with pytest.raises(ValueError, match="paths: expected at least one, got none"):
        Dispatcher([], fake_profile(COSTS))
    with pytest.raises(ValueError, match="distinct"):
        Dispatcher([fake_path("table", 0.0, 0, 0)] * 2, fake_profile(COSTS))
    with pytest.raises(KeyError, match="select"):
        Dispatcher([fake_path("select", 0.0, 0, 0)], fake_profile(COSTS))
    with pytest.raises(ValueError, match="NaN"):
        fake_path("x", math.nan, 0, 0)


@settings(max_examples=30)
@given(st.lists(st.floats(allow_nan=True, allow_infinity=True), max_size=50))
def test_no_observation_can_break_the_dispatcher(seconds):
    d = dispatcher()
    for s in seconds:
        d.observe("hybrid", 128, s)
    assert all(0 < c < math.inf for c in d.corrections.values())
    assert d.choose(128, 1.0).name in COSTS
