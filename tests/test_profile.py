import dataclasses
import itertools
import json

import numpy as np
import pytest
import torch
from dispatch_fakes import Clock, fake_path, fake_profile
from hypothesis import given
from hypothesis import strategies as st

from mprec.bags import Bags
from mprec.data import Batch
from mprec.dispatch import (
    Curve,
    Dispatcher,
    Profile,
    ProfileError,
    ProfileMismatchError,
    microbenchmark,
    unique_share,
)
from mprec.dispatch.curve import crossovers, falls
from mprec.dispatch.profile import default_file
from mprec.dispatch.share import ShareEffect


@pytest.fixture(autouse=True)
def quick_eviction(monkeypatch):
    """Emptying real caches takes real time, which a fake clock does not see."""
    monkeypatch.setattr("mprec.dispatch.profile.Evict", lambda: lambda: None)


GRID = tuple(2**i for i in range(12))


# -- curves


@given(st.lists(st.floats(1e-7, 10), min_size=1, max_size=12), st.integers(1, 20000), st.integers(0, 20000))
def test_curves_never_fall(seconds, batch_size, more):
    curve = Curve.fit(GRID[: len(seconds)], seconds)
    assert curve.at(batch_size) <= curve.at(batch_size + more) * (1 + 1e-12)
    assert min(seconds) * 0.999 <= curve.at(1)
    assert curve.at(GRID[len(seconds) - 1]) <= max(seconds) * 1.001


def test_a_curve_falls_where_the_median_does_and_nowhere_else():
    medians = (1.0, 0.95, 2.0, 3.0, 1.5, 1.45, 4.0)
    assert falls(medians) == [4]
    tail = Curve.fit(GRID[:7], [2 * t for t in medians], falls(medians)).seconds
    assert tail == pytest.approx((2 * 0.95**0.5, 2 * 0.95**0.5, 4, 6, 2 * 2.175**0.5, 2 * 2.175**0.5, 8))


@given(st.floats(1e-6, 1e-3), st.floats(1e-8, 1e-4), st.integers(1, 10000))
def test_curves_are_exact_for_affine_costs(fixed, per_sample, batch_size):
    curve = Curve.fit(GRID, [fixed + per_sample * size for size in GRID])
    expected = fixed + per_sample * batch_size
    if batch_size <= GRID[-1]:
        assert curve.at(batch_size) == pytest.approx(expected)
    else:  # beyond the grid at least as dear as per sample at its end
        assert curve.at(batch_size) >= expected * (1 - 1e-9)


def test_a_table_is_the_curve():
    curve = Curve.fit((4, 16, 64), (1.0, 2.0, 8.0))
    assert curve.table(200) == [curve.at(size) for size in range(201)]
    assert curve.at(1) == 1.0
    assert curve.at(40) == pytest.approx(5.0)
    assert curve.at(128) == pytest.approx(16.0)


@pytest.mark.parametrize(
    ("sizes", "seconds"),
    [
        ((), ()),
        ((1, 2), (1.0,)),
        ((1, 1), (1.0, 2.0)),
        ((0,), (1.0,)),
        ((1,), (0.0,)),
        ((1,), (float("nan"),)),
    ],
)
def test_no_curve_from_bad_points(sizes, seconds):
    with pytest.raises(ValueError):
        Curve.fit(sizes, seconds)


def test_crossovers():
    gemv = Curve.fit(GRID, [1e-6 + 5e-6 * size for size in GRID])
    gemm = Curve.fit(GRID, [41e-6 + 1e-6 * size for size in GRID])
    assert crossovers(gemv, gemm) == pytest.approx([10.0])
    assert crossovers(gemm, gemm) == []


# -- microbenchmark


def bench(**options):
    clock = Clock()
    paths = [
        fake_path("a", 0.0, 1e-4, 1e-6, clock),
        fake_path("b", 0.0, 2e-4, 0, clock, lambda size: size > 8),
    ]
    return microbenchmark(paths, lambda size, rng: size, (1, 64), clock=clock, **options), clock


def test_microbenchmark_measures_what_the_paths_cost_within_its_budget():
    samples, clock = bench(seconds=0.05)
    assert set(samples) == {("a", 1), ("a", 64), ("b", 64)}
    for size in (1, 64):
        assert samples["a", size] == pytest.approx([1e-4 + size * 1e-6] * len(samples["a", size]))
    assert len(samples["a", 64]) == len(samples["b", 64])
    assert 0.05 <= clock.now < 0.07


def test_microbenchmark_keeps_to_rounds_and_calls():
    assert {len(v) for v in bench(seconds=0.0, min_rounds=3)[0].values()} == {3 * 16, 3 * 15}
    assert max(len(v) for v in bench(seconds=100.0, max_calls=20)[0].values()) < 40


def test_microbenchmark_prepares_every_call():
    order, clock = [], Clock()
    path = fake_path("a", 0.0, 1, 0, clock)
    object.__setattr__(path, "model", lambda item: (order.append("call"), clock.advance(1e-6)))

    def prepare():
        order.append("prepare")
        clock.advance(2e-3)  # counts for how many calls there are, but for no call's time

    found = microbenchmark([path], lambda *_: 0, (1,), seconds=0, before_call=prepare, clock=clock)
    assert found["a", 1] == pytest.approx([1e-6] * 3)
    assert order == ["prepare", "call"] * (2 + 3)  # the warm-up, then the rounds


def test_microbenchmark_gives_each_path_inputs_of_its_own_and_does_not_time_the_first():
    seen, clock = {"a": [], "b": []}, Clock()
    paths = [fake_path(n, 0.0, 1, 0, clock) for n in "ab"]
    for path in paths:
        object.__setattr__(path, "model", lambda i, n=path.name: (seen[n].append(i), clock.advance(0.9e-3)))
    inputs = itertools.count()
    found = microbenchmark(paths, lambda *_: next(inputs), (1,), seconds=0, min_rounds=2, clock=clock)
    assert sorted(seen["a"] + seen["b"]) == list(range(next(inputs)))
    assert [len(found[n, 1]) for n in "ab"] == [2 * 3, 2 * 3]
    assert [len(calls) for calls in seen.values()] == [2 + 2 * 4, 2 + 2 * 4]  # the warm-up, then the rounds


def test_microbenchmark_alternates_who_is_first():
    order, clock = [], Clock()
    paths = [fake_path(n, 0.0, 1, 0, clock) for n in "ab"]
    for path in paths:
        object.__setattr__(path, "model", lambda item, n=path.name: (order.append(n), clock.advance(1)))
    microbenchmark(paths, lambda size, rng: size, (1,), seconds=0, min_rounds=4, clock=clock)
    assert order == list("ab" + "ab" + "ba" + "ab" + "ba")  # one long call each warms up


@pytest.mark.parametrize(("sizes", "seconds"), [((0,), 1.0), ((1,), -1.0)])
def test_microbenchmark_refuses(sizes, seconds):
    with pytest.raises(ValueError):
        microbenchmark([fake_path("a", 0, 1, 1)], lambda size, rng: size, sizes, seconds=seconds)


# -- profiles


def rows(batch_size, rng):
    """A batch of one-ID bags for two features, from a large vocabulary."""
    return Batch(
        torch.zeros(batch_size, 1),
        Bags(
            torch.from_numpy(rng.integers(10**9, size=2 * batch_size)),
            torch.arange(2 * batch_size + 1),
            num_features=2,
        ),
        torch.zeros(batch_size),
    )


def measure(clock=None, **options):
    clock = clock or Clock()
    paths = [fake_path("table", 0.7, 1e-4, 1e-6, clock), fake_path("dhe", 0.8, 2e-4, 9e-6, clock)]
    return Profile.measure(paths, rows, (1, 16, 128), seconds=0.2, clock=clock, **options), paths


def test_measured_profile_holds_what_was_measured():
    profile, _ = measure()
    for name, fixed, per_sample in (("table", 1e-4, 1e-6), ("dhe", 2e-4, 9e-6)):
        for condition in ("warm", "repeated", "cold"):
            for statistic in ("p50", "p95", "p99", "mean"):
                curve = profile.curve(name, statistic, condition)
                sizes = (1, 128) if condition == "cold" else (1, 16, 128)
                assert curve.batch_sizes == sizes
                np.testing.assert_allclose(curve.seconds, [fixed + per_sample * b for b in sizes])
    assert profile.prediction_error["batch_sizes"] == [6, 64]
    assert profile.prediction_error["p95"] < 1e-9
    assert profile.cells["dhe"]["warm"]["unique_share"] == [1.0, 1.0, 1.0]
    assert profile.cells["dhe"]["repeated"]["unique_share"] == [1.0, 0.25, 0.25]
    assert profile.share_effects("dhe") == ([1, 16, 128], [ShareEffect(1.0)] * 3)


def test_prediction_error_is_that_of_a_cost_the_curve_cannot_follow():
    clock = Clock()
    path = fake_path("steps", 0.0, 0, 0, clock)
    object.__setattr__(path, "model", lambda item: clock.advance(1e-3 * -(-len(item) // 64)))
    profile = Profile.measure([path], rows, (1, 16, 64, 256), seconds=0.1, clock=clock, conditions=("warm",))
    curve = profile.curve("steps")
    sizes = profile.prediction_error["batch_sizes"]
    assert sizes == [6, 40, 161]
    errors = [abs(curve.at(b) / (1e-3 * -(-b // 64)) - 1) for b in sizes]
    assert profile.prediction_error["median"] == pytest.approx(np.median(errors))
    assert profile.prediction_error["p95"] == pytest.approx(np.quantile(errors, 0.95))


def test_the_grid_closes_in_on_a_threshold():
    """Of a cost that halves where a second thread sets in: exact on both sides of it."""
    clock = Clock()
    path = fake_path("threads", 0.0, 0, 0, clock)

    def cost(size):
        return 1e-5 + 1e-5 * size / (1 if size < 6 else 2)

    object.__setattr__(path, "model", lambda item: clock.advance(cost(len(item))))
    grid = tuple(2**i for i in range(9))
    profile = Profile.measure([path], rows, grid, seconds=2, clock=clock, conditions=("warm", "repeated"))
    for condition in ("warm", "repeated"):
        curve = profile.curve("threads", condition=condition)
        assert set(curve.batch_sizes) == {*grid, 5, 6}
        np.testing.assert_allclose([curve.at(b) for b in range(1, 257)], [cost(b) for b in range(1, 257)])
    assert profile.prediction_error["p95"] < 1e-9


def test_the_mean_is_of_both_kinds_of_calls_without_hiccups():
    clock, luck = Clock(), np.random.default_rng(0)
    path = fake_path("two kinds", 0.0, 0, 0, clock)

    def model(item):
        clock.advance(luck.choice([1e-3, 3e-3, 0.1], p=[0.59, 0.4, 0.01]))

    object.__setattr__(path, "model", model)
    profile = Profile.measure([path], rows, (1, 64), seconds=30, clock=clock, conditions=("warm",))
    assert profile.curve("two kinds").at(1) == pytest.approx(1e-3)
    assert profile.curve("two kinds", "mean").at(1) == pytest.approx(1.75e-3, rel=0.15)


def costs_by_share(fixed_s, per_unique_s, clock):
    """A path that takes ``fixed_s`` and so much for each distinct ID."""
    path = fake_path("dhe", 0.0, 0, 0, clock)

    def model(batch):
        clock.advance(fixed_s + per_unique_s * unique_share(batch) * len(batch.indices))

    object.__setattr__(path, "model", model)
    return path


@pytest.mark.parametrize("conditions", [("warm",), ("warm", "repeated")])
def test_inputs_of_two_kinds_tell_how_latency_follows_the_share(conditions):
    def draw(size, rng):
        batch = rows(size, rng)
        return (
            batch
            if rng.random() < 0.5
            else dataclasses.replace(batch, bags=batch.bags._replace(indices=batch.indices % 3))
        )

    clock = Clock()
    path = costs_by_share(1e-4, 1e-6, clock)
    profile = Profile.measure([path], draw, (64, 128), seconds=0.2, clock=clock, conditions=conditions)
    d = Dispatcher([path], profile, statistic="p95")
    for size in (64, 128):
        for share in (1.0, 6 / (2 * size)):
            assert d.predict(size, unique_share=share) == pytest.approx(1e-4 + 2e-6 * size * share)
            assert d.expect(size, unique_share=share) == pytest.approx(1e-4 + 2e-6 * size * share)
        assert d.predict(size) == pytest.approx(1e-4 + 2e-6 * size)  # the tail of both kinds
        assert 1.1e-4 < d.expect(size) < 9e-5 + 2e-6 * size


def test_repeated_rows_tell_it_where_inputs_are_alike():
    clock = Clock()
    path = costs_by_share(1e-4, 1e-6, clock)
    profile = Profile.measure([path], rows, (1, 128), seconds=0.2, clock=clock)
    d = Dispatcher([path], profile)
    for share in (1.0, 0.5, 0.25):
        assert d.predict(128, unique_share=share) == pytest.approx(1e-4 + 256e-6 * share)
    assert d.predict(128, unique_share=0.1) == d.predict(128, unique_share=0.25)


def test_a_share_that_tells_nothing_has_no_effect():
    rng = np.random.default_rng(0)
    shares = rng.uniform(0.2, 1, 300)
    noise = 1e-3 * rng.uniform(1, 1.3, 300)
    assert ShareEffect.fit((noise, shares)) == ShareEffect(shares.max())
    assert ShareEffect.fit((2e-3 - 1e-3 * shares, shares)) == ShareEffect(shares.max())
    assert ShareEffect.fit(([1e-3], [0.5])) == ShareEffect(0.5)
    effect = ShareEffect.fit((noise + 1e-3 * shares, shares))
    assert effect.slope * (1.15e-3 + 1e-3 * shares.max()) == pytest.approx(1e-3, rel=0.1)


def test_noise_adds_no_batch_sizes():
    """Calls that vary by a third: what is a straight line stays one, though medians of a few are 8 % off."""
    clock, luck = Clock(), np.random.default_rng(0)
    path = fake_path("noisy", 0.0, 0, 0, clock)

    def cost(size):
        return (1e-4 + 1e-6 * size) * luck.uniform(1, 1.35)

    object.__setattr__(path, "model", lambda item: clock.advance(cost(len(item))))
    profile = Profile.measure([path], rows, GRID, seconds=2, clock=clock, conditions=("warm",))
    assert len(profile.curve("noisy").batch_sizes) <= len(GRID) + 2


@pytest.mark.parametrize(("per_sample_s", "seconds", "most"), [(1e-6, 1, 1.5), (1e-4, 1, 30), (1e-4, 60, 75)])
def test_a_profile_keeps_to_its_budget_or_makes_four_calls_of_each_cell(per_sample_s, seconds, most):
    """Of four paths with a kink in every gap; a call of each at each size takes 2.2 s at 1e-4."""
    clock = Clock()
    paths = [fake_path(name, 0.0, 0, 0, clock) for name in "abcd"]

    def cost(size):
        return 1e-4 + per_sample_s * size * (1 + size.bit_length() % 2)

    for path in paths:
        object.__setattr__(path, "model", lambda item: clock.advance(cost(len(item))))
    Profile.measure(paths, rows, GRID, seconds=seconds, clock=clock, conditions=("warm",))
    assert clock.now < most * seconds


def test_profile_round_trip(tmp_path):
    profile, paths = measure()
    file = profile.save(tmp_path / "new" / "folder" / "profile.json")
    again = Profile.load(file, paths)
    assert again.to_dict() == profile.to_dict()
    assert [f.name for f in file.parent.iterdir()] == ["profile.json"]


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    profile, _ = measure()
    file = profile.save(tmp_path / "p.json")
    before = file.read_bytes()
    monkeypatch.setattr("os.fsync", lambda fd: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        profile.save(file)
    assert file.read_bytes() == before
    assert [f.name for f in tmp_path.iterdir()] == ["p.json"]


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (lambda t: "", "not JSON"),
        (lambda t: t[: len(t) // 2], "not JSON"),
        (lambda t: "[]", "not a profile"),
        (lambda t: '{"format": "other"}', "not a profile"),
        (lambda t: t.replace('"version": 3', '"version": 99'), "version 99"),
        (lambda t: t.replace("0.0001", "0.0002"), "checksum"),
        (lambda t: t.replace('"checksum"', '"other"'), "checksum"),
    ],
)
def test_damaged_profiles_are_refused(tmp_path, damage, match):
    profile, _ = measure()
    file = profile.save(tmp_path / "p.json")
    file.write_text(damage(file.read_text()))
    with pytest.raises(ProfileError, match=match):
        Profile.load(file)


def test_a_missing_or_unreadable_file_is_a_profile_error(tmp_path):
    with pytest.raises(ProfileError, match="cannot read"):
        Profile.load(tmp_path / "none.json")
    with pytest.raises(ProfileError, match="cannot read"):
        Profile.load(tmp_path)
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ProfileError, match="not JSON"):
        Profile.load(tmp_path / "binary.json")


def test_a_foreign_profile_says_exactly_what_differs(tmp_path):
    profile = fake_profile({"table": (1e-4, 1e-6), "dhe": (2e-4, 1e-5)})
    profile.fingerprint["cpu"] = "Another CPU"
    profile.fingerprint["threads"] = 96
    file = profile.save(tmp_path / "p.json")
    paths = [
        fake_path("table", 0, 0, 0),
        fake_path("dhe", 0, 0, 0, shape="other"),
        fake_path("hybrid", 0, 0, 0),
    ]
    with pytest.raises(ProfileMismatchError) as caught:
        Profile.load(file, paths)
    assert set(caught.value.differences) == {"cpu", "threads", "path dhe", "path hybrid"}
    assert caught.value.differences["threads"] == (96, torch.get_num_threads())
    assert "'Another CPU'" in str(caught.value)


def test_a_simulated_profile_is_never_taken_for_a_measured_one(tmp_path):
    content = fake_profile({"table": (1e-4, 1e-6)}).to_dict()
    content["simulated"] = True
    file = tmp_path / "what-if.json"
    file.write_text(json.dumps(content))  # written by hand: no checksum
    assert Profile.load(file).simulated
    with pytest.raises(ProfileMismatchError, match="simulated"):
        Profile.load(file, [fake_path("table", 0, 0, 0)])


def test_load_or_measure_measures_again_only_when_it_must(tmp_path):
    clock, said = Clock(), []
    path = fake_path("table", 0.7, 1e-4, 1e-6, clock)
    file = tmp_path / "p.json"

    def get(paths=(path,), sizes=(1, 16)):
        before = clock.now
        profile = Profile.load_or_measure(
            paths, rows, sizes, file=file, report=said.append, seconds=0.05, clock=clock
        )
        return profile, clock.now > before

    assert get()[1]
    assert said == []
    assert not get()[1]
    assert get(sizes=(1, 16, 64))[1]
    assert "lacks batch sizes [64]" in said.pop()
    file.write_text(file.read_text()[:-40])
    assert get()[1]
    assert "damaged" in said.pop()
    assert get([fake_path("table", 0.7, 1e-4, 1e-6, clock, shape="larger")])[1]
    assert "path table: 'shape of table', here 'larger'" in said.pop()
    assert said == []


def test_default_file_is_in_the_cache_folder_and_tells_threads_apart(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    paths = [fake_path("table", 0, 0, 0)]
    here = default_file(paths)
    assert here.parent == tmp_path / "mprec"
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert default_file(paths) != here
    finally:
        torch.set_num_threads(threads)


def test_profile_refuses_bad_arguments():
    path = fake_path("a", 0, 1, 1)
    for paths, sizes, more, match in (
        ([], (1,), {}, "paths: expected at least one"),
        ([path, path], (1,), {}, "distinct"),
        ([path], (), {}, "expected at least one"),
        ([path], (1,), {"conditions": ("lukewarm",)}, "lukewarm"),
    ):
        with pytest.raises(ValueError, match=match):
            Profile.measure(paths, rows, sizes, seconds=0, **more)
