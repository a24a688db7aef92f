import json

import numpy as np
import pytest

from mprec.arrivals import QuerySizes
from mprec.cli import main
from mprec.simulate import SimulatedExecutor, SimulatedPath, kaggle, load_device, to_profile
from mprec.simulate.contest import DISPATCHER, capacity, compare, contestants, described, measured, reference
from mprec.simulate.loads import ARRIVALS, draw

SYSTEM = ["--devices", "cpu:broadwell,gpu:v100", "--sla-ms", "10", "--most-queries", "300"]


def simulate(capsys, *arguments):
    assert main(["simulate", "--json", *arguments]) == 0
    return json.loads(capsys.readouterr().out)


def by_name(result):
    return {row["contestant"]: row for row in result["rows"]}


def test_contestants_are_each_pair_each_representation_and_the_dispatcher(capsys, tmp_path):
    picture = tmp_path / "out.png"
    result = simulate(capsys, *SYSTEM, "--loads", "1000", "--output", str(picture))
    rows = by_name(result)
    pairs = {f"{r} on {d}" for r in ("table", "dhe", "hybrid") for d in ("cpu:broadwell", "gpu:v100")}
    assert set(rows) == pairs | {f"{r} on all" for r in ("table", "dhe", "hybrid")} | {DISPATCHER}
    assert result["simulated"] is True
    assert result["reference"] == "table on cpu:broadwell"
    for name, row in rows.items():
        assert row["ratio"] == pytest.approx(
            row["correct_per_s"] / rows[result["reference"]]["correct_per_s"]
        )
        assert sum(row["mix"].values()) == pytest.approx(1.0)
        if name in pairs:
            assert set(row["mix"]) == {name}
    # At this load there is time for the hybrid on the GPU: the dispatcher is better than tables, and decoders
    # on the CPU cannot follow.
    assert rows[DISPATCHER]["ratio"] > 1.0
    assert rows[DISPATCHER]["mix"]["hybrid on gpu:v100"] > 0.5
    assert rows["dhe on cpu:broadwell"]["missed"] > 0.3
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_gpu_with_little_memory_holds_decoders_alone(capsys):
    rows = by_name(simulate(capsys, *SYSTEM, "--loads", "500", "--memory", "gpu:v100=200MB"))
    assert {name for name in rows if name.endswith("gpu:v100")} == {"dhe on gpu:v100"}


def test_tables_are_labelled_simulated(capsys):
    assert main(["simulate", *SYSTEM, "--loads", "500"]) == 0
    assert "simulated: 500 queries/s, SLA 10 ms" in " ".join(capsys.readouterr().out.split())


def test_profiles_are_executors_as_fast_as_they_say(capsys, tmp_path):
    device = load_device("gpu:v100")
    shapes = {name: kaggle(name) for name in ("table", "dhe")}
    profile = to_profile(shapes, {"table": 0.7879, "dhe": 0.7894}, device)
    file = profile.save(tmp_path / "mine.json")
    executor = measured(profile, "mine", 512)
    sizes = [1, 64, 100, 512]
    for path in executor.paths:
        known = described(device, kaggle(), {path.name: 0.5}, 512).paths[0]
        assert np.asarray(path.curve)[sizes] == pytest.approx(np.asarray(known.curve)[sizes], rel=0.03)
    options = ["--profile", str(file), "--loads", "200", "--sla-ms", "10", "--most-queries", "100"]
    result = simulate(capsys, *options)
    assert [about["name"] for about in result["executors"]] == ["mine"]
    assert "dhe on mine" in by_name(result)


def test_the_dispatchers_quality_is_counted_by_hand(capsys):
    """An empty system: every query is answered by the best path, so correct predictions are known."""
    fast, best = (SimulatedPath(n, q, [s] * 1025) for n, q, s in (("table", 0.5, 1e-4), ("dhe", 0.75, 2e-4)))
    executors = [SimulatedExecutor("cpu", [fast, best])]
    times, sizes = np.arange(100) * 0.01, np.full(100, 7)
    rows = {
        row.contestant: row for row in compare(executors, times, sizes, sla_s=0.005, qps=100, max_batch=1024)
    }
    assert rows["table on cpu"].result.correct_per_s == pytest.approx(0.5 * 700)
    assert rows[DISPATCHER].ratio == pytest.approx(1.5)
    assert next(iter(rows)) == reference(executors) == "table on cpu"
    assert list(contestants(executors)) == ["table on cpu", "dhe on cpu", DISPATCHER]


def test_capacity_by_hand():
    path = SimulatedPath("table", 0.5, [1e-3 + 1e-5 * b for b in range(2049)])
    # half of 10 ms: 400 samples in 5 ms
    assert capacity([SimulatedExecutor("cpu", [path])] * 2, 100, 0.01) == pytest.approx(2 * 400 / 5e-3 / 100)


@pytest.mark.parametrize("arrivals", ARRIVALS)
def test_loads_have_their_rate_and_are_seeded(arrivals):
    times, sizes = draw(arrivals, 1000, 200.0, seed=3)
    again, _ = draw(arrivals, 1000, 200.0, seed=3)
    assert (times == again).all()
    assert len(times) == pytest.approx(200_000, rel=0.05)
    assert np.all(np.diff(times) >= 0)
    assert times[0] >= 0
    assert times[-1] < 200.0
    assert len(sizes) == len(times)
    assert sizes.mean() == pytest.approx(
        QuerySizes().draw(100_000, np.random.default_rng(0)).mean(), rel=0.05
    )
    counts = np.histogram(times, bins=2000, range=(0, 200.0))[0]  # each 0.1 s: about a burst
    spread = counts.var() / counts.mean()  # 1 for a Poisson process
    assert (spread < 1.5) if arrivals == "poisson" else (spread > 5)


def test_loads_are_shortened():
    times, _ = draw("poisson", 1000, 100.0, most=500)
    assert len(times) == pytest.approx(500, rel=0.2)
    times, _ = draw("poisson", 1000, 100.0, most=500, least_s=2.0)
    assert len(times) == pytest.approx(2000, rel=0.1)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "--devices or --profile: expected at least one"),
        (["--devices", "gpu:none"], "got 'gpu:none'"),
        (["--devices", "gpu:v100", "--shape", "none"], "shape: expected"),
        (["--devices", "gpu:v100", "--sla-ms", "0"], "--sla-ms: expected finite numbers above 0, got 0"),
        (["--devices", "gpu:v100", "--loads", "-5"], "--loads: expected finite numbers above 0, got -5"),
        (["--devices", "gpu:v100", "--memory", "gpu:a100=1GB"], "--memory: expected a device of --devices"),
        (["--devices", "gpu:v100", "--memory", "gpu:v100"], "--memory: expected NAME=SIZE"),
        (["--devices", "gpu:v100", "--memory", "gpu:v100=much"], "--memory: expected a size such as"),
        (["--devices", "gpu:v100", "--memory", "gpu:v100=1KB"], "expected at least one that holds a path"),
        (["--devices", "gpu:v100,gpu:v100", "--loads", "10"], "expected distinct names"),
        (
            ["--devices", "gpu:v100", "--seconds", "0.3"],
            "--seconds: expected at least 8 SLAs, 0.4 s, got 0.3",
        ),
        (["--profile", "none.json"], "cannot read profile"),
    ],
)
def test_bad_arguments_are_named(capsys, arguments, says):
    assert main(["simulate", *arguments]) == 2
    assert says in capsys.readouterr().err
