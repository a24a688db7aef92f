"""Look-ups without pooling, forward and backward, beside torch: a pytest-benchmark suite.

``pytest benchmarks/bench_embedding.py``

Uniform IDs, one thread. From how many IDs on ``mprec.ops.embedding`` takes its gradient from the native
kernel instead of torch is read off here.
"""

import pytest
import torch
import torch.nn.functional as F

from mprec import nn, ops

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


#: 26 features looked up side by side, as models do that keep an embedding for each.
SIDE_BY_SIDE = {
    "torch, each by itself": lambda plain, ours, all_, ids: [m(i) for m, i in zip(plain, ids, strict=True)],
    "mprec, each by itself": lambda plain, ours, all_, ids: [m(i) for m, i in zip(ours, ids, strict=True)],
    "mprec, together": lambda plain, ours, all_, ids: nn.embed_together(ours, ids),
    "mprec, a collection": lambda plain, ours, all_, ids: all_(
        torch.cat(ids), torch.arange(len(ids) * len(ids[0]) + 1)
    ),
}


@pytest.mark.parametrize("batch", [1, 128, 2048])
@pytest.mark.parametrize("who", SIDE_BY_SIDE)
def test_26_features(benchmark, batch, who):
    all_ = nn.EmbeddingBagCollection([nn.FeatureConfig(f"f{i}", 20_000, 16) for i in range(26)])
    weights = [table.weight.detach() for table in all_.tables.values()]
    plain = [torch.nn.Embedding.from_pretrained(w, freeze=False) for w in weights]
    ours = [nn.Embedding.from_pretrained(w, freeze=False) for w in weights]
    ids = [torch.randint(20_000, (batch,)) for _ in weights]

    with torch.inference_mode():
        benchmark(SIDE_BY_SIDE[who], plain, ours, all_, ids)
