"""What torch.ops.mprec.* runs on a GPU, against the same operators' native CPU kernels."""

import pytest
import torch
from mprec.triton_kernels import faults
from test_device_dhe import decoder, group_of
from test_device_embedding_bag import batch_of
from test_device_hashing import coefficients_of

import mprec.ops
from mprec.errors import IdOutOfRangeError
from mprec.ops import _cuda

MODES = {"sum": 0, "mean": 1, "max": 2}


def assert_same(got, want):
    faults.check(got.device)
    torch.testing.assert_close(got.cpu(), want, rtol=2e-5, atol=2e-5)


def on(device, *values):
    return [
        on(device, *value) if isinstance(value, list | tuple) else None if value is None else value.to(device)
        for value in values
    ]


@pytest.mark.parametrize("mode", [0, 1, 2])
@pytest.mark.parametrize("include_last_offset", [False, True])
def test_embedding_bag(include_last_offset, mode, device):
    weight, indices = torch.randn(20, 12), torch.randint(0, 20, (17,), dtype=torch.int32)
    offsets = torch.tensor([0, 3, 3, 9, 17][: 5 if include_last_offset else 4])
    psw = None if mode == 2 else torch.rand(17)
    want = torch.ops.mprec.embedding_bag(weight, indices, offsets, mode, psw, include_last_offset, 3)
    w, i, o, p = on(device, weight, indices, offsets, psw)
    assert_same(_cuda.embedding_bag(w, i, o, mode, p, include_last_offset, 3), want)


def test_embedding_bag_of_a_transposed_table(device):
    weight = torch.randn(12, 20).t()
    indices, offsets = torch.arange(20), torch.arange(0, 20, 2)
    want = torch.ops.mprec.embedding_bag(weight, indices, offsets)
    assert_same(_cuda.embedding_bag(*on(device, weight, indices, offsets)), want)


@pytest.mark.parametrize("features", [None, [2, 0, 1]])
def test_embedding_bag_multi(features, device):
    rows = [7, 3, 30]
    indices, offsets = batch_of(rows, 11, torch.device("cpu"))
    weights = [torch.randn(rows[f], d) for f, d in zip(features or range(3), (4, 16, 5), strict=True)]
    want = torch.ops.mprec.embedding_bag_multi(weights, indices, offsets, 1, None, features, 3)
    got = _cuda.embedding_bag_multi(*on(device, weights, indices, offsets), 1, None, features, 3)
    assert_same(got, want)


@pytest.mark.parametrize("mode", [0, 1, 2])
def test_dhe_bag(mode, device):
    c, (weights, biases) = coefficients_of("universal", 48), decoder(48, (24, 6), torch.float32, "cpu")
    indices, offsets = torch.randint(0, 2**40, (30,)), torch.tensor([0, 0, 7, 20])
    indices[5:9] = 77
    options = ("universal", "mish", "sigmoid", mode, None, False, 77)
    want = torch.ops.mprec.dhe_bag(indices, offsets, c, weights, biases, *options)
    assert_same(_cuda.dhe_bag(*on(device, indices, offsets, c, weights, biases), *options), want)


@pytest.mark.parametrize("family", ["universal", "artifact", "artifact_gaussian", "sign", "u7"])
def test_dhe_bag_multi_with_decoders_of_two_shapes(family, device):
    shapes = [(48, (24, 6)), (32, (16, 20, 9)), (48, (24, 6))]
    coefficients, weights, biases = group_of(shapes, family, torch.float32, "cpu")
    indices, offsets = batch_of([2**40] * 4, 5, torch.device("cpu"))
    flat = [tensor for stack in weights for tensor in stack], [tensor for stack in biases for tensor in stack]
    psw = torch.rand(len(indices))
    options = ([2, 3, 2], family, "relu", "sigmoid", 0)
    want = torch.ops.mprec.dhe_bag_multi(indices, offsets, coefficients, *flat, *options, psw, [3, 1, 0], 4)
    i, o, c, w, b, p = on(device, indices, offsets, coefficients, *flat, psw)
    assert_same(_cuda.dhe_bag_multi(i, o, c, w, b, *options, p, [3, 1, 0], 4), want)


def test_negative_ids_are_left_out_and_reported(device):
    c, (weights, biases) = coefficients_of("universal", 32), decoder(32, (8,), torch.float32, "cpu")
    indices, offsets = torch.tensor([4, -9, 5]), torch.tensor([0, 2])
    arguments = on(device, indices, offsets, c, weights, biases)
    got = _cuda.dhe_bag(*arguments, "universal", "relu", "none")
    want = torch.ops.mprec.dhe_bag(indices[[0, 2]], torch.tensor([0, 1]), c, weights, biases, "universal",
                                   "relu", "none")  # fmt: skip
    torch.testing.assert_close(got.cpu(), want, rtol=2e-5, atol=2e-5)
    with pytest.raises(IdOutOfRangeError, match="-9, of table 0, at position 1"):
        faults.check(device)


@pytest.mark.parametrize("mode", [0, 1])
def test_embedding_bag_backward(mode, device):
    weight, indices, offsets = torch.randn(9, 6), torch.randint(0, 9, (20,)), torch.tensor([0, 4, 4, 11])
    options = (mode, torch.rand(20) if mode == 0 else None, False, 2, False, False, True, False)
    grad = torch.randn(4, 6)
    want, _ = torch.ops.mprec.embedding_bag_backward(grad, weight, indices, offsets, *options)
    arguments = on(device, grad, weight, indices, offsets)
    got, _ = _cuda.embedding_bag_backward(*arguments, mode, *on(device, options[1]), *options[2:])
    assert_same(got, want)


def test_embedding_bag_multi_backward(device):
    indices, offsets = batch_of([7, 3, 30], 11, torch.device("cpu"))
    weights, grad = [torch.randn(30, 4), torch.randn(7, 16)], torch.randn(11, 20)
    options = (1, None, [2, 0], 3, False, False)
    want, _ = torch.ops.mprec.embedding_bag_multi_backward(grad, weights, indices, offsets, *options)
    got, _ = _cuda.embedding_bag_multi_backward(*on(device, grad, weights, indices, offsets), *options)
    for a, b in zip(got, want, strict=True):
        assert_same(a, b)


@pytest.mark.parametrize("activation", ["none", "relu", "sigmoid", "mish"])
@pytest.mark.parametrize("mode", [0, 1, 2])
def test_dhe_bag_backward(mode, activation, device):
    c, (weights, biases) = coefficients_of("universal", 48), decoder(48, (24, 10, 6), torch.float32, "cpu")
    indices, offsets, grad = torch.randint(0, 2**40, (30,)), torch.tensor([0, 0, 7, 20]), torch.randn(4, 6)
    psw = torch.rand(30) if mode == 0 else None
    options = ("universal", activation, "sigmoid", mode)
    want = torch.ops.mprec.dhe_bag_backward(
        grad, indices, offsets, c, weights, biases, *options, psw, False, int(indices[3]), False
    )
    got = _cuda.dhe_bag_backward(
        *on(device, grad, indices, offsets, c, weights, biases), *options, *on(device, psw), False,
        int(indices[3]), False,
    )  # fmt: skip
    for a, b in zip([*got[0], *got[1]], [*want[0], *want[1]], strict=True):
        assert_same(a, b)


def test_dhe_bag_multi_backward(device):
    coefficients, weights, biases = group_of([(48, (24, 6)), (32, (9,))], "sign", torch.float32, "cpu")
    indices, offsets = batch_of([2**40] * 3, 5, torch.device("cpu"))
    flat = [tensor for stack in weights for tensor in stack], [tensor for stack in biases for tensor in stack]
    options = ([2, 1], "sign", "mish", "none", 0, None, [2, 0], 3, False)
    grad = torch.randn(5, 15)
    want = torch.ops.mprec.dhe_bag_multi_backward(grad, indices, offsets, coefficients, *flat, *options)
    got = _cuda.dhe_bag_multi_backward(*on(device, grad, indices, offsets, coefficients, *flat), *options)
    for a, b in zip([*got[0], *got[1]], [*want[0], *want[1]], strict=True):
        assert_same(a, b)


def test_modules_have_the_same_values_here(device):
    """On a GPU, the modules themselves; by the interpreter, the operators they call."""
    if device.type == "cpu":
        pytest.skip("no GPU: see test_triton_routing for what the modules call")
    bag = mprec.nn.DeepHashEmbeddingBag(8)
    indices, offsets = torch.randint(0, 2**40, (50,)), torch.arange(0, 50, 5)
    want = bag(indices, offsets)
    assert_same(bag.to(device)(indices.to(device), offsets.to(device)), want)
