"""16-bit and quantised tables of the native embedding bag, on every runnable ISA."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_embedding_bag_kernels import MAX, MEAN, SUM, each_isa, ragged, reference

from mprec import _C
from mprec.testing import isa

quantized = torch.ops.quantized
FORMATS = ["float16", "bfloat16", "int8", "int4"]


def stored(weight, name):
    """The table in its format, `bits`, and the float64 values that it holds (by torch's own unpacking)."""
    if name == "int8":
        rows = quantized.embedding_bag_byte_prepack(weight)
        return rows, 8, quantized.embedding_bag_byte_unpack(rows).double()
    if name == "int4":
        rows = quantized.embedding_bag_4bit_prepack(weight)
        return rows, 4, quantized.embedding_bag_4bit_unpack(rows).double()
    rows = weight.to(getattr(torch, name))
    return rows, None, rows.double()


def pooled(rows, bits, dim, indices, offsets, mode=SUM, psw=None, padding=-1, dtype=torch.float32, threads=1):
    out = torch.full((len(offsets) - 1, dim), torch.nan, dtype=dtype)
    _C.embedding_bag(rows, indices, offsets, psw, mode, True, padding, out, threads, bits)
    return out


@each_isa
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(
    ("mode", "weighted"), [(SUM, False), (SUM, True), (MEAN, False), (MEAN, True), (MAX, False)]
)
def test_every_dim(name, form, mode, weighted):
    g = torch.Generator().manual_seed(mode)
    with isa(name):
        for dim in [*range(1, 131), 200, 256, 258, 300]:
            if form == "int4" and dim % 2:
                continue
            rows, bits, values = stored(torch.randn(11, dim, generator=g), form)
            indices, offsets = ragged(g, 11, 7, 6)
            psw = torch.randn(len(indices), generator=g) if weighted else None
            for padding in (-1, 3):
                out = pooled(rows, bits, dim, indices, offsets, mode, psw, padding)
                expected = reference(values, indices, offsets, mode, psw, padding)
                torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=2e-5, msg=f"dim {dim}")


@each_isa
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_shape(name, data):
    """Tables of any formats and widths, bags of any lengths, in one call."""
    draw = data.draw
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    bags, mode = draw(st.integers(0, 40)), draw(st.sampled_from([SUM, MEAN, MAX]))
    tables, parts, dims = [], [], []
    for form in draw(st.lists(st.sampled_from(["float32", *FORMATS]), min_size=1, max_size=4)):
        num_rows, dim = draw(st.integers(1, 40)), draw(st.integers(1, 140))
        dims.append(dim + dim % 2 if form == "int4" else dim)
        tables.append(stored(torch.randn(num_rows, dims[-1], generator=g), form))
        parts.append(ragged(g, num_rows, bags, draw(st.sampled_from([1, 3, 70]))))
    types = st.sampled_from([torch.int32, torch.int64])
    indices = torch.cat([ids for ids, _ in parts]).to(draw(types))
    ends = torch.cat([offsets.diff() for _, offsets in parts]).cumsum(0)
    offsets = torch.cat([ends.new_zeros(1), ends]).to(draw(types))
    weighted = mode != MAX and draw(st.booleans())
    psw = torch.randn(len(indices), generator=g) if weighted else None
    out = torch.full((bags, sum(dims)), torch.nan)
    rows, bits = [t[0] for t in tables], [t[1] or 0 for t in tables]
    with isa(name):
        _C.embedding_bag_multi(
            rows, indices, offsets, psw, mode, -1, out, None, draw(st.integers(1, 3)), bits
        )
    psw = [None] * len(parts) if psw is None else psw.split([len(ids) for ids, _ in parts])
    for got, (_, _, values), (ids, off), p in zip(out.split(dims, dim=1), tables, parts, psw, strict=True):
        torch.testing.assert_close(got.double(), reference(values, ids, off, mode, p), rtol=1e-4, atol=2e-4)


@each_isa
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("start", [0, 1, 3])
def test_rows_at_any_address(name, form, start):
    """Tables that begin at odd places and end where their memory does; strided rows."""
    g = torch.Generator().manual_seed(start)
    for dim in (2, 10, 16, 30):
        rows, bits, values = stored(torch.randn(6, dim, generator=g), form)
        raw = torch.zeros(start + 6 * (rows.shape[1] + start), dtype=rows.dtype)
        table = raw[start:].view(6, -1)[:, : rows.shape[1]]
        table.copy_(rows)
        indices, offsets = torch.tensor([5, 0, 5, 3]), torch.tensor([0, 1, 1, 4])
        with isa(name):
            out = pooled(table, bits, dim, indices, offsets)
        torch.testing.assert_close(
            out.double(), reference(values, indices, offsets, SUM), rtol=1e-5, atol=1e-5
        )


@each_isa
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", ["float32", *FORMATS])
def test_16_bit_results(name, dtype, form):
    g = torch.Generator().manual_seed(0)
    for dim in (2, 14, 16, 46, 300):
        rows, bits, _ = stored(torch.randn(50, dim, generator=g), form)
        indices, offsets = ragged(g, 50, 700, 5)
        with isa(name):
            wide = pooled(rows, bits, dim, indices, offsets)
            for threads in (1, 2):
                narrow = pooled(rows, bits, dim, indices, offsets, dtype=dtype, threads=threads)
                assert torch.equal(narrow, wide.to(dtype))  # pooled in float32, rounded once


@each_isa
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_conversions_of_every_value(name, dtype):
    """Every 16-bit pattern is read, and results on and beside rounding boundaries written, as torch does."""
    every = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(dtype).view(-1, 64)
    one_each = torch.arange(len(every))
    offsets = torch.arange(len(every) + 1)
    with isa(name):
        out = pooled(every, None, 64, one_each, offsets)
        torch.testing.assert_close(out, every.float(), rtol=0, atol=0, equal_nan=True)
        exact = every.float()[every.float().isfinite()]
        exact = torch.cat([exact, exact * (1 + 2**-12), exact * (1 - 2**-12), exact * (1 + 2**-9)])
        exact = torch.cat(
            [exact, exact + exact.abs() * 2**-11, torch.tensor([torch.inf, -torch.inf, torch.nan])]
        )
        table = exact[: len(exact) // 32 * 32].view(-1, 32)
        ids, off = torch.arange(len(table)), torch.arange(len(table) + 1)
        out = pooled(table, None, 32, ids, off, dtype=dtype)
        torch.testing.assert_close(out, table.to(dtype), rtol=0, atol=0, equal_nan=True)
        nans = torch.tensor([[torch.nan, torch.inf, -torch.inf, 7e4, -7e4, 65519.9, 65520.0, 1e-8]])
        out = pooled(nans, None, 8, torch.tensor([0]), torch.tensor([0, 1]), dtype=dtype)
        torch.testing.assert_close(out, nans.to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("weighted", [False, True])
def test_against_torchs_quantised_operators(weighted):
    g = torch.Generator().manual_seed(4)
    weight = torch.randn(100, 64, generator=g)
    indices, offsets = ragged(g, 100, 30, 20)
    psw = torch.randn(len(indices), generator=g) if weighted else None
    for bits, prepack, op in (
        (8, quantized.embedding_bag_byte_prepack, quantized.embedding_bag_byte_rowwise_offsets),
        (4, quantized.embedding_bag_4bit_prepack, quantized.embedding_bag_4bit_rowwise_offsets),
    ):
        rows = prepack(weight)
        expected = op(rows, indices, offsets, per_sample_weights=psw, include_last_offset=True)
        out = pooled(rows, bits, 64, indices, offsets, psw=psw)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-4)


@each_isa
def test_tables_of_all_formats_and_batch_sizes_in_one_call(name):
    g = torch.Generator().manual_seed(9)
    forms = ["float32", "float16", "int8", "int4", "bfloat16", "int8"]
    dims, batches = [16, 8, 64, 10, 33, 16], [500, 1, 0, 700, 3, 400]
    tables = [
        stored(torch.randn(40 + t, d, generator=g), f)
        for t, (f, d) in enumerate(zip(forms, dims, strict=True))
    ]
    parts = [ragged(g, 40 + t, b, 9) for t, b in enumerate(batches)]
    indices = torch.cat([i for i, _ in parts]).int()
    offsets = torch.cat(
        [torch.zeros(1, dtype=torch.int64), torch.cat([o.diff() for _, o in parts]).cumsum(0)]
    )
    rows, bits = [t[0] for t in tables], [t[1] or 0 for t in tables]
    for threads in (1, 2, 4):
        out = torch.full((sum(d * b for d, b in zip(dims, batches, strict=True)),), torch.nan)
        with isa(name):
            _C.embedding_bag_multi(
                rows, indices, offsets, None, MEAN, -1, out, None, threads, bits, batch_sizes=batches
            )
        at = 0
        for (_, _, values), (ids, off), d, b in zip(tables, parts, dims, batches, strict=True):
            expected = reference(values, ids, off, MEAN)
            got = out[at : at + d * b].view(b, d)
            torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)
            at += d * b


def test_bad_arguments():
    w = torch.randint(0, 255, (5, 12), dtype=torch.uint8)
    i, o, out = torch.tensor([1]), torch.tensor([0, 1]), torch.empty(1, 4)
    _C.embedding_bag(w, i, o, None, SUM, True, -1, out, 1)
    for error, match, rows, bits, result in [
        (ValueError, "bits: expected 8 or 4 or 43, got 2", w, 2, out),
        (ValueError, "expected at least 8 bytes for the scale of a row of int8", w[:, :7], 8, out),
        (ValueError, "out: expected at least 16 columns, got 4", w, 4, out),
        (TypeError, "out: expected float32, float16 or bfloat16, got float64", w, 8, out.double()),
        (TypeError, "weight: expected float32, .* got int8", w.view(torch.int8), 8, out),
    ]:
        with pytest.raises(error, match=match):
            _C.embedding_bag(rows, i, o, None, SUM, True, -1, result, 1, bits)
    f = torch.randn(5, 4)
    for error, match, batches, result, columns in [
        (ValueError, r"batch_sizes\[1\]: expected >= 0, got -1", [2, -1], torch.empty(8), None),
        (ValueError, "batch_sizes: expected one for each of 2, got 1", [1], torch.empty(4), None),
        (ValueError, r"out: expected 1 dimension\(s\)", [1, 0], torch.empty(1, 4), None),
        (ValueError, "out: expected at least 4 elements, got 3", [1, 0], torch.empty(3), None),
        (ValueError, r"offsets: expected 1 \+ the number of bags, 3, got 2", [1, 2], torch.empty(12), None),
        (ValueError, "out_columns, features: not with batch_sizes", [1, 0], torch.empty(4), [0, 0]),
    ]:
        with pytest.raises(error, match=match):
            _C.embedding_bag_multi([f, f], i, o, None, SUM, -1, result, columns, 1, None, batches)
