import json

import pytest

from mprec.simulate import device_names, load_device


def content(name="gpu:v100"):
    device = load_device(name)
    return {**device.__dict__, "peak_flops": dict(device.peak_flops), "sources": dict(device.sources)}


def test_the_devices_of_the_study_are_shipped():
    kinds = {name.split(":")[0] for name in device_names()}
    assert kinds == {"cpu", "gpu", "tpu", "ipu"}
    for name in device_names():
        device = load_device(name)
        assert device.name == name
        assert device.kind == name.split(":")[0]
        assert device.simulated
        assert bool(device.link_bandwidth) == (device.kind != "cpu")


def test_figures_are_those_of_data_sheets():
    v100, broadwell, tpu, ipu = map(load_device, ("gpu:v100", "cpu:broadwell", "tpu:v3-core", "ipu:gc200"))
    assert (v100.peak("float32"), v100.memory_bandwidth, v100.memory_bytes) == (15.7e12, 900e9, 32e9)
    assert (broadwell.memory_bandwidth, broadwell.cores) == (76.8e9, 14)
    assert broadwell.peak("float32") == pytest.approx(14 * 2.6e9 * 2 * 2 * 8, rel=1e-3)
    assert (2 * tpu.peak("bfloat16"), 2 * tpu.memory_bandwidth) == (123e12, 900e9)
    assert (ipu.memory_bytes, ipu.memory_bandwidth) == (900e6, 47.5e12)


def test_a_description_in_a_file_is_a_device(tmp_path):
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({**content(), "name": "gpu:mine"}))
    assert load_device(file).name == "gpu:mine"


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("memory_bandwidth", 0, "memory_bandwidth: expected a finite number above 0, got 0"),
        ("memory_bytes", "32 GB", "memory_bytes: expected a finite number above 0, got '32 GB'"),
        ("cache_bytes", float("nan"), "cache_bytes: expected a finite number above 0, got nan"),
        ("cache_bandwidth", True, "cache_bandwidth: expected a finite number above 0, got True"),
        ("gather_efficiency", 1.5, r"gather_efficiency: expected a finite number in \(0, 1\], got 1.5"),
        ("compute_efficiency", 0, r"compute_efficiency: expected a finite number in \(0, 1\], got 0"),
        ("launch_overhead_s", -1e-6, "launch_overhead_s: expected a finite number of at least 0, got -1e-06"),
        ("link_bandwidth", 0, "link_latency_s: expected 0 where link_bandwidth is 0, got 1e-05"),
        ("cores", 1.5, "cores: expected a positive integer, got 1.5"),
        ("kind", "fpga", "kind: expected one of cpu, gpu, tpu, ipu, got 'fpga'"),
        ("title", "", "title: expected a non-empty text, got ''"),
        ("peak_flops", {"float16": 1e12}, "peak_flops: expected a rate by precision, float32 among them"),
        ("peak_flops", {"float32": -1}, "peak_flops.float32: expected a finite number above 0, got -1"),
        ("sources", {}, "sources.cores: expected where the figure comes from, got None"),
        ("sources", [], "sources: expected a text by field"),
        ("colour", "green", "colour: unknown"),
    ],
)
def test_a_bad_field_is_named(tmp_path, field, value, says):
    file = tmp_path / "bad.json"
    file.write_text(json.dumps({**content(), field: value}))
    with pytest.raises(ValueError, match=says):
        load_device(file)


def test_a_missing_field_is_named(tmp_path):
    file = tmp_path / "bad.json"
    short = content()
    del short["launch_overhead_s"]
    file.write_text(json.dumps(short))
    with pytest.raises(ValueError, match="launch_overhead_s: missing"):
        load_device(file)


def test_files_that_are_no_descriptions(tmp_path):
    with pytest.raises(ValueError, match=r"cannot read device .*: No such file"):
        load_device(tmp_path / "none.json")
    file = tmp_path / "bad.json"
    for text, says in (("{", "not JSON"), ("[]", "expected an object")):
        file.write_text(text)
        with pytest.raises(ValueError, match=says):
            load_device(file)
    with pytest.raises(ValueError, match=r"gpu:v100.*got 'gpu:v1000'"):
        load_device("gpu:v1000")


def test_precisions_without_a_figure_are_refused():
    with pytest.raises(
        ValueError, match="precision: expected one of float32 on cpu:broadwell, got 'float16'"
    ):
        load_device("cpu:broadwell").peak("float16")
    with pytest.raises(ValueError, match="launch_overhead_s"):
        load_device("gpu:v100").with_(launch_overhead_s=-1.0)
