"""The native gradients of decoders against autograd in float64, and through the operator."""

import math

import pytest
import torch
from dhe_net import ACTIVATIONS, FAMILIES, Net, decode_reference, hash_encode

from mprec import ops
from mprec._native import _C
from mprec.errors import IdOutOfRangeError
from mprec.testing import isa, runnable_isas

torch.set_num_threads(1)


@pytest.fixture(params=runnable_isas(), autouse=True)
def each_isa(request):
    with isa(request.param):
        yield request.param


def backward(net: Net, ids, grad, threads=1):
    grad_weights = [torch.full_like(w, math.nan) for w in net.weights]
    grad_biases = [torch.full_like(b, math.nan) for b in net.biases]
    _C.dhe_backward(net.handle, net.weights, ids, grad, grad_weights, grad_biases, threads)
    return grad_weights + grad_biases


def backward_reference(net: Net, ids, grad):
    weights = [w.double().requires_grad_() for w in net.weights]
    biases = [b.double().requires_grad_() for b in net.biases]
    u = hash_encode(net.coefficients, ids, net.family)  # itself tested bit for bit
    y = decode_reference(u, weights, biases, net.activation, net.last)
    return torch.autograd.grad(y, weights + biases, grad.double())


def assert_gradients(net, n, threads=1, seed=0):
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 2**40, (n,), generator=g)
    grad = torch.randn(n, net.handle.dim, generator=g)
    for mine, exact in zip(
        backward(net, ids, grad, threads), backward_reference(net, ids, grad), strict=True
    ):
        scale = float(exact.abs().max()) + 1e-3
        torch.testing.assert_close(mine.double(), exact, rtol=1e-4, atol=2e-5 * scale)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dims", [(64, 40, 16), (1024, 128, 16), (20, 7), (2, 1, 3, 1), (530, 270, 33, 300)])
def test_gradients(family, dims):
    assert_gradients(Net(dims, family), 23)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("last", ACTIVATIONS)
def test_activations(activation, last):
    assert_gradients(Net((40, 24, 33, 9), activation=activation, last=last), 31)


@pytest.mark.parametrize("n", [0, 1, 2, 5, 14, 65, 66, 67, 300, 1000])
@pytest.mark.parametrize("threads", [1, 3])
def test_every_number_of_ids(n, threads):
    assert_gradients(Net((300, 70, 12)), n, threads)


def test_widths_1_to_70():
    for width in range(1, 71):
        assert_gradients(Net((71 - width, width, 3), seed=width), 5, seed=width)


def test_deterministic():
    net = Net((300, 130, 20))
    ids, grad = torch.arange(3000), torch.randn(3000, 20, generator=torch.Generator().manual_seed(0))
    for threads in (1, 2):
        first, second = backward(net, ids, grad, threads), backward(net, ids, grad, threads)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("padding_idx", [None, 3])
def test_through_the_operator(mode, weighted, padding_idx):
    """float32 takes the native path, float64 plain torch: their gradients agree."""
    if weighted and mode == "max":
        pytest.skip("max takes no per-sample weights")
    net = Net((48, 30, 7), activation="mish")
    g = torch.Generator().manual_seed(3)
    ids = torch.randint(0, 9, (60,), generator=g)
    offsets = torch.tensor([0, 5, 5, 20, 21, 50, 60])
    psw = torch.rand(60, generator=g) if weighted else None
    grad = torch.randn(7, 7, generator=g)
    grads = []
    for dtype in (torch.float32, torch.float64):
        parameters = [p.to(dtype).requires_grad_() for p in net.weights + net.biases]
        extra = [] if psw is None else [psw.to(dtype).requires_grad_()]
        out = ops.dhe_bag(
            ids,
            offsets,
            net.coefficients,
            parameters[:2],
            parameters[2:],
            activation="mish",
            mode=mode,
            per_sample_weights=extra[0] if extra else None,
            padding_idx=padding_idx,
        )
        grads.append(torch.autograd.grad(out, parameters + extra, grad.to(dtype)))
    for mine, exact in zip(*grads, strict=True):
        torch.testing.assert_close(mine.double(), exact, rtol=1e-3, atol=1e-4)


def test_bad_arguments():
    net = Net((8, 4))
    with pytest.raises(IdOutOfRangeError, match=r"indices\[1\] is -4"):
        backward(net, torch.tensor([0, -4]), torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"grad: expected shape \[2, 4\]"):
        backward(net, torch.tensor([0, 4]), torch.zeros(2, 3))
    with pytest.raises(TypeError, match="grad: expected float32"):
        backward(net, torch.tensor([0, 4]), torch.zeros(2, 4, dtype=torch.float64))
