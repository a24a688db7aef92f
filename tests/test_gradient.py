"""Row gradients of tables against a float64 loop, on every ISA; results do not depend on threads."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mprec import _native
from mprec.testing import isa, runnable_isas

ISAS = runnable_isas()


def _bags(
    generator: torch.Generator, rows: int, bags: int, longest: int
) -> tuple[torch.Tensor, torch.Tensor]:
    lengths = torch.randint(0, longest + 1, (bags,), generator=generator)
    lengths[0] = max(int(lengths[0]), 1)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    # squared: hot rows, as in a click log
    ids = (torch.rand(int(offsets[-1]), generator=generator).square() * rows).long()
    return ids, offsets


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 3000),
    dim=st.integers(1, 130),
    bags=st.integers(1, 40),
    longest=st.integers(1, 60),
    mode=st.sampled_from([0, 1]),
    padded=st.booleans(),
    weighted=st.booleans(),
    wide=st.booleans(),
    name=st.sampled_from(ISAS),
)
def test_sparse_gradient_against_float64(seed, rows, dim, bags, longest, mode, padded, weighted, wide, name):
    generator = torch.Generator().manual_seed(seed)
    ids, offsets = _bags(generator, rows, bags, longest)
    padding = int(ids[0]) if padded else -1
    weights = torch.rand(len(ids), generator=generator) if weighted else None
    grad = torch.randn(bags, dim, generator=generator)
    dtype = torch.int64 if wide else torch.int32
    found, values = torch.empty(len(ids), dtype=torch.int64), torch.full((len(ids), dim), torch.nan)
    with isa(name):
        count = _native._C.sparse_gradient(
            ids.to(dtype), offsets.to(dtype), weights, mode, padding, rows, grad, found, values, 2
        )
    table, magnitude = torch.zeros(2, rows, dim, dtype=torch.float64)
    for bag in range(bags):
        inside = [i for i in range(int(offsets[bag]), int(offsets[bag + 1])) if int(ids[i]) != padding]
        for i in inside:
            scale = 1.0 if weights is None else float(weights[i])
            term = scale / (len(inside) if mode == 1 else 1) * grad[bag].double()
            table[ids[i]] += term
            magnitude[ids[i]] += term.abs()
    expected = sorted({int(i) for i in ids} - {padding})
    assert found[:count].tolist() == expected
    # n float32 additions err by at most about n/2 ulp of the sum of magnitudes; n < 2400
    error = (values[:count].double() - table[expected]).abs()
    assert (error <= 2e-5 * magnitude[expected] + 1e-7).all()


@pytest.mark.parametrize("name", ISAS)
@pytest.mark.parametrize("rule", [1, 2, 3, 4])
def test_result_does_not_depend_on_threads(name, rule):
    generator = torch.Generator().manual_seed(2)
    ids, offsets = _bags(generator, 500, 700, 20)
    grad = torch.randn(700, 21, generator=generator)
    results = []
    for threads in (1, 2, 5):
        weight = torch.zeros(500, 21)
        first, second = torch.zeros(500, 1 if rule == 3 else 21), torch.zeros(500, 21)
        with isa(name):
            _native._C.update_tables(
                [weight],
                [first] if rule > 1 else None,
                [second] if rule == 4 else None,
                ids,
                offsets,
                None,
                1,
                -1,
                grad,
                None,
                rule,
                0.1,
                1e-8,
                0.9,
                0.99,
                0.9,
                None,
                threads,
            )
        results.append((weight, first, second))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    assert results[0][0].abs().sum() > 0
