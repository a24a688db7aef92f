"""A base install: what it lacks is named, with the extra that brings it; benchmarks are collected."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

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


def test_benchmarks_are_collected():
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "benchmarks", "--collect-only", "-q"], cwd=root, capture_output=True,
        text=True, timeout=120, env={**os.environ, "PYTEST_ADDOPTS": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    for suite in ("bench_embedding_bag", "bench_embedding", "bench_dhe"):
        assert f"benchmarks/{suite}.py" in done.stdout
