"""Embedding bags by table format, batch and pooling, beside torch: a pytest-benchmark suite.

``pytest benchmarks/bench_embedding_bag.py --benchmark-enable``

Fresh uniform IDs in every round; one thread. Tables of 10,000 rows lie in cache, of 2,000,000 out of it.
"""

import pytest
import torch

from mprec import huge_pages
from mprec._native import _C

DIM = 64
quantized = torch.ops.quantized


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.inference_mode():
        yield
    torch.set_num_threads(before)


def _table(rows: int, form: str) -> tuple[torch.Tensor, int | None]:
    values = torch.rand(rows, DIM)
    if form == "int8":
        return quantized.embedding_bag_byte_prepack(values), 8
    if form == "int4":
        return quantized.embedding_bag_4bit_prepack(values), 4
    return huge_pages.empty(rows, DIM, dtype=getattr(torch, form)).copy_(values), None


def _rounds(benchmark, call, rows: int, n: int) -> None:
    benchmark.pedantic(call, setup=lambda: ((torch.randint(0, rows, (n,)),), {}), rounds=50, warmup_rounds=3)


@pytest.mark.parametrize("rows", [10_000, 2_000_000])
@pytest.mark.parametrize("form", ["float32", "float16", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize(("batch", "pooling"), [(1, 1), (128, 1), (128, 20), (2048, 20)])
def test_mprec(benchmark, rows, form, batch, pooling):
    table, bits = _table(rows, form)
    offsets, out = torch.arange(0, batch * pooling + 1, pooling), torch.empty(batch, DIM)

    def call(ids):
        _C.embedding_bag(table, ids, offsets, None, 0, True, -1, out, 1, bits)

    _rounds(benchmark, call, rows, batch * pooling)


@pytest.mark.parametrize("rows", [10_000, 2_000_000])
@pytest.mark.parametrize("form", ["float32", "float16", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize(("batch", "pooling"), [(1, 1), (128, 1), (128, 20), (2048, 20)])
def test_torch(benchmark, rows, form, batch, pooling):
    table, _ = _table(rows, form)
    offsets = torch.arange(0, batch * pooling, pooling)
    call = {
        "int8": lambda ids: quantized.embedding_bag_byte_rowwise_offsets(table, ids, offsets),
        "int4": lambda ids: quantized.embedding_bag_4bit_rowwise_offsets(table, ids, offsets),
    }.get(form, lambda ids: torch.embedding_bag(table, ids, offsets, False, 0, False, None))
    _rounds(benchmark, call, rows, batch * pooling)
