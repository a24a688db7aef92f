"""A base install: what it lacks is named, with the extra that brings it; benchmarks are collected."""

import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import mprec

WITHOUT = """
import sys
for name in ("rich", "matplotlib", "jinja2", "sklearn"):
    sys.modules[name] = None  # as if it were not installed
"""


def run(script):
    return subprocess.run(
        [sys.executable, "-c", WITHOUT + script], capture_output=True, text=True, timeout=120
    )


def test_the_library_needs_none_of_them():
    script = """
import torch, mprec.nn, mprec.optim, mprec.models, mprec.planner, mprec.cache, mprec.training, mprec.serving
model = mprec.nn.swap(torch.nn.Sequential(torch.nn.EmbeddingBag(9, 4))).model
print(model(torch.tensor([[1, 2]])).shape)
"""
    done = run(script)
    assert done.returncode == 0, done.stderr
    assert "[1, 4]" in done.stdout


@pytest.mark.parametrize("command", ["demo", "plan", "simulate"])
def test_the_command_names_the_extra(command):
    done = run(f"from mprec.cli import main; sys.exit(main(['{command}']))")
    assert done.returncode == 2
    assert "pip install 'mprec[cli]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_codebooks_name_the_extra():
    make = "centroids_of(torch.rand(9, 2), torch.ones(9), 0)"
    done = run(f"import torch; from mprec.cache.codebook import centroids_of; {make}")
    assert "pip install 'mprec[cli]'" in done.stderr


def test_a_base_install_is_small_and_describes_itself():
    described = metadata.metadata("mprec")
    needed = {re.match(r"[\w-]+", r)[0] for r in metadata.requires("mprec") if "extra ==" not in r}
    assert needed == {"numpy", "torch", "triton", "orjson", "scipy"}
    assert {"cli", "serve", "loadgen", "tables"} <= set(described.get_all("Provides-Extra"))
    assert "Typing :: Typed" in described.get_all("Classifier")
    assert described["Keywords"]
    assert described.get_all("Project-URL")


@pytest.mark.skipif(shutil.which("readelf") is None, reason="readelf is not installed")
def test_the_native_module_brings_no_runtime_of_threads():
    """A wheel that is made portable would hold a second OpenMP beside torch's."""
    said = subprocess.run(["readelf", "-d", mprec._C.__file__], capture_output=True, text=True, check=True)
    libraries = set(re.findall(r"NEEDED.*\[(\w+)", said.stdout))
    assert "libc" in libraries
    assert libraries <= {"libc", "libm", "libstdc", "libgcc_s", "libpthread", "libdl", "librt", "ld"}


def test_a_build_without_a_compiler_says_what_is_needed(tmp_path):
    pytest.importorskip("scikit_build_core")
    folder = str(tmp_path)
    build = f"build_wheel({folder!r}, {{'build-dir': {folder + '/build'!r}}})"
    done = subprocess.run(
        [sys.executable, "-c", f"from scikit_build_core.build import build_wheel; {build}"],
        cwd=Path(__file__).parent.parent, env={**os.environ, "CXX": folder + "/g++"},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode != 0
    assert "built from C++ by g++, from version 11 on" in done.stdout + done.stderr


def test_benchmarks_are_collected():
    root = Path(__file__).parent.parent
    # As a user starts it: where xdist is on, benchmarks are off.
    own = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "benchmarks", "--benchmark-only", "--collect-only", "-q"], cwd=root,
        capture_output=True, text=True, timeout=120, env=own,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    for suite in ("bench_embedding_bag", "bench_embedding", "bench_dhe"):
        assert f"benchmarks/{suite}.py" in done.stdout
