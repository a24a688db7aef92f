import itertools
import json
import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mprec.nn import DheConfig, EmbeddingBagCollection, FeatureConfig
from mprec.planner import (
    Device,
    Infeasible,
    MeasuredCosts,
    Measurement,
    Option,
    RooflineCosts,
    default_options,
    effective_vocabulary,
    fit_effects,
    plan,
    plan_paths,
    shapes_by_vocabulary,
    solve,
)
from mprec.planner.tables import feature_set

GB = 10**9
PAPER = [  # measured on MovieLens-100k: the differences are what matters here
    Measurement("table", 0.7854),
    Measurement("dhe", 0.7894),
    Measurement("hybrid", 0.7902),
]
DHE = DheConfig(k=1024, hidden=(512, 256), last_activation="none")
CPU = RooflineCosts(flops_per_s=1e11, bytes_per_s=2e10, feature_overhead_s=1e-6)
GPU = RooflineCosts(flops_per_s=2e13, bytes_per_s=1e12, feature_overhead_s=5e-6)


# -- the integer program


def brute_force(quality, nbytes, seconds, budgets, objective="quality", max_seconds=math.inf):
    """Best (quality, -time) over all choices, by trying them all; None if none fits."""
    best = None
    per_feature = [list(itertools.product(range(len(q)), range(len(budgets)))) for q in quality]
    for choice in itertools.product(*per_feature):
        used, busy, total = [0] * len(budgets), [0.0] * len(budgets), 0.0
        for f, (o, d) in enumerate(choice):
            used[d] += nbytes[f][o]
            busy[d] += seconds[f][o][d]
            total += quality[f][o]
        if any(u > b for u, b in zip(used, budgets, strict=True)) or max(busy) > max_seconds:
            continue
        key = (total, -max(busy)) if objective == "quality" else (-max(busy), total)
        if best is None or key > best:
            best = key
    return best


@st.composite
def instances(draw):
    features, devices = draw(st.integers(1, 4)), draw(st.integers(1, 2))
    options = [draw(st.integers(1, 4 if devices == 1 else 3)) for _ in range(features)]
    # Multiples of 1/64 add up without rounding: ties are ties for both.
    exact = st.integers(0, 640).map(lambda n: n / 64)
    quality = [[draw(exact) for _ in range(n)] for n in options]
    nbytes = [[draw(st.integers(0, 10**10)) for _ in range(n)] for n in options]
    seconds = [[[draw(exact) for _ in range(devices)] for _ in range(n)] for n in options]
    budgets = [draw(st.integers(0, 2 * 10**10)) for _ in range(devices)]
    return quality, nbytes, seconds, budgets


@settings(max_examples=150, deadline=None)
@given(instances(), st.sampled_from(["quality", "seconds"]), st.sampled_from([math.inf, 12.0]))
def test_same_answer_as_brute_force(instance, objective, max_seconds):
    quality, nbytes, seconds, budgets = instance
    expected = brute_force(*instance, objective, max_seconds)
    try:
        chosen = solve(*instance, objective=objective, max_seconds=max_seconds)
    except Infeasible:
        assert expected is None
        return
    used, busy = [0] * len(budgets), [0.0] * len(budgets)
    for f, (o, d) in enumerate(chosen):
        used[d] += nbytes[f][o]
        busy[d] += seconds[f][o][d]
    total = sum(quality[f][o] for f, (o, _) in enumerate(chosen))
    assert all(u <= b for u, b in zip(used, budgets, strict=True))  # to the byte
    assert max(busy) <= max_seconds
    key = (total, -max(busy)) if objective == "quality" else (-max(busy), total)
    assert key == pytest.approx(expected, abs=1e-9)


def test_budgets_hold_to_the_byte():
    quality, nbytes, seconds = [[0.0, 1.0]] * 2, [[0, 5 * 10**9]] * 2, [[[0.0], [0.0]]] * 2
    assert [o for o, _ in solve(quality, nbytes, seconds, [10**10])] == [1, 1]
    assert sorted(o for o, _ in solve(quality, nbytes, seconds, [10**10 - 1])) == [0, 1]


def test_an_option_that_cannot_run_on_a_device_is_not_put_there():
    seconds = [[[math.inf, 1.0]]]
    assert solve([[1.0]], [[1]], seconds, [10, 10]) == [(0, 1)]
    with pytest.raises(Infeasible):
        solve([[1.0]], [[1]], seconds, [10, 0])


def best_quality(quality, units, budgets):
    """Highest sum of qualities by dynamic programming over the whole units of memory left on each device."""
    best = np.zeros([budget + 1 for budget in budgets])  # of the features so far, with so much left to use
    for q, sizes in zip(quality, units, strict=True):
        following = np.full_like(best, -np.inf)
        for gain, size in zip(q, sizes, strict=True):
            for d in range(len(budgets)):
                into = np.moveaxis(following, d, 0)[size:]
                before = np.moveaxis(best, d, 0)[: len(into)]
                np.maximum(into, before + gain, out=into)
        best = following
    return best.max()


@pytest.mark.parametrize("budgets", [[200], [130, 40]])
def test_26_features_with_12_options_are_solved_exactly(budgets):
    rng = np.random.default_rng(len(budgets))
    quality = rng.normal(0, 1e-4, (26, 12)).tolist()
    units = np.rint(10 ** rng.uniform(0, 2, (26, 12))).astype(int).tolist()
    seconds = (10 ** rng.uniform(-5, -3, (26, 12, len(budgets)))).tolist()
    unit = GB // 100
    start = time.process_time()
    chosen = solve(quality, (np.array(units) * unit).tolist(), seconds, [b * unit for b in budgets])
    print(f"{len(budgets)} device(s): {time.process_time() - start:.3f} s of CPU time")
    reached = sum(quality[f][o] for f, (o, _) in enumerate(chosen))
    assert reached == pytest.approx(best_quality(quality, units, budgets), abs=1e-9)


# -- quality from measurements


def features(*sizes):
    return [FeatureConfig(f"f{i}", size, 16) for i, size in enumerate(sizes)]


def predicted(effects, assignment):
    return effects.base + sum(effects.effect(name, label) for name, label in assignment.items())


@given(
    st.lists(st.integers(1, 10**7), min_size=2, max_size=6),
    st.lists(st.floats(0.5, 0.9), min_size=4, max_size=4),
)
def test_measured_models_are_reproduced(sizes, qualities):
    fs = features(*sizes)
    select = {f.name: "dhe" if i == 0 else "table" for i, f in enumerate(fs)}
    measured = [
        Measurement("table", qualities[0]),
        Measurement("dhe", qualities[1]),
        Measurement("hybrid", qualities[2]),
        Measurement(select, qualities[3]),
    ]
    effects = fit_effects(fs, measured)
    assert effects.residual < 1e-9
    for m in measured:
        assert predicted(effects, {f.name: m.label(f.name) for f in fs}) == pytest.approx(m.quality, abs=1e-9)


def test_one_measurement_is_divided_by_weight():
    effects = fit_effects(features(1, 1023), [Measurement("table", 0.7), Measurement("dhe", 0.81)])
    assert effects.effect("f0", "dhe") == pytest.approx(0.01)  # log2(2) = 1 to log2(1024) = 10
    assert effects.effect("f1", "dhe") == pytest.approx(0.10)
    assert effects.effect("f1", "table") == 0
    with pytest.raises(KeyError, match="hybrid"):
        effects.effect("f0", "hybrid")


def test_measured_single_features_are_taken_as_they_are():
    fs = features(100, 100)
    measured = [
        Measurement("table", 0.7),
        Measurement({"f0": "dhe", "f1": "table"}, 0.72),
        Measurement({"f0": "table", "f1": "dhe"}, 0.69),
    ]
    effects = fit_effects(fs, measured)
    assert effects.effect("f0", "dhe") == pytest.approx(0.02)
    assert effects.effect("f1", "dhe") == pytest.approx(-0.01)


def test_contradicting_measurements_leave_a_residual():
    measured = [Measurement("table", 0.7), Measurement("table", 0.72), Measurement("dhe", 0.8)]
    assert fit_effects(features(10), measured).residual == pytest.approx(0.01)


def test_id_frequencies_weigh_features():
    assert effective_vocabulary(np.full(64, 5)) == pytest.approx(64)
    assert effective_vocabulary(np.array([10**9, 1, 1, 1])) == pytest.approx(1, abs=1e-6)
    measured = [Measurement("table", 0.7), Measurement("dhe", 0.8)]
    counts = {"f0": np.array([1] + [0] * 1022)}
    effects = fit_effects(features(1023, 1023), measured, counts)
    assert effects.effect("f1", "dhe") == pytest.approx(10 * effects.effect("f0", "dhe"))


# -- sizes


@pytest.mark.parametrize("representation", ["table", "dhe", "hybrid"])
@pytest.mark.parametrize("family", ["universal", "artifact"])
def test_sizes_are_those_of_the_module(representation, family):
    config = FeatureConfig("f", 100, 8, representation, DheConfig(k=32, hidden=(16,), family=family))
    module = EmbeddingBagCollection([config])
    held = sum(t.numel() * t.element_size() for t in module.state_dict().values())
    assert Option("x", config).nbytes == held


def test_known_sizes_of_the_criteo_logs():
    for name, gigabytes, rows in (("kaggle", 2.16, 33.76e6), ("terabyte", 12.6, 49.1e6)):
        fs = feature_set(name)
        assert len(fs) == 26
        assert sum(f.num_embeddings for f in fs) == pytest.approx(rows, rel=2e-3)
        assert sum(Option("table", f).nbytes for f in fs) / GB == pytest.approx(gigabytes, rel=5e-3)
    with pytest.raises(KeyError, match="kaggle"):
        feature_set("avazu")


def test_precisions():
    config = FeatureConfig("f", 1000, 64)
    sizes = [Option("t", config, precision=p).nbytes for p in ("float32", "float16", "int8", "int4")]
    assert sizes == [256_000, 128_000, 72_000, 36_000]
    with pytest.raises(ValueError, match="int3"):
        Option("t", config, precision="int3")


# -- plans


def make(name, dhe=DHE):
    fs = feature_set(name)
    effects = fit_effects(fs, PAPER)
    return fs, default_options(fs, dhe, effects), effects.base


@pytest.mark.parametrize("name", ["kaggle", "terabyte"])
def test_memory_rich(name):
    """32 GB and 32 GB: the best model fits both devices, with faster paths beside it."""
    fs, options, base = make(name)
    for device in (Device("cpu", 32 * GB, CPU), Device("gpu", 32 * GB, GPU)):
        paths = plan_paths(fs, options, device, base_quality=base)
        assert {p.option.label for p in paths[0].placements} == {"hybrid"}
        assert paths[0].quality == pytest.approx(0.7902)
        assert [p.name for p in paths] == ["accurate", "balanced", "fast"]
        assert paths[1].seconds <= paths[0].seconds / 2
        assert {p.option.label for p in paths[-1].placements} == {"table"}
        assert paths[-1].quality == pytest.approx(0.7854)
        assert sum(p.nbytes for p in paths) <= 32 * GB
        assert all(a.seconds > b.seconds for a, b in itertools.pairwise(paths))
        assert all(p.simulated for p in paths)


@pytest.mark.parametrize("name", ["kaggle", "terabyte"])
@pytest.mark.parametrize("memory", [GB, GB // 5])
def test_memory_starved(name, memory):
    """1 GB and 200 MB: tables of large features do not fit, but the best plan beats DHE for all features."""
    fs, options, base = make(name)
    paths = plan_paths(fs, options, Device("cpu", memory, CPU), base_quality=base)
    best = paths[0]
    assert best.nbytes <= memory
    assert best.quality > 0.7894  # all dhe, which would fit too
    labels = {p.feature: p.option.label for p in best.placements}
    assert labels[fs[-1].name] == "dhe"
    assert labels[fs[0].name] == "hybrid"
    tables = plan(
        fs,
        [[o for o in feature if o.label == "table"] for feature in options],
        [Device("large", 32 * GB, CPU)],
    )
    assert tables.nbytes > memory
    assert all(p.nbytes <= memory for p in paths)


def test_nothing_fits():
    fs, options, base = make("kaggle")
    with pytest.raises(Infeasible, match="the devices have 1000"):
        plan(fs, options, [Device("tiny", 1000, CPU)], base_quality=base)


def test_one_model_over_two_devices():
    """What neither device holds alone, both do together; and side by side they are faster."""
    fs, options, base = make("kaggle")
    two = [Device("cpu", 2 * GB, CPU), Device("gpu", GB, GPU)]
    spread = plan(fs, options, two, base_quality=base)
    alone = plan(fs, options, two[:1], base_quality=base)
    assert spread.quality > alone.quality
    for device in two:
        assert (
            sum(p.option.nbytes for p in spread.placements if p.device == device.name) <= device.memory_bytes
        )
    assert {p.device for p in spread.placements} == {"cpu", "gpu"}


@pytest.mark.parametrize("name", ["kaggle", "terabyte"])
@pytest.mark.parametrize(("memory", "rich"), [((32 * GB, 32 * GB), True), ((GB, GB // 5), False)])
def test_the_papers_regimes_in_one_plan(name, memory, rich):
    fs, options, base = make(name)
    both = [Device("cpu", memory[0], CPU), Device("gpu", memory[1], GPU)]
    spread = plan(fs, options, both, base_quality=base)
    alone = [plan(fs, options, [device], base_quality=base) for device in both]
    assert spread.simulated
    for device in both:
        used = sum(p.option.nbytes for p in spread.placements if p.device == device.name)
        assert used <= device.memory_bytes
    labels = {p.feature: p.option.label for p in spread.placements}
    if rich:
        assert set(labels.values()) == {"hybrid"}
        assert spread.quality == pytest.approx(alone[0].quality)
        assert spread.seconds <= min(p.seconds for p in alone)
    else:
        assert spread.quality >= max(p.quality for p in alone)
        assert labels[fs[-1].name] == "dhe"
        assert {p.device for p in spread.placements} == {"cpu", "gpu"}


def test_rows_of_few_bits_go_where_memory_is_short():
    """int8 rows cost a little quality and save memory: a starved plan takes them, a rich one does not."""
    fs = feature_set("kaggle")
    effects = fit_effects(fs, [Measurement("table", 0.79), Measurement("table[int8]", 0.7899), PAPER[1]])
    options = default_options(fs, DHE, effects)
    assert {o.label for o in options[0]} == {"table", "table[int8]", "dhe"}
    rich = plan(fs, options, [Device("d", 4 * GB, CPU)])
    assert set(rich.table_precisions().values()) == {"float32"}
    starved = plan(fs, options, [Device("d", GB, CPU)])
    assert set(starved.table_precisions().values()) == {"float32", "int8"}
    assert len(starved.table_precisions()) == 26
    assert GB // 2 < starved.nbytes <= GB


def test_shapes_by_vocabulary():
    fs = features(3, 1000, 10**7)
    shape = shapes_by_vocabulary(DheConfig(k=1024, hidden=(512, 24), seed=7), fs)
    small, middle, large = map(shape, fs)
    assert (large.k, large.hidden, large.seed) == (1024, (512, 24), 7)
    assert (small.k, small.hidden) == (96, (48, 16))  # log2(4) of log2(1e7 + 1), in steps of 16
    assert small.k < middle.k < large.k
    effects = fit_effects(
        fs, [*PAPER, Measurement("dhe:sized", 0.789), Measurement("hybrid:sized[int4]", 0.79)]
    )
    options = default_options(fs, {"": DHE, "sized": shape}, effects)
    by_label = [{o.label: o for o in feature} for feature in options]
    assert by_label[0]["dhe:sized"].config.dhe == small
    assert by_label[2]["dhe:sized"].config.dhe == large
    assert by_label[1]["dhe"].config.dhe == DHE
    assert by_label[1]["hybrid:sized[int4]"].precision == "int4"
    assert by_label[0]["dhe:sized"].nbytes < by_label[0]["dhe"].nbytes


@pytest.mark.parametrize("label", ["select", "table:big", "dhe[int8]", "table[int8", "dhe:", "table[int3]"])
def test_labels_that_mean_nothing(label):
    effects = fit_effects(features(10), [Measurement("table", 0.7), Measurement(label, 0.8)])
    with pytest.raises(ValueError, match=r"option|precision"):
        default_options(features(10), DHE, effects)


def test_a_plan_builds_a_module_and_is_json():
    fs = [FeatureConfig("small", 10, 4), FeatureConfig("large", 100_000, 4)]
    effects = fit_effects(fs, PAPER)
    options = default_options(fs, DheConfig(k=16, hidden=(8,)), effects)
    best = plan(fs, options, [Device("d", 100_000, CPU)], base_quality=effects.base)
    module = EmbeddingBagCollection(best.features())
    held = sum(t.numel() * t.element_size() for t in module.state_dict().values())
    assert held == best.nbytes <= 100_000
    content = json.loads(json.dumps(best.to_dict()))
    assert [FeatureConfig.from_dict(row["config"]) for row in content["rows"]] == best.features()
    assert content["simulated"] is True


def test_options_by_label():
    fs = features(1000)
    measured = [*PAPER, Measurement("table[int8]", 0.785), Measurement("dhe:small", 0.78)]
    effects = fit_effects(fs, measured)
    shapes = {"": DHE, "small": DheConfig(k=32, hidden=())}
    labels = ("table", "table[int8]", "dhe", "dhe:small", "hybrid", "dhe:unmeasured")
    options = {o.label: o for o in default_options(fs, shapes, effects, labels)[0]}
    assert list(options) == ["table", "table[int8]", "dhe", "dhe:small", "hybrid"]
    assert options["table[int8]"].nbytes == 1000 * 24
    assert options["dhe:small"].config.dhe.k == 32
    assert options["table[int8]"].quality == pytest.approx(-0.0004)
    with pytest.raises(ValueError, match="small"):
        default_options(fs, DHE, effects, ["dhe:small"])


def test_measured_costs_are_measured_once_and_add_up():
    costs = MeasuredCosts(batch_size=16, seconds=0.0)
    dhe = DheConfig(k=32, hidden=(16,))
    table, deep, both = (
        Option(r, FeatureConfig("f", 3000, 8, r, None if r == "table" else dhe))
        for r in ("table", "dhe", "hybrid")
    )
    t, d = costs.feature_seconds(table), costs.feature_seconds(deep)
    assert t > 0
    assert d > 0
    assert costs.feature_seconds(both) == pytest.approx(t + d)
    assert not costs.simulated
    quantised = Option("t", table.config, precision="int8")
    assert costs.feature_seconds(quantised) == costs.feature_seconds(quantised) > 0
    assert costs.feature_seconds(table) == t  # another measurement


def test_simulated_devices_from_a_file(tmp_path):
    file = tmp_path / "gpu.json"
    file.write_text(
        json.dumps({"name": "H", "memory_bytes": 80 * GB, "flops_per_s": 1e14, "bytes_per_s": 3e12})
    )
    name, memory, costs = RooflineCosts.load(file)
    assert (name, memory, costs.simulated) == ("H", 80 * GB, True)
    deep = Option("dhe", FeatureConfig("f", 10, 64, "dhe", DHE))
    assert costs.feature_seconds(deep) == pytest.approx(128 * deep.flops / 1e14, rel=0.5)
    for bad in (
        "{",
        "[]",
        '{"name": "x"}',
        file.read_text().replace("1e", "-1e").replace("100000000000000.0", "-1"),
    ):
        file.write_text(bad)
        with pytest.raises(ValueError, match="not a device"):
            RooflineCosts.load(file)
    with pytest.raises(ValueError, match="cannot read"):
        RooflineCosts.load(tmp_path / "none.json")


def test_refusals():
    fs, options, _ = make("kaggle")
    device = Device("d", GB, CPU)
    for call, match in (
        (lambda: plan(fs, options[:-1], [device]), "options"),
        (lambda: plan(fs, options, []), "devices"),
        (lambda: plan(fs[:1], [[]], [device]), "C1"),
        (lambda: Device("d", -1, CPU), "memory_bytes"),
        (lambda: fit_effects(fs, []), "measurements"),
        (lambda: fit_effects(fs, [Measurement("table", math.nan)]), "finite"),
        (lambda: effective_vocabulary(np.zeros(3)), "counts"),
        (lambda: solve([[1.0]], [[1]], [[[1.0]]], [1], objective="speed"), "objective"),
        (lambda: RooflineCosts(0, 1), "flops_per_s"),
    ):
        with pytest.raises(ValueError, match=match):
            call()


def test_a_feature_that_fits_nowhere_is_named():
    features = [FeatureConfig("day", 7, 16), FeatureConfig("item", 10**6, 16)]
    options = [[Option("table", feature)] for feature in features]
    devices = [Device("a", 10**6, CPU), Device("b", 10**6, CPU)]
    with pytest.raises(Infeasible, match="no option of feature 'item' fits any device: ") as error:
        plan(features, options, devices)
    assert error.value.feature == 1
    with pytest.raises(Infeasible, match="no choice of options fits") as error:
        plan(features[:1] * 2, options[:1] * 2, [Device("a", 7 * 64, CPU)])
    assert error.value.feature is None
