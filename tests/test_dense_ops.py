"""MLPs and the dot interaction as operators and modules: values, gradients, and what they refuse."""

import itertools

import pytest
import torch
from float64_dlrm import Bounded
from float64_dlrm import mlp as bounded_mlp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import mprec
from mprec import ops
from mprec.errors import DeviceError, DtypeError
from mprec.nn import MLP, DotInteraction
from mprec.testing import isa, runnable_isas


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def layers(sizes, dtype=torch.float32, requires_grad=False):
    g = torch.Generator().manual_seed(sum(sizes))
    weights = [torch.randn(b, a, generator=g, dtype=dtype) / a**0.5 for a, b in itertools.pairwise(sizes)]
    biases = [torch.randn(b, generator=g, dtype=dtype) for b in sizes[1:]]
    for tensor in (*weights, *biases):
        tensor.requires_grad_(requires_grad)
    return weights, biases


def triangle(vectors, self_interaction):
    """Products in the order of torchrec and of Facebook's DLRM, in float64."""
    v = vectors.double()
    order = [(i, j) for i in range(v.shape[1]) for j in range(i + self_interaction)]
    rows, columns = torch.tensor(order).T
    return torch.einsum("bid,bjd->bij", v, v)[:, rows, columns]


@pytest.mark.parametrize("name", runnable_isas())
@settings(max_examples=25, deadline=None)
@given(
    samples=st.integers(0, 300),
    sizes=st.lists(st.integers(1, 300), min_size=2, max_size=4),
    threads=st.sampled_from([1, 2]),
)
def test_mlp_against_float64(name, samples, sizes, threads):
    weights, biases = layers(sizes)
    x = torch.randn(samples, sizes[0], generator=torch.Generator().manual_seed(samples))
    torch.set_num_threads(threads)
    with isa(name):
        got = ops.mlp(x, weights, biases)
    modules = nn.Sequential()
    for i, (w, b) in enumerate(zip(weights, biases, strict=True)):
        linear = nn.Linear(*w.shape[::-1])
        linear.weight.data, linear.bias.data = w, b
        modules.append(linear)
        if i + 1 < len(weights):
            modules.append(nn.ReLU())
    want = bounded_mlp(Bounded(x), modules)
    assert got.shape == (samples, sizes[-1])
    assert bool(((got - want.value).abs() <= want.error).all())


def interactions(test):
    """Runs a test on every ISA, with shapes of interactions."""
    shapes = given(
        samples=st.integers(0, 300),
        count=st.integers(1, 40),
        dim=st.integers(1, 40),
        self_interaction=st.booleans(),
        threads=st.sampled_from([1, 2]),
    )
    return pytest.mark.parametrize("name", runnable_isas())(
        settings(max_examples=25, deadline=None)(shapes(test))
    )


@interactions
def test_interaction_against_float64(name, samples, count, dim, self_interaction, threads):
    v = torch.randn(samples, count, dim, generator=torch.Generator().manual_seed(dim), requires_grad=True)
    torch.set_num_threads(threads)
    if count + self_interaction < 2:
        assert ops.dot_interaction(v, self_interaction).shape == (samples, 0)
        return
    want = triangle(v, self_interaction)
    grad = torch.randn(want.shape, generator=torch.Generator().manual_seed(count))
    (want_grad,) = torch.autograd.grad(want, v, grad.double())
    with isa(name):
        got = ops.dot_interaction(v, self_interaction)
        (got_grad,) = torch.autograd.grad(got, v, grad)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=5e-5)
    torch.testing.assert_close(got_grad, want_grad, rtol=1e-5, atol=1e-4)


@interactions
def test_interaction_behind_a_first_vector(name, samples, count, dim, self_interaction, threads):
    g = torch.Generator().manual_seed(dim)
    v = torch.randn(samples, count, dim, generator=g, requires_grad=True)
    first = torch.randn(samples, 2 * dim, generator=g)[:, ::2].requires_grad_()  # not contiguous
    torch.set_num_threads(threads)
    together = torch.cat([first[:, None], v], 1).double()
    want = torch.cat([first.double(), triangle(together, self_interaction)], 1)
    grad = torch.randn(want.shape, generator=g)
    want_grads = torch.autograd.grad(want, (v, first), grad.double())
    with isa(name):
        got = ops.dot_interaction(v, self_interaction, first)
        got_grads = torch.autograd.grad(got, (v, first), grad)
        assert torch.equal(ops.dot_interaction(v.detach(), self_interaction, first.detach()), got)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=5e-5)
    for found, wanted in zip(got_grads, want_grads, strict=True):
        torch.testing.assert_close(found.double(), wanted.double(), rtol=1e-5, atol=1e-4)


def test_no_samples_in_any_layout():
    """Of nothing every layout is contiguous, to torch and to the kernels."""
    weights, biases = layers([3, 2])
    assert ops.dot_interaction(torch.empty(0, 4, 6)[:, :, ::2]).shape == (0, 6)
    assert ops.mlp(torch.empty(0, 6)[:, ::2], weights, biases).shape == (0, 2)
    ids, table = torch.empty(0, 4, dtype=torch.int64)[:, ::2], torch.randn(5, 3)
    assert ops.embedding(ids, table).shape == (0, 2, 3)


def test_only_one_of_the_vectors_may_want_a_gradient():
    v, first = torch.randn(3, 4, 5), torch.randn(3, 5)
    for wanted in (v, first):
        wanted.requires_grad_()
        want = torch.cat([first, triangle(torch.cat([first[:, None], v], 1).double(), False)], 1)
        (want_grad,) = torch.autograd.grad(want.sum(), wanted)
        (grad,) = torch.autograd.grad(ops.dot_interaction(v, first=first).sum(), wanted)
        torch.testing.assert_close(grad, want_grad.float())
        wanted.requires_grad_(False)


def _by_torch(x, weights, biases, activation="relu"):
    return mprec.reference.mlp(x, weights, biases, activation, "none", dtype=torch.float64).float()


CHANGES = {
    "in place": lambda w, b: w[0].mul_(2),
    "through .data": lambda w, b: w[1].data.mul_(2),
    "through NumPy": lambda w, b: b[0].numpy().fill(3.0),
    "another tensor": lambda w, b: w.__setitem__(1, w[1] * 2),
    "another bias": lambda w, b: b.__setitem__(1, b[1] + 1),
    "moved": lambda w, b: w[0].set_((w[0] * 2).clone()),
    "a layer less": lambda w, b: (w.pop(), b.pop()),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_an_mlp_that_was_called_before_sees_what_has_changed(change):
    weights, biases = layers([5, 7, 4, 3])
    x = torch.randn(6, 5)
    for _ in range(2):  # packs, then finds what it has packed
        torch.testing.assert_close(ops.mlp(x, weights, biases), _by_torch(x, weights, biases))
    change(weights, biases)
    for _ in range(2):
        torch.testing.assert_close(ops.mlp(x, weights, biases), _by_torch(x, weights, biases))
    other = ops.mlp(x, weights, biases, "sigmoid")
    torch.testing.assert_close(other, _by_torch(x, weights, biases, "sigmoid"))


def test_an_mlp_that_was_called_before_still_says_what_is_wrong():
    weights, biases = layers([5, 7, 3])
    x = torch.randn(6, 5)
    for _ in range(2):
        ops.mlp(x, weights, biases)
    with pytest.raises(ValueError, match=r"layer 0: expected weight \[out, 4\]"):
        ops.mlp(x[:, :4], weights, biases)
    with pytest.raises(ValueError, match="got 2 and 1"):
        ops.mlp(x, weights, biases[:1])
    with pytest.raises(TypeError, match=r"layer 0: expected torch.float64"):
        ops.mlp(x.double(), weights, biases)
    torch.testing.assert_close(ops.mlp(x[::2], weights, biases), _by_torch(x[::2], weights, biases))
    columns = torch.randn(5, 6).T
    torch.testing.assert_close(ops.mlp(columns, weights, biases), _by_torch(columns, weights, biases))


@pytest.mark.parametrize("activation", ["none", "relu", "sigmoid", "mish"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_mlp_gradients_are_those_of_torch(activation, dtype):
    weights, biases = layers([7, 20, 9, 3], dtype, requires_grad=True)
    x = torch.randn(11, 7, dtype=dtype, requires_grad=True)
    grad = torch.randn(11, 3, dtype=dtype)
    got = ops.mlp(x, weights, biases, activation, "sigmoid")
    wide = [t.detach().double().requires_grad_() for t in (x, *weights, *biases)]
    want = mprec.reference.mlp(wide[0], wide[1:4], wide[4:], activation, "sigmoid")
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    for a, b in zip(
        torch.autograd.grad(got, (x, *weights, *biases), grad),
        torch.autograd.grad(want, wide, grad.double()),
        strict=True,
    ):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


def test_gradcheck():
    weights, biases = layers([4, 6, 2], torch.float64, requires_grad=True)
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    call = lambda x, *t: ops.mlp(x, t[:2], t[2:], "mish", "sigmoid")  # noqa: E731
    assert torch.autograd.gradcheck(call, (x, *weights, *biases), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(call, (x, *weights, *biases))
    v = torch.randn(3, 5, 4, dtype=torch.float64, requires_grad=True)
    for self_interaction in (False, True):
        pairs = lambda v, s=self_interaction: ops.dot_interaction(v, s)  # noqa: E731
        assert torch.autograd.gradcheck(pairs, (v,), check_forward_ad=True)
        assert torch.autograd.gradgradcheck(pairs, (v,))
        behind = lambda v, first, s=self_interaction: ops.dot_interaction(v, s, first)  # noqa: E731
        first = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(behind, (v, first), check_forward_ad=True)
        assert torch.autograd.gradgradcheck(behind, (v, first))


def test_transforms():
    """``torch.func``: gradients of each sample, and a Hessian, as of the same model in plain torch."""
    torch.manual_seed(0)
    weights, biases = layers([4, 6, 3])
    x, v = torch.randn(7, 2, 4), torch.randn(7, 2, 5, 4)

    def loss(x, v, w0, w1, b0, b1, by):
        scores = by.mlp(x, [w0, w1], [b0, b1], "mish", "sigmoid")
        return scores.sum() + by.dot_interaction(v).square().sum()

    class plain:
        mlp = staticmethod(lambda *a: mprec.reference.mlp(*a, dtype=torch.float32))
        dot_interaction = staticmethod(lambda v: mprec.reference.dot_interaction(v, dtype=torch.float32))

    for derivative in (
        lambda f: torch.func.grad(f, (0, 1, 2)),
        lambda f: torch.func.hessian(f, (0, 1)),
    ):
        got, want = (
            torch.func.vmap(derivative(lambda *a, by=by: loss(*a, by=by)), (0, 0, None, None, None, None))(
                x, v, *weights, *biases
            )
            for by in (ops, plain)
        )
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(dtype, requires_grad):
    weights, biases = layers([4, 6, 2], dtype, requires_grad)
    x = torch.randn(5, 4, dtype=dtype, requires_grad=requires_grad)
    torch.library.opcheck(torch.ops.mprec.mlp, (x, weights, biases, "relu", "none"))
    v = torch.randn(3, 5, 4, dtype=dtype, requires_grad=requires_grad)
    torch.library.opcheck(torch.ops.mprec.dot_interaction, (v, True))
    grad = torch.randn(3, 10, dtype=dtype)
    torch.library.opcheck(torch.ops.mprec.dot_interaction_backward, (grad, v.detach(), False, None))
    first = torch.randn(3, 4, dtype=dtype, requires_grad=requires_grad)
    torch.library.opcheck(torch.ops.mprec.dot_interaction, (v, True, first))
    grad = torch.randn(3, 4 + 15, dtype=dtype)
    behind = (grad, v.detach(), False, first.detach())
    torch.library.opcheck(torch.ops.mprec.dot_interaction_backward, behind)


def test_modules_are_facebooks_and_torchrecs():
    """``interact_features`` and ``create_mlp`` of Facebook's DLRM, as published there."""
    torch.manual_seed(0)
    module = MLP([13, 32, 16], last_activation="relu")
    plain = nn.Sequential(nn.Linear(13, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU())
    plain.load_state_dict(dict(zip(plain.state_dict(), module.state_dict().values(), strict=True)))
    dense, sparse = torch.randn(6, 13), torch.randn(6, 5, 16)
    x = module(dense)
    torch.testing.assert_close(x, plain(dense))
    torch.testing.assert_close(module(dense.view(2, 3, 13)), plain(dense).view(2, 3, 16))
    for itself in (False, True):
        stacked = torch.cat([x[:, None], sparse], dim=1)
        z = torch.bmm(stacked, stacked.transpose(1, 2))
        offset = 1 if itself else 0
        li = torch.tensor([i for i in range(6) for j in range(i + offset)])
        lj = torch.tensor([j for i in range(6) for j in range(i + offset)])
        want = torch.cat([x, z[:, li, lj]], dim=1)
        torch.testing.assert_close(DotInteraction(itself)(x, sparse), want)
        # Of different dtypes the wider one is taken, as under autocast.
        for narrow in (x.bfloat16(), sparse), (x, sparse.bfloat16()):
            got = DotInteraction(itself)(*narrow)
            assert got.dtype is torch.float32
            torch.testing.assert_close(got, DotInteraction(itself)(*(t.float() for t in narrow)))


def test_modules_learn_and_compile():
    torch.manual_seed(0)
    model = nn.ModuleDict({"bottom": MLP([3, 8, 4]), "pairs": DotInteraction(), "top": MLP([10, 8, 1])})

    def forward(dense, sparse):
        return model["top"](model["pairs"](model["bottom"](dense), sparse))

    dense, sparse = torch.randn(64, 3), torch.randn(64, 3, 4)
    target = (dense[:, :1] * sparse[:, 0, :1]).detach()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for _ in range(60):
        loss = (forward(dense, sparse) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    compiled = torch.compile(forward, backend="aot_eager", fullgraph=True, dynamic=True)
    torch.testing.assert_close(compiled(dense, sparse), forward(dense, sparse))


def test_changed_weights_are_used():
    module = MLP([4, 5, 2])
    x = torch.randn(3, 4)
    with torch.no_grad():
        before = module(x)
        module.layers[1].bias.add_(1)
        torch.testing.assert_close(module(x), before + 1)
        module.layers[1].bias.numpy()[0] += 100  # raises no counter
        ops.clear_decoders()
        assert not torch.allclose(module(x), before + 1)


def test_what_they_refuse():
    weights, biases = layers([4, 6, 2])
    x, v = torch.randn(3, 4), torch.randn(3, 5, 4)
    for error, text, call in (
        (ValueError, r"input: expected \[B, 4\], got \[4\]", lambda: ops.mlp(x[0], weights, biases)),
        (ValueError, r"layer 0: expected weight \[out, 3\]", lambda: ops.mlp(x[:, 1:], weights, biases)),
        (ValueError, "layer 1: ", lambda: ops.mlp(x, weights, biases[:1] * 2)),
        (ValueError, "got 2 and 1", lambda: ops.mlp(x, weights, biases[:1])),
        (ValueError, "at least one layer", lambda: ops.mlp(x, [], [])),
        (ValueError, "activation", lambda: ops.mlp(x, weights, biases, "tanh")),
        (TypeError, "layer 0: expected torch.float64", lambda: ops.mlp(x.double(), weights, biases)),
        (DtypeError, "input", lambda: ops.mlp(x.int(), weights, biases)),
        (ValueError, r"vectors: expected \[B, V, D\]", lambda: ops.dot_interaction(v[0])),
        (DtypeError, "vectors", lambda: ops.dot_interaction(v.int())),
        (ValueError, r"first: expected \[", lambda: ops.dot_interaction(v, first=v[:, 0, 1:])),
        (DtypeError, "first", lambda: torch.ops.mprec.dot_interaction(v, False, v[:, 0].double())),
        (DeviceError, "first", lambda: ops.dot_interaction(v, first=v[:, 0].to("meta"))),
        (ValueError, "dense, sparse", lambda: DotInteraction()(x, v[:2])),
        (ValueError, "sizes", lambda: MLP([3])),
        (ValueError, "activation", lambda: MLP([3, 1], "tanh")),
    ):
        with pytest.raises(error, match=text):
            call()
