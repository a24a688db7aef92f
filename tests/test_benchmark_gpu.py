"""benchmarks/gpu.py goes through on a machine without a GPU: its static part, and a rehearsal of the rest."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from mprec.triton_kernels import catalogue, static

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "gpu.py"


def run(*arguments):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_static_part(tmp_path):
    path = tmp_path / "static.json"
    out = run("--static", "--targets", "sm_90", "--cases", "row_cache", "--output", path)
    assert "lookup_kernel" in out
    kernels = {launch["kernel"] for launch in json.loads(path.read_text())["launches"]}
    assert kernels == {"lookup_kernel", "list_kernel"}


def test_a_folder_that_cannot_be_written_costs_nothing(tmp_path):
    (tmp_path / "file").write_text("")
    out = run("--interpret", "--no-tests", "--samples", 1, "--cases", "row_cache", "--output",
              tmp_path / "file" / "gpu.csv")  # fmt: skip
    assert "cannot be written" in out
    written = Path(out.split("writing ")[1].split()[0])
    rows = list(csv.DictReader(written.open()))
    written.unlink()
    assert {row["candidate"] for row in rows} == {"mprec", "torch"}


def test_whole_paths(tmp_path):
    path = tmp_path / "gpu.csv"
    out = run("--interpret", "--no-tests", "--samples", 3, "--cases", "whole path", "--output", path)
    assert "no failures" in out
    rows = list(csv.DictReader(path.open()))
    found = {(row["case"].split()[-1], row["candidate"], row["mode"]) for row in rows}
    ways = {
        ("mprec", "call"),
        ("mprec", "graph"),
        ("torch", "call"),
        ("torch", "graph"),
        ("compile_path", "call"),
    }
    assert found == {(kind, *way) for kind in ("table", "dhe") for way in ways}
    assert all(float(row["max_error"]) < 1e-4 for row in rows if row["candidate"] != "torch")


@pytest.mark.slow
def test_rehearsal(tmp_path):
    path = tmp_path / "gpu.csv"
    out = run("--interpret", "--samples", 3, "--output", path)
    assert "no failures" in out
    rows = list(csv.DictReader(path.open()))
    measured = {(row["case"], row["samples"], row["mode"]) for row in rows if row["candidate"] == "mprec"}
    paths = {"whole path kaggle d16 table", "whole path kaggle d16 dhe"}
    assert {mode for _, _, mode in measured} == {"call", "graph"}
    assert {case for case, _, _ in measured} == {case.name for case in catalogue.CASES} | paths
    assert {row["case"] for row in rows if row["candidate"] == "compile_path"} == paths
    own = [row for row in rows if row["candidate"] != "fbgemm"]  # which has not every dtype on every device
    assert all(float(row["p50_us"]) > 0 for row in own)
    assert not any(row["note"] for row in own)


def test_committed_results_cover_the_catalogue():
    document = json.loads((SCRIPT.parent / "results" / "gpu_static.json").read_text())
    seen = {(launch["case"], launch["target"]) for launch in document["launches"]}
    assert seen == {
        (case.name, target) for case in catalogue.CASES for target in static.TARGETS if case.serves(target)
    }
    for launch in document["launches"]:
        assert "error" not in launch, launch
        assert launch["shared"] <= static.SHARED_LIMIT[launch["target"]]
        assert launch.get("warnings", []) == []
        assert launch.get("spills_in_hot_loop", 0) == 0
