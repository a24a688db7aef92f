"""Training keeps a decoder's activations from the forward pass for the backward pass."""

import gc
import math
import weakref

import pytest
import torch
from dhe_net import ACTIVATIONS, Net, decode_reference, hash_encode, pool_reference
from hypothesis import given, settings
from hypothesis import strategies as st

from mprec import ops
from mprec._native import _C
from mprec.ops import _dhe
from mprec.testing import isa, runnable_isas

each_isa = pytest.mark.parametrize("name", runnable_isas())


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Training:
    """A net whose parameters want gradients, called through the operator."""

    def __init__(self, net: Net) -> None:
        self.net = net
        self.weights = [w.clone().requires_grad_() for w in net.weights]
        self.biases = [b.clone().requires_grad_() for b in net.biases]
        self.parameters = self.weights + self.biases

    def __call__(self, ids, offsets=None, mode="sum", psw=None, padding_idx=None):
        net = self.net
        offsets = torch.arange(len(ids) + 1) if offsets is None else offsets
        return ops.dhe_bag(
            ids, offsets, net.coefficients, self.weights, self.biases, net.family, net.activation, net.last,
            mode, psw, True, padding_idx,
        )  # fmt: skip

    def exact(self, grad, ids, offsets, mode="sum", psw=None, padding_idx=None):
        """Gradients of weights, biases and per-sample weights, by autograd in float64."""
        net = self.net
        weights = [w.detach().double().requires_grad_() for w in self.weights]
        biases = [b.detach().double().requires_grad_() for b in self.biases]
        factors = None if psw is None else psw.detach().double().requires_grad_()
        u = hash_encode(net.coefficients, ids, net.family)  # itself tested bit for bit
        y = decode_reference(u, weights, biases, net.activation, net.last)
        number = ("sum", "mean", "max").index(mode)
        out = pool_reference(y, ids.tolist(), offsets.tolist(), number, factors, padding_idx)
        wanted = weights + biases + ([] if factors is None else [factors])
        return torch.autograd.grad(out, wanted, grad.double(), allow_unused=True, materialize_grads=True)


def activations_of(out):
    """What ``out`` keeps; None: nothing beside the arguments."""
    saved = [t for t in out.grad_fn.saved_tensors if t is not None and t.dim() == 3]
    return saved[0] if saved else None


def assert_same(mine, exact):
    for a, b in zip(mine, exact, strict=True):
        scale = float(b.abs().max()) + 1e-3 if b.numel() else 1.0
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=2e-5 * scale)


def check(net, n, threads=1, distinct=10**9, seed=0):
    g = torch.Generator().manual_seed(seed)
    training = Training(net)
    ids = torch.randint(0, distinct, (n,), generator=g)
    grad = torch.randn(n, net.handle.dim, generator=g)
    torch.set_num_threads(threads)
    out = training(ids)
    assert activations_of(out) is not None
    assert torch.equal(out.detach(), net.one_each(ids))  # bit for bit what serving gives
    found = torch.autograd.grad(out, training.parameters, grad)
    assert_same(found, training.exact(grad, ids, torch.arange(n + 1)))
    return found


@each_isa
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("last", ACTIVATIONS)
def test_activations(name, activation, last):
    with isa(name):
        check(Net((40, 24, 33, 9), activation=activation, last=last), 31)


@each_isa
@pytest.mark.parametrize("n", [1, 4, 5, 66, 67, 131, 132, 133, 400])
@pytest.mark.parametrize("threads", [1, 3])
def test_every_number_of_ids(name, n, threads):
    with isa(name):
        check(Net((300, 270, 12)), n, threads)
        check(Net((300, 70, 12), activation="mish"), n, threads, distinct=7)


@each_isa
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_widths(name, data):
    width = st.integers(1, 600)
    dims = data.draw(st.lists(width, min_size=2, max_size=4))
    activation = data.draw(st.sampled_from(sorted(ACTIVATIONS)))
    with isa(name):
        check(Net(dims, activation=activation), data.draw(st.integers(1, 20)))


@each_isa
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("padding_idx", [None, 3])
@pytest.mark.parametrize("dim", [7, 300])
def test_bags(name, mode, weighted, padding_idx, dim):
    if weighted and mode == "max":
        pytest.skip("max takes no per-sample weights")
    g = torch.Generator().manual_seed(3)
    training = Training(Net((48, 30, dim), activation="mish", last="none"))
    ids = torch.randint(0, 9, (60,), generator=g)
    offsets = torch.tensor([0, 5, 5, 20, 21, 50, 60])
    psw = torch.rand(60, generator=g).requires_grad_() if weighted else None
    grad = torch.randn(6, dim, generator=g)
    with isa(name):
        out = training(ids, offsets, mode, psw, padding_idx)
        assert activations_of(out) is not None
        found = torch.autograd.grad(out, training.parameters + ([psw] if weighted else []), grad)
    assert_same(found, training.exact(grad, ids, offsets, mode, psw, padding_idx))


@pytest.mark.parametrize("ids", [[], [3, 3, 3]])
def test_padding_alone(ids):
    training = Training(Net((20, 6, 5)))
    out = training(torch.tensor(ids, dtype=torch.int64), torch.tensor([0, len(ids)]), padding_idx=3)
    for g in torch.autograd.grad(out.sum(), training.parameters):
        assert torch.equal(g, torch.zeros_like(g))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", ["first", "last", "grad"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_what_is_not_finite(bad, place, activation):
    """Gradients are NaN where those that make everything again are, and the same elsewhere."""
    training = Training(Net((40, 24, 18, 5), activation=activation, last="none"))
    grad = torch.ones(30, 5)
    with torch.no_grad():
        if place == "grad":
            grad[7, 2] = bad
        else:
            training.weights[0 if place == "first" else -1][3, 4] = bad
    ids = torch.arange(30)
    kept = torch.autograd.grad(training(ids), training.parameters, grad)
    again = torch.ops.mprec.dhe_bag_backward(
        grad, ids, torch.arange(31), training.net.coefficients, training.weights, training.biases,
        "universal", activation, "none", 0, None, True, -1, False,
    )  # fmt: skip
    for a, b in zip(kept, again[0] + again[1], strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_deterministic(threads):
    net = Net((300, 130, 20))
    first, second = (check(net, 1000, threads, distinct=500) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_beyond_the_bound_activations_are_made_again(monkeypatch):
    training, ids = Training(Net((64, 40, 16), activation="mish")), torch.arange(50)
    out = training(ids)
    kept = activations_of(out)
    want = torch.autograd.grad(out.sum(), training.parameters)
    monkeypatch.setattr(_dhe, "MOST_KEPT", kept.nbytes - 1)
    out = training(ids)
    assert activations_of(out) is None
    assert_same(torch.autograd.grad(out.sum(), training.parameters), [w.double() for w in want])


def test_nothing_is_kept_where_no_gradient_is_wanted(monkeypatch):
    def refuse(*arguments):
        raise AssertionError("kept activations")

    training, ids = Training(Net((64, 40, 16))), torch.arange(50)
    monkeypatch.setattr(_dhe.DHE_BAG, "keep", refuse)
    with torch.no_grad():
        training(ids)
    with torch.inference_mode():
        training(ids)
    for p in training.parameters:
        p.requires_grad_(False)
    training(ids)
    training.biases[0].requires_grad_()
    with pytest.raises(AssertionError, match="kept activations"):  # and else it is
        training(ids)


def test_a_weight_changed_in_between_is_refused():
    training, ids = Training(Net((64, 40, 16))), torch.arange(50)
    out = training(ids)
    with torch.no_grad():
        training.weights[0].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_backward_twice():
    training, ids = Training(Net((64, 40, 16))), torch.arange(50)
    out = training(ids).sum()
    first = torch.autograd.grad(out, training.parameters, retain_graph=True)
    second = torch.autograd.grad(out, training.parameters)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(out, training.parameters)


def test_memory_is_freed_after_the_backward_pass():
    training, ids = Training(Net((64, 40, 16))), torch.arange(50)
    kept = []

    def pack(tensor):
        if tensor.dim() == 3:
            kept.append(weakref.ref(tensor))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = training(ids)
    assert kept[0]() is not None
    out.sum().backward()
    gc.collect()
    assert kept[0]() is None
    assert out.grad_fn is not None  # which lives on


def test_derivatives_of_gradients():
    training, ids = Training(Net((12, 5, 3), activation="mish")), torch.arange(6)
    first = torch.autograd.grad(training(ids).square().sum(), training.parameters, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), training.parameters)
    u = hash_encode(training.net.coefficients, ids, "universal")
    weights = [w.detach().double().requires_grad_() for w in training.weights]
    biases = [b.detach().double().requires_grad_() for b in training.biases]
    y = decode_reference(u, weights, biases, "mish", "sigmoid")
    exact = torch.autograd.grad(y.square().sum(), weights + biases, create_graph=True)
    exact = torch.autograd.grad(sum(g.square().sum() for g in exact), weights + biases)
    assert_same(second, exact)


def test_bad_arguments():
    net = Net((8, 4))
    n = 3
    shape = net.handle.kept_shape(n)
    good = {
        "decoder": net.handle,
        "indices": torch.arange(n),
        "offsets": torch.arange(n + 1),
        "per_sample_weights": None,
        "mode": 0,
        "include_last_offset": True,
        "padding_idx": -1,
        "kept": torch.empty(shape),
        "distinct": torch.empty(n, dtype=torch.int64),
        "row_of_entry": torch.empty(n, dtype=torch.int32),
        "threads": 1,
    }
    out, count = _C.dhe_bag_keeping(**good)
    assert count == n
    assert torch.equal(out, net.one_each(torch.arange(n)))
    blocks, _, pitch = shape
    for name, value, message in [
        ("kept", torch.empty(blocks, n - 1, pitch), "kept: expected shape"),
        ("kept", torch.empty(shape, dtype=torch.float64), "kept: expected float32"),
        ("distinct", torch.empty(n - 1, dtype=torch.int64), "distinct: expected shape"),
        ("row_of_entry", torch.empty(n, dtype=torch.int64), "row_of_entry: expected int32"),
    ]:
        with pytest.raises((TypeError, ValueError), match=message):
            _C.dhe_bag_keeping(**{**good, name: value})
    grads = [torch.empty_like(w) for w in net.weights], [torch.empty_like(b) for b in net.biases]
    ids, grad = torch.arange(n + 1), torch.zeros(n + 1, 4)
    with pytest.raises(ValueError, match="kept: expected shape"):
        _C.dhe_backward(net.handle, net.weights, ids, grad, *grads, 1, torch.empty(shape))
