"""Rows in float8: every code, and pooling against torch's own conversion in float64."""

import itertools

import pytest
import torch

from mprec._native import _C
from mprec.nn import EmbeddingBagCollection, FeatureConfig, QuantizedEmbeddingBagCollection, QuantizedTable
from mprec.row_formats import row_format
from mprec.testing import isa, runnable_isas

CODE = row_format("float8").code


def rows_of(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return torch.cat([codes, scales[:, None].view(torch.uint8)], dim=1)


def pooled(rows, ids, offsets, mode=0, weights=None):
    out = torch.empty(len(offsets) - 1, rows.shape[1] - 4)
    _C.embedding_bag(rows, ids, offsets, weights, mode, True, -1, out, 1, CODE)
    return out


@pytest.mark.parametrize("name", runnable_isas())
@pytest.mark.parametrize("dim", [1, 3, 4, 7, 8, 9, 16, 21, 64, 256])
def test_every_code_is_what_torch_says(name, dim):
    codes = torch.arange(256, dtype=torch.uint8).repeat(dim).reshape(-1, dim)
    scales = torch.rand(len(codes), generator=torch.Generator().manual_seed(0)) + 0.5
    expected = codes.view(torch.float8_e4m3fn).float() * scales[:, None]
    with isa(name):
        out = pooled(rows_of(codes, scales), torch.arange(len(codes)), torch.arange(len(codes) + 1))
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out[~out.isnan()], expected[~expected.isnan()])


@pytest.mark.parametrize("mode", [0, 1, 2])
@pytest.mark.parametrize("weighted", [False, True])
def test_bags(mode, weighted):
    if weighted and mode == 2:
        return
    generator = torch.Generator().manual_seed(mode)
    weight = torch.randn(40, 24, generator=generator)
    table = QuantizedTable(weight, "float8")
    ids, offsets = torch.randint(40, (30,), generator=generator), torch.tensor([0, 0, 3, 20, 30])
    factors = torch.randn(30, generator=generator) if weighted else None
    vectors = table.dequantize().double()[ids] * (1 if factors is None else factors[:, None].double())
    for name in runnable_isas():
        with isa(name):
            out = pooled(table.rows, ids, offsets, mode, factors)
        for bag, (begin, end) in enumerate(itertools.pairwise(offsets)):
            part = vectors[begin:end]
            want = part.sum(0) if mode == 0 else part.mean(0) if mode == 1 else None
            if mode == 2 and len(part):
                want = part.amax(0)
            want = torch.zeros(24, dtype=torch.float64) if not len(part) else want
            torch.testing.assert_close(out[bag].double(), want, rtol=1e-5, atol=1e-5)


def test_an_infinite_weight_of_a_sample_gives_infinity():
    table = QuantizedTable(torch.ones(2, 8), "float8")
    out = pooled(table.rows, torch.tensor([1]), torch.tensor([0, 1]), 0, torch.tensor([torch.inf]))
    assert bool((out == torch.inf).all())


def test_relative_error():
    weight = torch.randn(200, 64, generator=torch.Generator().manual_seed(1))
    weight[5] = 0
    found = QuantizedTable(weight, "float8").dequantize()
    bound = torch.maximum(weight.abs() / 16, weight.abs().amax(1, keepdim=True) * 2**-6 / 448 / 16)
    assert bool(((found - weight).abs() <= bound).all())
    for bad in (torch.inf, torch.nan):
        with pytest.raises(ValueError, match="float8 is for finite numbers"):
            QuantizedTable(torch.tensor([[1.0, bad]]), "float8")


def test_a_collection_in_float8():
    features = [FeatureConfig("a", 30, 5), FeatureConfig("b", 20, 16, mode="mean")]
    collection = EmbeddingBagCollection(features)
    small = QuantizedEmbeddingBagCollection(collection, tables="float8")
    assert small.nbytes == 30 * (5 + 4) + 20 * (16 + 4)
    ids, offsets = torch.arange(8), torch.tensor([0, 1, 4, 6, 8])
    with torch.no_grad():
        exact = collection(ids, offsets)
    torch.testing.assert_close(small(ids, offsets), exact, rtol=0.1, atol=0.05)
