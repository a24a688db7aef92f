"""Sweeps of real engines over short loads, and what they warn of."""

import json
import re

import pytest
from dispatch_fakes import fake_profile
from test_loadtest import COSTS, dataset, paths

from mprec.arrivals import QuerySizes
from mprec.dispatch import Dispatcher, ScoringPath
from mprec.serving.loadsweep import best_capacity, sweep, warnings_of
from mprec.serving.loadtest import Outcome, contestants

SIZES = QuerySizes(20, 0.5)


@pytest.mark.parametrize("arrivals", ["poisson", "bursty"])
def test_a_row_for_every_load_sla_and_contestant(arrivals):
    result = sweep(
        contestants(paths(), fake_profile(COSTS)),
        dataset(),
        loads=(0.05, 0.1),
        slas_s=(30.0, 60.0),
        arrivals=arrivals,
        seconds=0.3,
        rounds=2,
        sizes=SIZES,
    )
    assert result == json.loads(json.dumps(result, allow_nan=False))
    assert result["capacity_of"] in ("poor", "good")
    cells = [(row["sla_ms"], row["load"], row["path"]) for row in result["rows"]]
    names = ("poor", "good", "dispatcher")
    assert cells == [(sla, load, name) for sla in (3e4, 6e4) for load in (0.05, 0.1) for name in names]
    for row in result["rows"]:
        assert row["violations"] == row["late"] == row["failed"] == 0
        assert row["best_static"] == "good"
        (good,) = (
            other
            for other in result["rows"]
            if (other["sla_ms"], other["load"], other["path"]) == (row["sla_ms"], row["load"], "good")
        )
        assert row["ratio"] == pytest.approx(row["correct_per_s"] / good["correct_per_s"])
        assert row["qps"] * result["seconds"] == pytest.approx(row["queries"])
    first, again = ([row["queries"] for row in result["rows"] if row["sla_ms"] == sla] for sla in (3e4, 6e4))
    assert first == again
    assert any("8 SLAs" in text for text in result["warnings"])


def test_the_dispatcher_does_not_set_the_scale():
    """Loads are shares of the best static path's capacity; a path that fails has none."""
    broken = ScoringPath("broken", "table", 0.6, lambda batch: 1 / 0, "b")
    profile = fake_profile({**COSTS, "broken": (1e-6, 0.0)})
    some = {"broken": Dispatcher([broken], profile), "poor": Dispatcher(paths()[:1], profile)}
    limit, best = best_capacity(some, dataset(), sizes=SIZES)
    assert best == "poor"
    assert limit > 0
    with pytest.raises(RuntimeError, match="no contestant answers: broken"):
        best_capacity({"broken": some["broken"]}, dataset(), sizes=SIZES)


def outcome(**changes):
    values = {
        "latencies_s": [1e-3] * 10,
        "in_time": 10,
        "seconds": 4.0,
        "piece_rates": [1.0] * 4,
        "generator_late_s": [1e-5] * 10,
        "corrections": [{"table": 1.1}, {"table": 1.2}, {"table": 5.0}],
    }
    made = Outcome(0.01, **{**values, **changes})
    made.paths["table"] = 100
    return made


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"corrections": [{"table": 1.6}]}, "under load.*table 1.60 times"),
        ({"corrections": [{"table": 0.5}]}, "under load.*table 0.50 times"),
        ({"generator_late_s": [5e-3] * 10}, "generator of table's queries was 5.0 ms late"),
        ({"failed": 3}, "3 of 13 queries of table failed"),
        ({"seconds": 0.1}, "0.025 s, less than 8 SLAs"),
    ],
)
def test_what_disturbs_is_said(changes, words):
    (found,) = warnings_of({"table": outcome(**changes)})
    assert re.search(words, found)


def test_quiet_runs_are_not_warned_of():
    """One piece with a hiccup among several is none of the profile's; nor are paths that never answered."""
    assert warnings_of({"table": outcome()}) == []
    assert warnings_of({"table": outcome(corrections=[{"table": 1.0, "dhe": 9.0}])}) == []


@pytest.mark.parametrize("options", [{"loads": ()}, {"loads": (0.0,)}, {"slas_s": (-1.0,)}, {"seconds": 0.0}])
def test_refusals(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        sweep(contestants(paths(), fake_profile(COSTS)), dataset(), **options)
