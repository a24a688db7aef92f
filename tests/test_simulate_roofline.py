"""The roofline against figures worked out by hand, models of mprec.models, and a measured core."""

import json

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mprec.dispatch import Dispatcher, Profile, ScoringPath
from mprec.models import DLRM
from mprec.nn import DheConfig
from mprec.simulate import (
    curve,
    fits,
    kaggle,
    latency_s,
    load_device,
    load_shape,
    resident,
    terabyte,
    to_profile,
)
from mprec.simulate.roofline import HASH_OPS, stages
from mprec.simulate.shapes import shape_of

ROUND = {
    "peak_flops": {"float32": 1e9},
    "compute_efficiency": 0.5,
    "memory_bytes": 1e6,
    "memory_bandwidth": 1e6,
    "gather_efficiency": 0.5,
    "lookup_s": 1e-6,
    "cache_bytes": 1000,
    "cache_bandwidth": 1e7,
    "launch_overhead_s": 1e-3,
    "call_overhead_s": 1e-2,
    "link_bandwidth": 1e5,
    "link_latency_s": 1e-4,
}


def device(**changes):
    """One of round figures."""
    return load_device("gpu:v100").with_(**{**ROUND, **changes})


def small(representation="table", **options):
    """Two features (4 and 1000 rows of 4 numbers), 3 dense numbers, MLPs 3-8-4 and (4 + pairs)-2-1."""
    shape = shape_of("small", [4, 1000], 4, num_dense=3, bottom=(8,), top=(2,), **options)
    return shape.with_representation(representation, DheConfig(k=10, hidden=(5,)))


def test_sizes_are_those_of_criteo():
    assert sum(f.num_embeddings for f in kaggle().features) * 16 * 4 == pytest.approx(2.16e9, rel=2e-3)
    assert sum(terabyte().table_bytes()) == pytest.approx(12.58e9, rel=2e-3)
    assert kaggle().bottom_widths == (13, 512, 256, 64, 16)
    assert kaggle().top_widths == (16 + 27 * 26 // 2, 512, 256, 1) == (367, 512, 256, 1)
    assert kaggle("hybrid").vectors == 53


@pytest.mark.parametrize("representation", ["table", "dhe", "hybrid", "select"])
def test_parameters_and_products_are_those_of_the_model(representation):
    """mprec.models.DLRM is built and run, and torch counts its products."""
    shape = shape_of("s", [50, 70, 90], 8, num_dense=5, bottom=(16,), top=(32, 8))
    shape = shape.with_representation(representation, DheConfig(k=12, hidden=(6,)), select_largest=1)
    model = DLRM(shape.features, 5, 8, bottom=(16,), top=(32, 8))
    trained = sum(p.numel() for p in model.parameters())
    assert shape.nbytes() == 4 * trained
    dense, batch = torch.zeros(7, 5), 7
    embedded = torch.zeros(batch, (shape.vectors - 1) * 8)
    with FlopCounterMode(display=False) as counter:
        model.score(dense, embedded)
    steps = {stage.name: stage for stage in stages(shape)}
    found = sum(steps[name].flops for name in ("bottom", "interaction", "top"))
    assert batch * found == counter.get_total_flops()
    hashed = sum(feature.has_dhe for feature in shape.features)
    assert ("decoders" in steps) == (hashed > 0)
    if hashed:
        assert steps["decoders"].flops == hashed * 2 * (12 * 6 + 6 * 8)
        assert steps["decoders"].vector_ops == hashed * HASH_OPS * 12


def test_a_batch_of_tables_by_hand():
    batch = 10
    # weights: bottom 4 * (4*8 + 9*4) = 272, top 4 * (8*2 + 3) = 76: in the cache with the table of 64 bytes,
    # not with that of 16000.
    weights = 272 + 76
    tables = batch * (
        2 * 4 * 4 / 1e7  # written
        + (16 / (1e7 * 0.5) + 1e-6)  # a row of the cached table
        + (16 / (1e6 * 0.5) + 1e-6)  # a row from memory
    )
    bottom = 272 / 1e7 + batch * 92 / 1e7
    interaction = batch * 4 * (3 * 4 + 4 + 3) / 1e7
    top = 76 / 1e7 + batch * 4 * (7 + 2 + 2 + 1) / 1e7
    launches = 1 + 2 + 1 + 2
    link = 2e-4 + batch * (4 * 3 + 8 * 2 * 2 + 4) / 1e5
    expected = 1e-2 + launches * 1e-3 + tables + bottom + interaction + top + link
    assert weights == small().mlp_bytes()
    assert float(latency_s(small(), device(), batch)) == pytest.approx(expected, rel=1e-12)


def test_a_batch_of_decoders_is_bound_by_computing_by_hand():
    slow = device(peak_flops={"float32": 1e6}, memory_bandwidth=1e9, link_bandwidth=0, link_latency_s=0)
    shape, batch = small("dhe"), 50
    decoders = 2 * (2 * (10 * 5 + 5 * 4) + HASH_OPS * 10)
    bottom, interaction, top = 2 * (3 * 8 + 8 * 4), 2 * 3 * 4, 2 * (7 * 2 + 2)
    seconds = batch * (decoders + bottom + interaction + top) / (1e6 * 0.5)
    launches = 2 + 2 + 1 + 2
    assert float(latency_s(shape, slow, batch)) == pytest.approx(1e-2 + launches * 1e-3 + seconds, rel=1e-12)


def test_pooling_multiplies_rows_and_decoded_ids():
    one, many = ({s.name: s for s in stages(small("hybrid", pooling=p))} for p in (1, 20))
    assert [rows for rows, _ in many["tables"].lookups] == [20, 20]
    assert many["decoders"].flops == 20 * one["decoders"].flops
    assert many["top"] == one["top"]


def test_tables_in_the_chips_memory_are_faster():
    shape = shape_of("s", [1000] * 4, 16)
    kept, spilled = (device(cache_bytes=nbytes) for nbytes in (1e7, 1e3))
    assert latency_s(shape, kept, 1000) < 0.5 * latency_s(shape, spilled, 1000)


def test_precision_halves_bytes_and_takes_its_own_peak():
    gpu = load_device("gpu:a100")
    full, half = kaggle("dhe"), shape_of("k", [1] * 26, 16, precision="float16").with_representation("dhe")
    assert half.decoder_bytes() * 2 == full.decoder_bytes()
    assert latency_s(half, gpu, 2048) < 0.2 * latency_s(full, gpu, 2048)
    with pytest.raises(ValueError, match="precision"):
        latency_s(half, load_device("cpu:broadwell"), 1)


def test_the_described_zen_4_core_is_near_the_measured_one():
    """A DLRM of this shape in PyTorch took so many microseconds on such a core, one thread."""
    measured = {1: 187, 16: 398, 128: 1690, 2048: 24524}
    described = 1e6 * latency_s(kaggle(), load_device("cpu:zen4-core"), np.array(list(measured)))
    assert described == pytest.approx(list(measured.values()), rel=0.2)


def test_curves_rise_and_agree_with_single_batches():
    gpu = load_device("gpu:v100")
    seconds = curve(kaggle("hybrid"), gpu, 300)
    assert len(seconds) == 301
    assert np.all(np.diff(seconds) > 0)
    assert seconds[128] == float(latency_s(kaggle("hybrid"), gpu, 128))
    with pytest.raises(ValueError, match="max_batch: expected at least 1, got 0"):
        curve(kaggle(), gpu, 0)


def test_what_fits_and_what_is_held_at_once():
    shapes = {name: kaggle(name) for name in ("table", "dhe", "hybrid")}
    gpu, ipu = load_device("gpu:v100"), load_device("ipu:gc200")
    assert resident(shapes, gpu) == ["table", "dhe", "hybrid"]
    assert [name for name in shapes if fits(shapes[name], ipu)] == ["dhe"]
    assert resident(shapes, gpu.with_(memory_bytes=200e6)) == ["dhe"]
    assert resident(shapes, gpu.with_(memory_bytes=3e9)) == ["table", "dhe"]  # not both large ones
    assert resident(shapes, gpu.with_(memory_bytes=1e6)) == []


def test_profiles_are_simulated_and_say_so(tmp_path):
    shapes = {name: kaggle(name) for name in ("table", "dhe")}
    gpu = load_device("gpu:v100")
    made = to_profile(shapes, {"table": 0.7, "dhe": 0.8}, gpu, noise=0.1)
    profile = Profile.load(made.save(tmp_path / "p.json"))
    assert profile.simulated
    assert profile.notes["device"] == "gpu:v100"
    cell = profile.cells["dhe"]["warm"]
    assert cell["mean"][-1] == pytest.approx(float(latency_s(shapes["dhe"], gpu, 2048)))
    drawn = np.random.default_rng(0).lognormal(-0.005, 0.1, 200_000) * cell["mean"][-1]
    for key, q in (("p50", 50), ("p95", 95), ("p99", 99)):
        assert cell[key][-1] == pytest.approx(np.percentile(drawn, q), rel=0.01)
    paths = [
        ScoringPath(name, name, q, None, profile.paths[name]["shape"])
        for name, q in (("table", 0.7), ("dhe", 0.8))
    ]
    with pytest.raises(ValueError, match="simulated"):
        profile.check(paths)  # never taken for a measured one
    dispatcher = Dispatcher(paths, profile)
    assert dispatcher.choose(batch_size=128, sla_s=0.010).name == "dhe"
    assert dispatcher.choose(batch_size=2048, sla_s=0.004).name == "table"


def test_shapes_from_files(tmp_path):
    file = tmp_path / "shape.json"
    good = {"name": "mine", "vocabularies": [10, 20], "dim": 8, "quality": {"table": 0.7}, "pooling": 3}
    file.write_text(json.dumps(good))
    shape, quality = load_shape(file)
    assert (shape.dim, shape.pooling, len(shape.features), quality) == (8, 3, 2, {"table": 0.7})
    for change, says in (
        ({"quality": {"table": 1.2}}, r"quality.table: expected a share in \[0, 1\], got 1.2"),
        (
            {"quality": {"tables": 0.2}},
            "quality: expected one of table, dhe, hybrid, low_rank, hot_dhe, hot_low_rank, select, "
            "got 'tables'",
        ),
        ({"quality": {}}, "quality: expected at least one"),
        ({"dim": 0}, "embedding_dim: expected a positive integer, got 0"),
        ({"pooling": -1}, "pooling: expected a finite number above 0, got -1"),
        ({"colour": 1}, "colour"),
    ):
        file.write_text(json.dumps({**good, **change}))
        with pytest.raises(ValueError, match=says):
            load_shape(file)
    del good["quality"]
    file.write_text(json.dumps(good))
    with pytest.raises(ValueError, match="quality: missing"):
        load_shape(file)
    with pytest.raises(
        ValueError, match=r"shape: expected a \.json file or one of kaggle, terabyte, got 'x'"
    ):
        load_shape("x")
