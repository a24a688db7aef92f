import contextlib
import dataclasses
import gc
import math
import time

import numpy as np
import pytest
import torch
from dispatch_fakes import Clock, fake_profile

from mprec.arrivals import Poisson, Steps
from mprec.data import ClickDataset, Column
from mprec.dispatch import Dispatcher, ScoringPath
from mprec.dispatch.microbenchmark import no_collection
from mprec.serving import Engine
from mprec.serving.loadtest import (
    Outcome,
    QuerySizes,
    capacity,
    compare,
    contestants,
    find_max_qps,
    generate,
    generate_from,
    ratio_to_best,
    replay,
    suggested_qps,
)

ROWS = 1000


def dataset():
    """The label of a row is 1 where its only ID is even."""
    ids = np.arange(ROWS)
    return ClickDataset("parity", [Column("id", ROWS, ids)], (ids % 2 == 0).astype(np.float32))


def knows(share):
    """A model that is right on this share of the IDs."""

    def model(batch):
        right = batch.indices < share * ROWS
        even = batch.indices % 2 == 0
        return torch.where(right == even, 0.9, 0.1)

    return model


COSTS = {"poor": (1e-4, 1e-6), "good": (2e-4, 1e-5)}


def paths():
    return [
        ScoringPath("poor", "table", 0.6, knows(0.6), "shape of poor"),
        ScoringPath("good", "dhe", 0.9, knows(0.9), "shape of good"),
    ]


def test_arrivals_are_poisson_and_repeatable():
    load = generate(dataset(), 100.0, 4000, sizes=QuerySizes(4, 0.5), seed=3)
    gaps = np.diff([a.at_s for a in load])
    assert gaps.mean() == pytest.approx(0.01, rel=0.05)
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.07)  # exponential
    again = generate(dataset(), 100.0, 4000, sizes=QuerySizes(4, 0.5), seed=3)
    assert all(
        a.at_s == b.at_s and torch.equal(a.batch.indices, b.batch.indices)
        for a, b in zip(load, again, strict=True)
    )


class StepEngine(Engine):
    """Scores in the caller's thread: each query when it comes, on a clock that only the paths move."""

    def submit(self, *args, **kwargs):
        future = super().submit(*args, **kwargs)
        while self.step():
            pass
        return future


def timed(path, clock, slow=1.0):
    fixed, per_sample = COSTS[path.name]

    def model(batch):
        clock.advance(slow * (fixed + per_sample * len(batch)))
        return path.model(batch)

    return ScoringPath(path.name, path.representation, path.quality, model, path.shape)


def test_outcome_counts_what_happened():
    """Ten queries of 100 samples, a second apart; one path, which is right on 60 % of the samples."""
    clock = Clock()
    engine = StepEngine(Dispatcher([timed(paths()[0], clock)], fake_profile(COSTS)), sla_s=1e-2, clock=clock)
    load = generate(dataset(), 1.0, 10, sizes=QuerySizes(100, 0))
    outcome = replay(engine, load, sleep=clock.advance)
    labels = torch.cat([a.batch.labels for a in load])
    ids = torch.cat([a.batch.indices for a in load])
    all_of_them = dataclasses.replace(
        load[0].batch, bags=load[0].batch.bags._replace(indices=ids), labels=labels
    )
    expected = int(((knows(0.6)(all_of_them) >= 0.5) == (labels >= 0.5)).sum())
    row = outcome.row("poor")
    assert expected == int((ids < 600).sum())
    assert (outcome.samples, outcome.correct, outcome.correct_in_time) == (1000, expected, expected)
    assert row["accuracy"] == expected / 1000
    assert row["p50_ms"] == pytest.approx(0.2)
    assert row["p99_ms"] == pytest.approx(0.2)
    assert row["violations"] == 0
    assert row["chosen"] == {"poor": 1.0}
    span = (load[-1].at_s - load[0].at_s) * 10 / 9  # the load's own, whenever the last answer came
    assert row["correct_per_s"] == pytest.approx(expected / span)
    assert row["pieces"] == [pytest.approx(expected / span)]


def test_late_and_refused_queries_are_violations_and_bring_no_throughput():
    clock = Clock()
    late = timed(paths()[0], clock, slow=100.0)
    dispatcher = Dispatcher([late], fake_profile(COSTS))
    engine = StepEngine(dispatcher, sla_s=1e-3, clock=clock)
    outcome = replay(engine, generate(dataset(), 1.0, 10, sizes=QuerySizes(100, 0)), sleep=clock.advance)
    assert outcome.queries == 10
    assert outcome.violations == 1.0
    assert outcome.row("x")["correct_per_s"] == 0
    assert outcome.refused["overload"] > 0  # after it was seen to be slow
    assert len(outcome.latencies_s) + outcome.refused["overload"] == 10
    assert outcome.row("x")["accuracy"] is not None


def test_latency_counts_from_when_a_query_was_due():
    clock = Clock()
    engine = StepEngine(Dispatcher([timed(paths()[0], clock)], fake_profile(COSTS)), sla_s=10.0, clock=clock)
    load = generate(dataset(), 10.0, 5, sizes=QuerySizes(100, 0))
    outcome = replay(engine, load, sleep=lambda seconds: clock.advance(seconds + 0.5))
    assert outcome.percentile_ms(50) > 400


def test_the_generators_own_lateness_is_told():
    clock = Clock()
    engine = StepEngine(Dispatcher([timed(paths()[0], clock)], fake_profile(COSTS)), sla_s=10.0, clock=clock)
    load = generate(dataset(), 1.0, 20, sizes=QuerySizes(100, 0))
    # The first query is due at once; a path's call of 0.2 ms keeps no other from being due on time.
    outcome = replay(engine, load, sleep=lambda seconds: clock.advance(seconds + 0.03))
    assert outcome.row("x")["generator_late_ms"] == pytest.approx(30.0, abs=0.5)
    punctual = replay(engine, load, sleep=clock.advance)
    assert punctual.row("x")["generator_late_ms"] == pytest.approx(0.0, abs=1e-6)


def test_the_divisor_is_the_nominal_duration_where_it_is_given():
    clock = Clock()
    engine = StepEngine(Dispatcher([timed(paths()[0], clock)], fake_profile(COSTS)), sla_s=10.0, clock=clock)
    load = generate_from(dataset(), Poisson(2.0), 8.0, sizes=QuerySizes(10, 0))
    before = clock()
    outcome = replay(engine, load, starts_s=0.0, seconds=8.0, sleep=clock.advance)
    assert outcome.seconds == 8.0
    assert outcome.row("x")["correct_per_s"] == outcome.correct / 8.0
    assert clock() - before >= load[-1].at_s  # the piece starts before its first query


def test_pieces_of_a_load_with_a_duration_last_equally_long():
    """A load of two rates, one a piece: a piece of few queries lasts as long as one of many."""
    load = generate_from(dataset(), Steps((50.0, 400.0), 0.3), 0.6, sizes=QuerySizes(20, 0))
    few = sum(len(a.batch) for a in load if a.at_s < 0.3)
    outcomes = compare(
        {"poor": Dispatcher(paths()[:1], fake_profile(COSTS))}, load, rounds=2, seconds=0.6, sla_s=60.0
    )
    outcome = outcomes["poor"]
    assert outcome.seconds == pytest.approx(0.6)
    assert outcome.samples == sum(len(a.batch) for a in load)
    right = sum(int((a.batch.indices < 600).sum()) for a in load if a.at_s < 0.3)
    assert outcome.piece_rates[0] == pytest.approx(right / 0.3)
    assert few < outcome.samples / 3
    low, high = outcome.piece_rates
    assert outcome.row("poor")["correct_per_s_error"] == pytest.approx(abs(high - low) / 2)


def test_a_load_may_be_served_several_times():
    load = generate_from(dataset(), Steps((50.0, 400.0), 0.3), 0.6, sizes=QuerySizes(20, 0))
    dispatchers = {"poor": Dispatcher(paths()[:1], fake_profile(COSTS))}
    once, thrice = (
        compare(dispatchers, load, rounds=2, repeats=times, seconds=0.6, sla_s=60.0)["poor"]
        for times in (1, 3)
    )
    assert thrice.queries == 3 * once.queries
    assert thrice.seconds == pytest.approx(3 * 0.6)
    assert thrice.piece_rates == pytest.approx(3 * once.piece_rates)


def test_a_load_of_many_queries_asks_some_again(monkeypatch):
    monkeypatch.setattr("mprec.serving.loads._MOST_DISTINCT", 5)
    load = generate(dataset(), 10.0, 50, sizes=QuerySizes(4, 0.5))
    assert len(load) == 50
    assert len({id(a.batch) for a in load}) == 5


def test_no_collection_is_undone():
    assert gc.isenabled()
    with contextlib.suppress(KeyError), no_collection():
        assert not gc.isenabled()
        assert gc.get_freeze_count() > 0
        raise KeyError
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


def test_contestants_serve_the_same_load_in_real_time():
    load = generate(dataset(), 2000.0, 60, sizes=QuerySizes(20, 0.5))
    dispatchers = contestants(paths(), fake_profile(COSTS))
    assert list(dispatchers) == ["poor", "good", "dispatcher"]
    outcomes = compare(dispatchers, load, rounds=3, sla_s=60.0)
    samples = sum(len(a.batch) for a in load)
    for name, outcome in outcomes.items():
        assert (outcome.queries, outcome.samples, outcome.violations) == (60, samples, 0.0), name
    ids = torch.cat([a.batch.indices for a in load])
    assert outcomes["poor"].correct == int((ids < 600).sum())
    assert outcomes["good"].correct == outcomes["dispatcher"].correct == int((ids < 900).sum())
    assert outcomes["dispatcher"].row("d")["chosen"] == {"good": 1.0}


def test_a_ratio_of_contestants_has_an_error():
    rng = np.random.default_rng(0)
    pieces = {"slow": 100 * rng.random(400) + 300, "best": 100 * rng.random(400) + 950}
    pieces["dispatcher"] = 1.1 * pieces["best"] + rng.normal(0, 20, 400)
    outcomes = {
        name: Outcome(1.0, correct_in_time=int(values.sum()), piece_rates=values.tolist())
        for name, values in pieces.items()
    }
    ratio, error, best = ratio_to_best(outcomes)
    assert best == "best"
    assert ratio == pytest.approx(1.1, abs=0.01)
    assert error == pytest.approx(20 / math.sqrt(400) / pieces["best"].mean(), rel=0.15)
    nobody = {name: Outcome(1.0, piece_rates=[0.0, 0.0]) for name in ("a", "dispatcher")}
    assert math.isnan(ratio_to_best(nobody)[0])
    once = {name: Outcome(1.0, piece_rates=[values[0]]) for name, values in pieces.items()}
    ratio, error, best = ratio_to_best(once)
    assert (ratio, best) == (pytest.approx(pieces["dispatcher"][0] / pieces["best"][0]), "best")
    assert math.isnan(error)
    assert ratio_to_best(outcomes, "best", ["slow", "best"]) == (1.0, 0.0, "best")
    assert ratio_to_best(outcomes, "slow", ["slow", "best"])[0] == pytest.approx(0.35, abs=0.01)


def test_the_best_of_many_equals_is_not_taken_for_better():
    """Ten equal contestants and a dispatcher like them: the luckiest of ten is 1.5 errors ahead."""
    rng = np.random.default_rng(1)
    ratios, luckiest = [], []
    for _ in range(400):
        rates = rng.normal(1000, 30, (11, 4))
        outcomes = {f"path {i}": Outcome(1.0, piece_rates=row.tolist()) for i, row in enumerate(rates[1:])}
        outcomes["dispatcher"] = Outcome(1.0, piece_rates=rates[0].tolist())
        ratios.append(ratio_to_best(outcomes)[0])
        luckiest.append(rates[0].sum() / rates[1:].sum(axis=1).max())
    assert np.mean(luckiest) < 0.985
    assert np.mean(ratios) == pytest.approx(1.0, abs=4 * np.std(ratios) / math.sqrt(400))


def test_an_empty_outcome_has_no_figures():
    row = Outcome(1.0).row("nobody")
    assert row["p99_ms"] is None
    assert row["accuracy"] is None
    assert row["correct_per_s"] == 0


@pytest.mark.parametrize("limit", [0.4, 7.0, 100.0, 3333.0])
def test_bisection_finds_the_limit(limit):
    tried = []

    def violations(qps):
        tried.append(qps)
        return 0.0 if qps <= limit else 0.5

    found = find_max_qps(violations, 100.0)
    assert limit * 0.95 <= found <= limit
    assert len(tried) < 20


def test_bisection_ends():
    assert find_max_qps(lambda qps: 1.0, 100.0) == 0.0
    assert math.isfinite(find_max_qps(lambda qps: 0.0, 100.0))


def test_capacity_counts_what_the_paths_can_do():
    def sleeps(seconds):
        def model(batch):
            time.sleep(seconds)
            return torch.zeros(len(batch))

        return model

    slow, fast = (
        ScoringPath("slow", "dhe", 0.9, sleeps(4e-3), "s"),
        ScoringPath("fast", "table", 0.6, sleeps(0.0), "f"),
    )
    profile = fake_profile({"slow": (4e-3, 0.0), "fast": (1e-6, 0.0)})
    queries = [a.batch for a in generate(dataset(), 1.0, 20, sizes=QuerySizes(8, 0))]
    limit = 1 / 4e-3  # a sleep may last longer, never shorter
    assert 0 < capacity(Dispatcher([slow], profile), queries, max_batch=8) <= limit
    contest = contestants([slow, fast], profile)
    broken = ScoringPath("broken", "table", 0.6, lambda batch: 1 / 0, "b")
    with pytest.raises(RuntimeError, match="20 of 20 queries were not answered"):
        capacity(Dispatcher([broken], fake_profile({"broken": (1e-6, 0.0)})), queries)
    qps = suggested_qps(contest, dataset(), sizes=QuerySizes(8, 0), queries=20, max_batch=8)
    assert 0 < qps < math.inf


def test_refusals():
    data = dataset()
    for call, match in (
        (lambda: generate(data, 0.0, 10), "qps"),
        (lambda: generate(data, math.nan, 10), "qps"),
        (lambda: generate(data, 1.0, 0), "queries"),
        (lambda: generate(data.take(slice(0, 0)), 1.0, 1), "no rows"),
        (lambda: compare({}, generate(data, 1e3, 2), rounds=3, sla_s=1.0), "rounds"),
        (lambda: compare({}, generate(data, 1e3, 2), rounds=1, seconds=1e-9, sla_s=1.0), "seconds"),
        (lambda: generate_from(data, Poisson(1e-9), 1.0), "seconds"),
        (lambda: contestants(paths(), fake_profile(COSTS), dispatcher="good"), "good"),
        (lambda: find_max_qps(lambda qps: 0.0, 0.0), "start"),
    ):
        with pytest.raises(ValueError, match=match):
            call()
