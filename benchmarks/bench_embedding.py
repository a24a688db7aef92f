"""Look-ups without pooling, forward and backward, beside torch: a pytest-benchmark suite.

``pytest benchmarks/bench_embedding.py``

Uniform IDs, one thread. From how many IDs on ``mprec.ops.embedding`` takes its gradient from the native
kernel instead of torch is read off here.
"""

import pytest
import torch
import torch.nn.functional as F

from mprec import ops

BATCHES = [1, 2048, 8192, 50_000]


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _native(ids: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    each = torch.arange(len(ids) + 1)
    return ops.embedding_bag(ids, weight, each, mode="sum", include_last_offset=True)


CALLS = {"mprec": ops.embedding, "mprec, native gradient": _native, "torch": F.embedding}


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("rows", [1000, 300_000])
@pytest.mark.parametrize("who", CALLS)
def test_look_up(benchmark, rows, batch, who):
    weight, ids = torch.randn(rows, 64), torch.randint(rows, (batch,))
    with torch.inference_mode():
        benchmark(CALLS[who], ids, weight)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("rows", [1000, 300_000])
@pytest.mark.parametrize("who", CALLS)
def test_gradient(benchmark, rows, batch, who):
    weight, ids = torch.randn(rows, 64, requires_grad=True), torch.randint(rows, (batch,))
    out = CALLS[who](ids, weight)
    grad = torch.ones_like(out)
    benchmark(torch.autograd.grad, out, weight, grad, retain_graph=True)
