"""Native embedding-bag kernels of every runnable ISA against float64 torch."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mprec import _C
from mprec.errors import IdOutOfRangeError, InvalidOffsetsError
from mprec.testing import isa, runnable_isas

SUM, MEAN, MAX = 0, 1, 2
each_isa = pytest.mark.parametrize("name", runnable_isas())


def reference(weight, indices, offsets, mode, per_sample_weights=None, padding_idx=-1):
    """[B, D] float64, bag by bag. `offsets` has B + 1 entries."""
    weight = weight.double()
    out = torch.zeros(len(offsets) - 1, weight.shape[1], dtype=torch.float64)
    for b, (begin, end) in enumerate(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)):
        ids = indices[begin:end].long()
        keep = ids != padding_idx
        rows = weight[ids[keep]]
        if per_sample_weights is not None:
            rows = rows * per_sample_weights[begin:end][keep].double().unsqueeze(1)
        if len(rows):
            out[b] = (rows.sum(0), rows.mean(0), rows.max(0).values)[mode]
    return out


def ragged(generator, rows, bags, longest):
    """Indices below `rows` in `bags` bags of 0 to `longest`; offsets with a last entry."""
    lengths = torch.randint(0, longest + 1, (bags,), generator=generator)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    return torch.randint(0, rows, (int(offsets[-1]),), generator=generator), offsets


def single(weight, indices, offsets, mode=SUM, per_sample_weights=None, padding_idx=-1, last=True, threads=1):
    out = torch.full((len(offsets) - last, weight.shape[1]), torch.nan)
    _C.embedding_bag(weight, indices, offsets, per_sample_weights, mode, last, padding_idx, out, threads)
    return out


@each_isa
@pytest.mark.parametrize("mode", [SUM, MEAN, MAX])
@pytest.mark.parametrize("kind", ["plain", "padded", "weighted"])
def test_every_dim(name, mode, kind):
    if kind == "weighted" and mode == MAX:
        pytest.skip("max takes no per-sample weights")
    g = torch.Generator().manual_seed(mode)
    with isa(name):
        for dim in [*range(1, 131), 200, 256, 257, 300]:
            weight = torch.randn(11, dim, generator=g)
            indices, offsets = ragged(g, 11, 7, 6)
            psw = torch.randn(len(indices), generator=g) if kind == "weighted" else None
            padding = 3 if kind == "padded" else -1
            out = single(weight, indices, offsets, mode, psw, padding)
            expected = reference(weight, indices, offsets, mode, psw, padding)
            torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5, msg=f"dim {dim}")


@each_isa
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_shape(name, data):
    draw = data.draw
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    tables, bags = draw(st.integers(1, 5)), draw(st.integers(0, 9))
    mode = draw(st.sampled_from([SUM, MEAN, MAX]))
    types = st.sampled_from([torch.int32, torch.int64])
    weights = [
        torch.randn(draw(st.integers(1, 40)), draw(st.integers(1, 140)), generator=g) for _ in range(tables)
    ]
    parts = [ragged(g, len(w), bags, draw(st.sampled_from([1, 3, 70]))) for w in weights]
    indices = torch.cat([i for i, _ in parts]).to(draw(types))
    lengths = torch.cat([o.diff() for _, o in parts])
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).to(draw(types))
    weighted = mode != MAX and draw(st.booleans())
    psw = torch.randn(len(indices), generator=g) if weighted else None
    padding = draw(st.integers(-1, 4)) if tables == 1 else -1
    threads = draw(st.integers(1, 3))

    width = sum(w.shape[1] for w in weights)
    order = draw(st.permutations(range(tables)))
    columns, column = [0] * tables, draw(st.integers(0, 3))
    for t in order:
        columns[t] = column
        column += weights[t].shape[1] + draw(st.integers(0, 2))
    out = torch.full((bags, column), 7.0)
    with isa(name):
        _C.embedding_bag_multi(weights, indices, offsets, psw, mode, padding, out, columns, threads)
        plain = torch.full((bags, width), torch.nan)
        _C.embedding_bag_multi(weights, indices, offsets, psw, mode, padding, plain, None, threads)

    begin = 0
    for t, (w, (ids, off)) in enumerate(zip(weights, parts, strict=True)):
        p = None if psw is None else psw[begin : begin + len(ids)]
        expected = reference(w, ids, off, mode, p, padding)
        block = out[:, columns[t] : columns[t] + w.shape[1]]
        torch.testing.assert_close(block.double(), expected, rtol=1e-4, atol=1e-4)
        block.fill_(7.0)
        begin += len(ids)
        at = sum(v.shape[1] for v in weights[:t])
        torch.testing.assert_close(plain[:, at : at + w.shape[1]].double(), expected, rtol=1e-4, atol=1e-4)
    assert (out == 7.0).all()  # nothing beside the blocks was touched


@each_isa
@pytest.mark.parametrize("dim", [1, 5, 16, 33, 64])
def test_unaligned_and_strided(name, dim):
    g = torch.Generator().manual_seed(dim)
    indices, offsets = ragged(g, 9, 6, 5)
    storage = torch.randn(1 + 9 * (dim + 3), generator=g)
    weight = storage[1:].view(9, dim + 3)[:, :dim]  # odd start, a gap after each row
    odd = np.zeros(indices.numel() + 1, np.int64)[1:]  # not on a vector's boundary
    odd[:] = indices.numpy()
    out = torch.full((6 * 2, 2 * dim + 1), 7.0)[::2, 1 : dim + 1]
    with isa(name):
        _C.embedding_bag(weight, odd, offsets, None, SUM, True, -1, out, 1)
    torch.testing.assert_close(out.double(), reference(weight, indices, offsets, SUM), rtol=1e-5, atol=1e-5)
    # C++ has no int64 at an odd address: such an array is refused.
    misaligned = np.ndarray(indices.shape, np.int64, buffer=np.zeros(indices.numel() * 8 + 1, np.uint8)[1:])
    with pytest.raises(ValueError, match="indices: expected elements aligned to their 8 bytes"):
        _C.embedding_bag(weight, misaligned, offsets, None, SUM, True, -1, out, 1)


@each_isa
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_many_samples_are_pooled_in_blocks(name, threads):
    """Rows of results of 2 KB to 9 KB: blocks of 32 to 64 samples, cut anywhere between threads."""
    g = torch.Generator().manual_seed(threads)
    for dims, bags, longest in (((16, 3, 490), 333, 1), ((64, 1000, 24, 1100), 200, 3), ((600,), 97, 40)):
        weights = [torch.randn(50 + 7 * t, dim, generator=g) for t, dim in enumerate(dims)]
        lengths = torch.randint(0 if longest > 1 else 1, longest + 1, (len(dims) * bags,), generator=g)
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        indices = torch.randint(0, 50, (int(offsets[-1]),), generator=g)
        out = torch.full((bags, sum(dims)), torch.nan)
        with isa(name):
            _C.embedding_bag_multi(weights, indices, offsets, None, SUM, -1, out, None, threads)
        parts = [
            torch.nn.functional.embedding_bag(
                indices[offsets[t * bags] : offsets[(t + 1) * bags]],
                weight.double(),
                offsets[t * bags : (t + 1) * bags] - offsets[t * bags],
                mode="sum",
            )
            for t, weight in enumerate(weights)
        ]
        torch.testing.assert_close(out.double(), torch.cat(parts, 1), rtol=1e-5, atol=1e-5)
        bad = indices.clone()
        bad[int(offsets[2 * bags // 3])] = 10**6
        with isa(name), pytest.raises(IdOutOfRangeError, match="is 1000000"):
            _C.embedding_bag_multi(weights, bad, offsets, None, SUM, -1, out, None, threads)


@each_isa
def test_threads_do_not_change_bits(name):
    g = torch.Generator().manual_seed(0)
    weights = [torch.randn(1000, d, generator=g) for d in (16, 8, 100)]
    indices, offsets = ragged(g, 1000, 3 * 700, 12)
    outs = []
    with isa(name):
        for threads in (1, 2, 3, 5):
            outs.append(torch.full((700, 124), torch.nan))
            _C.embedding_bag_multi(weights, indices, offsets, None, MEAN, -1, outs[-1], None, threads)
    assert all(torch.equal(outs[0], o) for o in outs[1:])


def test_unweighted_sums_do_not_depend_on_isa():
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(50, 37, generator=g)
    indices, offsets = ragged(g, 50, 20, 30)
    outs = []
    for name in runnable_isas():
        with isa(name):
            outs.append(single(weight, indices, offsets))
    assert all(torch.equal(outs[0], o) for o in outs[1:])


@each_isa
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_nan_as_torch(name, mode):
    weight = torch.randn(8, 19)
    weight[2, 3] = weight[5, ::2] = torch.nan
    weight[1, 4] = -torch.inf
    weight[6, 4] = torch.inf
    indices = torch.tensor([2, 0, 0, 2, 5, 1, 6, 1, 3, 4])
    offsets = torch.tensor([0, 2, 4, 4, 7, 8])
    with isa(name):
        out = single(weight, indices, offsets, ["sum", "mean", "max"].index(mode), last=False)
    expected = torch.nn.functional.embedding_bag(indices, weight, offsets, mode=mode)
    torch.testing.assert_close(out, expected, equal_nan=True)


@each_isa
@pytest.mark.parametrize("last", [True, False])
def test_layouts(name, last):
    weight = torch.randn(5, 12)
    empty = torch.empty(0, dtype=torch.int64)
    with isa(name):
        assert single(weight, empty, torch.zeros(int(last), dtype=torch.int64), last=last).shape == (0, 12)
        for mode in (SUM, MEAN, MAX):
            assert (
                single(weight, empty, torch.zeros(3 + last, dtype=torch.int32), mode, last=last) == 0
            ).all()
            none = single(weight, torch.tensor([2, 2]), torch.tensor([0, 2][: 1 + last]), mode, None, 2, last)
            assert (none == 0).all()  # nothing but padding
        assert (single(torch.empty(0, 12), empty, torch.tensor([0, 0])) == 0).all()
        assert single(torch.empty(3, 0), torch.tensor([1]), torch.tensor([0, 1])).shape == (1, 0)


@each_isa
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("ids", [torch.int32, torch.int64])
@pytest.mark.parametrize("bad", [-1, 100, 2**31 - 1, -(2**31), 2**40, -(2**63)])
def test_bad_ids(name, threads, ids, bad):
    if ids == torch.int32 and abs(bad) > 2**31:
        pytest.skip("not an int32")
    weights = [torch.randn(100 + t, 16) for t in range(3)]
    for position in (0, 17, 900, 2000, 5999):
        indices = torch.zeros(6000, dtype=ids)
        indices[position] = bad
        offsets = torch.arange(0, 6001, 2)
        feature, bag = divmod(position // 2, 1000)
        bound = 100 + feature
        if 0 <= bad < bound:
            continue
        out = torch.empty(1000, 48)
        with isa(name), pytest.raises(IdOutOfRangeError) as error:
            _C.embedding_bag_multi(weights, indices, offsets, None, SUM, -1, out, None, threads)
        text = str(error.value)
        assert (
            f"indices[{position}] (feature {feature}, bag {bag}) is {bad}, "
            f"not in the valid range [0, {bound})" in text
        )


@each_isa
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(
    ("position", "value", "match"),
    [
        (0, 1, r"offsets\[0\] \(feature 0, bag 0\) is 1, expected 0"),
        (0, -1, r"offsets\[0\] .* is -1, expected 0"),
        (5, 4, r"offsets\[5\] \(feature 0, bag 5\) is 4, less than the offset before it, 8"),
        (5, -7, r"offsets\[5\] .* is -7, less than the offset before it, 8"),
        (1500, 2**40, r"offsets\[1500\] .feature 1, bag 500. is 1099511627776, expected at most the number"),
        (1000, 5999, r"offsets\[1001\] .* is 2002, less than the offset before it, 5999"),
        (3000, 5999, r"offsets\[3000\] \(the end\) is 5999, expected the number of indices, 6000"),
        (3000, 6001, r"offsets\[3000\] \(the end\) is 6001"),
    ],
)
def test_bad_offsets(name, threads, position, value, match):
    weights = [torch.randn(100 + t, 16) for t in range(3)]
    offsets = torch.arange(0, 6001, 2)
    offsets[position] = value
    indices = torch.full((6000,), 99)
    indices[4000:] = 101  # valid for the last table only: bags must not borrow a neighbour's validation
    with isa(name), pytest.raises(InvalidOffsetsError, match=match):
        _C.embedding_bag_multi(weights, indices, offsets, None, SUM, -1, torch.empty(1000, 48), None, threads)


@each_isa
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_garbage_is_an_error_or_right(name, data):
    """Arbitrary offsets and IDs: an exception, or the reference's result."""
    numbers = st.lists(st.integers(-2, 12), min_size=0, max_size=12)
    indices = torch.tensor(data.draw(numbers), dtype=torch.int64)
    offsets = torch.tensor(sorted(data.draw(numbers)) if data.draw(st.booleans()) else data.draw(numbers))
    offsets = offsets.long()
    tables = data.draw(st.sampled_from([1, 2, 3]))
    weights = [torch.randn(4 + 3 * t, 5) for t in range(tables)]
    valid = len(offsets) % tables == 1 % tables and len(offsets) > 0
    valid = valid and offsets[-1] == len(indices) and offsets[0] == 0
    valid = valid and bool((offsets.diff() >= 0).all())
    batch = (len(offsets) - 1) // tables
    if valid:
        for t, w in enumerate(weights):
            ids = indices[offsets[t * batch] : offsets[(t + 1) * batch]]
            valid = valid and bool(((ids >= 0) & (ids < len(w))).all())
    out = torch.empty(max(batch, 0), 5 * tables)
    with isa(name):
        if not valid:
            with pytest.raises((IdOutOfRangeError, InvalidOffsetsError)):
                _C.embedding_bag_multi(weights, indices, offsets, None, SUM, -1, out, None, 1)
            return
        _C.embedding_bag_multi(weights, indices, offsets, None, SUM, -1, out, None, 1)
    for t, w in enumerate(weights):
        expected = reference(w, indices, offsets[t * batch : (t + 1) * batch + 1], SUM)
        torch.testing.assert_close(out[:, 5 * t : 5 * t + 5].double(), expected, rtol=1e-5, atol=1e-5)


def test_bad_arguments():
    w, i, o, out = torch.randn(5, 4), torch.tensor([1, 2]), torch.tensor([0, 2]), torch.empty(1, 4)

    def call(weight=w, indices=i, offsets=o, psw=None, mode=SUM, out=out):
        _C.embedding_bag(weight, indices, offsets, psw, mode, True, -1, out, 1)

    call()
    for error, match, arguments in [
        (TypeError, "indices: expected int32 or int64, got float32", {"indices": i.float()}),
        (TypeError, "weight: expected float32, float16, bfloat16 or uint8", {"weight": w.double()}),
        (TypeError, "weight: expected a torch tensor or a numpy array, got list", {"weight": [[1.0]]}),
        (ValueError, "weight: expected 2 dimensions, got 1", {"weight": w[0]}),
        (
            ValueError,
            "weight: expected rows of adjacent values, got stride 5",
            {"weight": torch.randn(4, 5).T},
        ),
        (ValueError, "indices: expected a contiguous tensor", {"indices": torch.arange(4)[::2]}),
        (ValueError, "indices: expected 1 dimension, got 2", {"indices": i[None]}),
        (ValueError, "out: expected one row for each of the 1 bags, got 2", {"out": torch.empty(2, 4)}),
        (ValueError, "out: expected at least 4 columns, got 3", {"out": torch.empty(1, 3)}),
        (ValueError, "per_sample_weights: expected as many as indices, 2, got 1", {"psw": torch.ones(1)}),
        (ValueError, "per_sample_weights: mode max", {"psw": torch.ones(2), "mode": MAX}),
        (ValueError, "mode: expected 0, 1 or 2, got 3", {"mode": 3}),
        (TypeError, "mode: expected an int of 64 bits, got str", {"mode": "sum"}),
        (ValueError, "weight: expected a CPU tensor", {"weight": w.to("meta")}),
    ]:
        with pytest.raises(error, match=match):
            call(**arguments)
    with pytest.raises(TypeError, match="missing argument 'threads'"):
        _C.embedding_bag(w, i, o, None, SUM, True, -1, out)
    with pytest.raises(TypeError, match="unexpected or repeated argument 'thread'"):
        _C.embedding_bag(w, i, o, None, SUM, True, -1, out, thread=1)
    with pytest.raises(ValueError, match="weights: expected at least one"):
        _C.embedding_bag_multi([], i, o, None, SUM, -1, out, None, 1)
    with pytest.raises(
        InvalidOffsetsError, match="expected 1 \\+ a multiple of the number of features, 2, got 2"
    ):
        _C.embedding_bag_multi([w, w], i, o, None, SUM, -1, out, None, 1)
    with pytest.raises(ValueError, match="out: expected at least 5 columns, got 4"):
        _C.embedding_bag_multi([w], i, o, None, SUM, -1, out, [1], 1)
    with pytest.raises(ValueError, match="out_columns: expected one for each of 1, got 2"):
        _C.embedding_bag_multi([w], i, o, None, SUM, -1, out, [0, 1], 1)
