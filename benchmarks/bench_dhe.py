"""``pytest benchmarks/bench_dhe.py --benchmark-enable``: deep hash embeddings beside their peers.

One thread, new random IDs at every call. ``compare.py`` gives ratios; this gives distributions.
"""

import itertools

import pytest
import torch
from compare_dhe import make_module, module_call, native_call, pack, uniform
from dhe_peers import SHAPES, Artifact, GoodTorch

BATCHES = (1, 16, 128, 2048)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(before)


def candidates(shape: str, batch: int):
    universal, artifact = make_module(shape), make_module(shape, "artifact")
    return {
        "module": lambda: module_call(universal, batch),
        "float32": lambda: native_call(pack(universal), batch),
        "float16": lambda: native_call(pack(universal, "float16"), batch),
        "bfloat16": lambda: native_call(pack(universal, "bfloat16"), batch),
        "int8": lambda: native_call(pack(universal, "int8"), batch),
        "lut": lambda: native_call(pack(make_module(shape, "sign"), "lut"), batch),
        "torch": lambda: GoodTorch(universal),
        "artifact in torch": lambda: Artifact(artifact),
        "artifact family": lambda: module_call(artifact, batch),
    }


@pytest.mark.parametrize("candidate", list(candidates("1024-128-16", 1)))
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward(benchmark, shape, batch, candidate):
    benchmark.group = f"{shape} batch {batch}"
    call, make_ids = candidates(shape, batch)[candidate](), uniform(batch)
    inputs = itertools.cycle([make_ids() for _ in range(64)])
    result = benchmark(lambda: call(next(inputs)))
    assert result is None or torch.isfinite(result).all()
