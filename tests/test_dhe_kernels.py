"""The DHE kernels against Python integers, torch's int64 and float64 plain torch, on every runnable ISA."""

import math

import numpy as np
import pytest
import torch
from dhe_net import (
    ACTIVATE,
    ACTIVATIONS,
    ARTIFACT_M,
    ARTIFACT_P,
    FAMILIES,
    Net,
    P,
    assert_close,
    hash_encode,
    hash_reference,
    hash_values,
    make_coefficients,
    make_layers,
    pool_reference,
    sample_ids,
    unit_reference,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from mprec._native import _C
from mprec.errors import IdOutOfRangeError, InvalidOffsetsError
from mprec.testing import isa, runnable_isas

torch.set_num_threads(1)


@pytest.fixture(params=runnable_isas(), autouse=True)
def each_isa(request):
    with isa(request.param):
        yield request.param


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("k", [2, 6, 16, 40, 300])
def test_hashes_equal_the_definition(family, k):
    coefficients = make_coefficients(family, k, seed=k, edges=True)
    ids = sample_ids(k, 60)
    expected = torch.tensor(hash_reference(coefficients, ids.tolist(), family))
    assert torch.equal(hash_values(coefficients, ids, family), expected)
    u, expected_u = hash_encode(coefficients, ids, family), unit_reference(expected, family)
    if family == "artifact_gaussian":
        # Near U = 1, ln U has the absolute error of U's rounding, and the root makes it larger.
        torch.testing.assert_close(u, expected_u, rtol=1e-5, atol=5e-5, equal_nan=True)
    else:
        assert torch.equal(u, expected_u)


def test_artifact_equals_torch_int64():
    coefficients = make_coefficients("artifact", 64)
    ids = sample_ids(5, 500)
    a, b = coefficients.long()
    h = torch.fmod(torch.fmod(a * ids[:, None] + b, ARTIFACT_P), ARTIFACT_M)
    assert torch.equal(hash_values(coefficients, ids, "artifact"), h)
    assert torch.equal(hash_encode(coefficients, ids, "artifact"), unit_reference(h, "artifact"))


@pytest.mark.parametrize("family", ["artifact", "u7"])
def test_every_level_is_correctly_rounded(family):
    # a = 1, b = 0: the hash is the ID itself, so every value that u can take occurs.
    coefficients = torch.zeros(2 if family == "artifact" else 4, 1, dtype=torch.int32)
    coefficients[0] = 1
    ids = torch.arange(ARTIFACT_M) if family == "artifact" else torch.arange(128) << 23
    if family == "u7":
        ids = torch.cat([ids, (torch.arange(128) << 23) + 2**23 - 1])
    h = torch.tensor(hash_reference(coefficients, ids.tolist(), family))
    assert torch.equal(hash_encode(coefficients, ids, family), unit_reference(h, family))


@pytest.mark.parametrize("k0", [0, 2**30 - 64, 2**31 - 70])
def test_universal_near_the_modulus(k0):
    # Sums that are a multiple of p, or one less, need the last fold.
    coefficients = torch.zeros(4, 3, dtype=torch.int32)
    coefficients[0] = 1
    coefficients[1] = torch.tensor([0, P - 1, P - 2**30])
    ids = torch.arange(k0, k0 + 140)
    expected = torch.tensor(hash_reference(coefficients, ids.tolist(), "universal"))
    assert torch.equal(hash_values(coefficients, ids, "universal"), expected)


# ---- forward


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dims", [(1024, 128, 16), (64, 512, 256, 64), (20, 7), (2, 1, 3, 1), (530, 33, 17)])
def test_forward(family, dims):
    net = Net(dims, family)
    ids = torch.randint(0, 2**40, (37,), generator=torch.Generator().manual_seed(1))
    assert_close(net.one_each(ids), net.vectors(ids))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("last", ACTIVATIONS)
def test_activations(activation, last):
    net = Net((48, 40, 20), activation=activation, last=last)
    ids = torch.arange(19)
    assert_close(net.one_each(ids), net.vectors(ids))


@pytest.mark.parametrize("activation", ["relu", "sigmoid", "mish"])
def test_activation_accuracy_and_nan(activation):
    # Two inputs +-c give the decoder's pre-activation exactly: weight 0, bias x.
    x = torch.cat([torch.linspace(-100, 100, 4001), torch.linspace(-1e-3, 1e-3, 101)])
    x = torch.cat([x, torch.tensor([math.inf, -math.inf, math.nan, 0.0])])
    handle = _C.Decoder(
        make_coefficients("universal", 2), [torch.zeros(len(x), 2)], [x], 0, 0, ACTIVATIONS[activation]
    )
    out = torch.empty(1, len(x))
    _C.dhe_bag(handle, torch.tensor([3]), torch.tensor([0]), None, 0, False, -1, out, 1)
    expected = ACTIVATE[activation](x.double())
    tiny = 1e-36  # below it float32 runs out of normal numbers
    torch.testing.assert_close(out[0].double(), expected, rtol=1e-6, atol=tiny, equal_nan=True)


def test_nan_weights_propagate():
    net = Net((32, 24, 8), activation="relu", last="none")
    net.weights[0][3, 5] = math.nan
    handle = _C.Decoder(net.coefficients, net.weights, net.biases, 0, 1, 0)
    out = torch.zeros(2, 8)
    _C.dhe_bag(handle, torch.tensor([1, 2]), torch.tensor([0, 1]), None, 0, False, -1, out, 1)
    assert out.isnan().all()


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 6, 7, 13, 14, 15, 29, 65, 66, 67, 133, 300])
@pytest.mark.parametrize("dims", [(300, 40, 16), (48, 260)])
def test_every_number_of_rows(n, dims):
    net = Net(dims)
    ids = torch.arange(n) * 977
    assert_close(net.one_each(ids), net.vectors(ids))


# Few rows take all hashes at once if there is room: for one row of 17000 there is not.
@pytest.mark.parametrize("dims", [(600, 70, 300, 9), (17000, 40)])
@pytest.mark.parametrize("precision", ["float32", "float16", "bfloat16"])
def test_few_rows_give_the_same_bits_forwards_and_backwards(dims, precision):
    net = Net(dims)
    net.handle = _C.Decoder(net.coefficients, net.weights, net.biases, 0, 1, 2, precision)
    for n in (1, 2, 4, 5):
        ids = torch.randint(0, 2**40, (n,), generator=torch.Generator().manual_seed(n))
        first = net.one_each(ids)
        assert_close(first, net.vectors(ids), 2e-5 if precision == "float32" else 1e-2)
        for _ in range(2):
            assert torch.equal(net.one_each(ids), first)


def test_dims_1_to_130():
    for d in range(1, 131):
        net = Net((8, d), activation="none", last="none", seed=d)
        ids = torch.arange(5)
        out = torch.full((5, d + 2), 7.0)
        _C.dhe_bag(net.handle, ids, ids, None, 0, False, -1, out[:, 1 : 1 + d], 1)
        assert_close(out[:, 1 : 1 + d], net.vectors(ids))
        assert (out[:, 0] == 7).all()
        assert (out[:, -1] == 7).all(), "wrote past the last column"


bags = st.lists(st.lists(st.integers(0, 12) | st.integers(0, 2**63 - 1), max_size=5), min_size=0, max_size=12)


@settings(max_examples=60, deadline=None)
@given(
    bags=bags,
    dims=st.lists(st.integers(1, 70), min_size=2, max_size=4),
    mode=st.integers(0, 2),
    weighted=st.booleans(),
    padding_idx=st.sampled_from([-1, 0, 3]),
    dedupe=st.sampled_from([None, True, False]),
    index_dtype=st.sampled_from([torch.int64, torch.int32]),
    offset_dtype=st.sampled_from([torch.int64, torch.int32]),
    include_last=st.booleans(),
    threads=st.integers(1, 3),
)
def test_bags(
    bags, dims, mode, weighted, padding_idx, dedupe, index_dtype, offset_dtype, include_last, threads
):
    flat = [i % 2**31 if index_dtype == torch.int32 else i for bag in bags for i in bag]
    ids = torch.tensor(flat, dtype=index_dtype)
    offsets = np.cumsum([0] + [len(b) for b in bags]).tolist()
    weighted = weighted and mode != 2
    weights = torch.linspace(-1, 2, len(flat)) if weighted else None
    net = Net(dims, last="none")
    vectors = net.vectors(ids) if flat else torch.zeros(0, dims[-1], dtype=torch.float64)
    expected = pool_reference(vectors, flat, offsets, mode, weights, padding_idx)
    given_offsets = torch.tensor(offsets if include_last else offsets[:-1], dtype=offset_dtype)
    out = torch.full((len(bags), dims[-1]), math.nan)
    _C.dhe_bag(net.handle, ids, given_offsets, weights, mode, include_last, padding_idx, out, threads, dedupe)
    assert_close(out, expected, 1e-4)


def test_unaligned_memory():
    net = Net((40, 24))
    ids = np.zeros(10, np.int64)[1:]  # on the boundary of an element, not of a vector
    ids[:] = np.arange(9) * 3
    out = np.zeros(9 * 24 + 1, np.float32)[1:].reshape(9, 24)
    _C.dhe_bag(net.handle, ids, np.arange(9), None, 0, False, -1, out, 1)
    assert_close(torch.from_numpy(out.copy()), net.vectors(torch.from_numpy(ids.copy())))


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("mode", [0, 1, 2])
def test_multi(threads, mode):
    nets = [Net((64, 32, 8), seed=1), Net((30, 5), "sign", seed=2), Net((257, 300, 17), "artifact", seed=3)]
    g = np.random.default_rng(threads)
    batch = 41
    lengths = g.integers(0, 6, size=3 * batch)
    lengths[:batch] = 1  # one feature goes straight to its place
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    ids = torch.from_numpy(g.integers(0, 50, size=offsets[-1]))
    expected = []
    for t, net in enumerate(nets):
        o = offsets[t * batch : (t + 1) * batch + 1]
        part = ids[o[0] : o[-1]]
        expected.append(pool_reference(net.vectors(part), part.tolist(), (o - o[0]).tolist(), mode, None, -1))
    handles = [net.handle for net in nets]
    out = torch.full((batch, 30), math.nan)
    _C.dhe_bag_multi(handles, ids, torch.from_numpy(offsets), None, mode, -1, out, None, threads)
    assert_close(out, torch.cat(expected, 1), 1e-4)

    spread = torch.full((batch, 40), 7.0)
    _C.dhe_bag_multi(handles, ids, torch.from_numpy(offsets), None, mode, -1, spread, [30, 2, 8], threads)
    assert_close(spread[:, 30:38], expected[0], 1e-4)
    assert_close(spread[:, 2:7], expected[1], 1e-4)
    assert (spread[:, [0, 1, 7, 27, 39]] == 7).all(), "wrote outside its columns"


def test_threads_and_repetition_do_not_change_a_bit():
    net = Net((300, 130, 20))
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 2**30, (2000,), generator=g)
    offsets = torch.arange(0, 2001, 4)
    first = net(ids, offsets, threads=2)
    assert torch.equal(first, net(ids, offsets, threads=2))


# ---- bad input


def test_bad_ids_and_offsets():
    net = Net((8, 4))
    ids = torch.tensor([5, 6, 7])
    for bad in ([1, 2, 3], [0, 2, 1, 3], [0, 4], [0, 2], [-1, 3], []):
        offsets, out = torch.tensor(bad, dtype=torch.int64), torch.zeros(max(len(bad) - 1, 0), 4)
        with pytest.raises(InvalidOffsetsError, match="offsets"):
            _C.dhe_bag(net.handle, ids, offsets, None, 0, True, -1, out, 1)
    with pytest.raises(IdOutOfRangeError, match=r"indices\[1\] \(bag 1\) is -4"):
        net.one_each(torch.tensor([0, -4]))
    with pytest.raises(IdOutOfRangeError, match=r"indices\[0\] is -1"):
        hash_encode(net.coefficients, torch.tensor([-1]), "universal")
    with pytest.raises(TypeError, match="int32 or int64"):
        net.one_each(torch.tensor([0.5]))
    with pytest.raises(ValueError, match="mode max"):
        net.one_each(ids, weights=torch.ones(3), mode=2)
    with pytest.raises(ValueError, match="per_sample_weights"):
        net.one_each(ids, weights=torch.ones(2))
    with pytest.raises(ValueError, match="columns"):
        _C.dhe_bag(net.handle, ids, ids * 0, None, 0, False, -1, torch.zeros(3, 3), 1)


def test_bad_decoders():
    coefficients = make_coefficients("universal", 8)
    weights, biases = make_layers((8, 6, 4))
    with pytest.raises(ValueError, match=r"weights\[1\]: expected 6 inputs"):
        _C.Decoder(coefficients, [weights[0], weights[0]], [biases[0], biases[0]], 0, 1, 1)
    with pytest.raises(ValueError, match="rows for this hash family"):
        _C.Decoder(coefficients, weights, biases, FAMILIES["artifact"], 1, 1)
    bad = coefficients.clone()
    bad[0, 2] = 0
    with pytest.raises(ValueError, match=r"coefficients\[0, 2\] is 0"):
        _C.Decoder(bad, weights, biases, 0, 1, 1)
    odd = make_coefficients("artifact", 7)
    with pytest.raises(ValueError, match="odd number"):
        hash_encode(odd, torch.tensor([1]), "artifact_gaussian")
    with pytest.raises(ValueError, match="at least one layer"):
        _C.Decoder(coefficients, [], [], 0, 1, 1)
    with pytest.raises(TypeError, match="float32"):
        _C.Decoder(coefficients, [w.double() for w in weights], biases, 0, 1, 1)


def test_weights_of_any_strides_and_numpy():
    coefficients = make_coefficients("universal", 8)
    (w,), (b,) = make_layers((8, 6))
    ids, out = torch.arange(4), [torch.zeros(4, 6), np.zeros((4, 6), dtype=np.float32)]
    transposed = w.T.contiguous().T
    _C.dhe_bag(_C.Decoder(coefficients, [transposed], [b], 0, 1, 1), ids, ids, None, 0, False, -1, out[0], 1)
    plain = _C.Decoder(coefficients.numpy(), [w.numpy()], [b.numpy()], 0, 1, 1)
    _C.dhe_bag(plain, ids.numpy(), ids.numpy(), None, 0, False, -1, out[1], 1)
    assert torch.equal(out[0], torch.from_numpy(out[1]))
    assert plain.dims == [8, 6]
    assert plain.nbytes >= 4 * (6 * 8 + 6 + 4 * 8)
