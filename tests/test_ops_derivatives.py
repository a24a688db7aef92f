"""Derivatives of the operators in every way that torch has, against torch's own formulas in float64."""

import pytest
import torch
import torch.autograd.forward_ad as fwd
import torch.nn.functional as F

import mprec.nn
from mprec import ops, reference
from mprec.errors import IdOutOfRangeError
from mprec.models import DLRM
from mprec.names import MODES
from mprec.nn import (
    MLP,
    DeepHashEmbeddingBag,
    DheConfig,
    DotInteraction,
    EmbeddingBag,
    EmbeddingBagCollection,
    FeatureConfig,
    LowRankEmbeddingBagCollection,
)

IDS, OFFSETS = torch.tensor([0, 1, 1, 4, 2, 3]), torch.tensor([0, 2, 2, 5])
modes = pytest.mark.parametrize("mode", MODES)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
SMALL = DheConfig(k=8, hidden=(4,), seed=1)


def plain(weight, mode, psw=None, ids=IDS, offsets=OFFSETS):
    """What :func:`ops.embedding_bag` means, in operators that torch differentiates in all ways."""
    return reference.embedding_bag(weight, ids, offsets, MODES[mode], psw, dtype=weight.dtype)


def table(dtype=torch.float64):
    return torch.randn(5, 3, dtype=dtype, generator=torch.Generator().manual_seed(0))


class Dhe:
    """A decoder whose parameters are one flat vector, for functional transforms."""

    def __init__(self, dtype, multi: bool):
        self.module = DeepHashEmbeddingBag(3, SMALL, dtype=dtype)
        self.multi = multi
        self.flat = torch.cat([p.detach().flatten() for p in self.module.parameters()])

    def _stack(self, flat):
        parameters, at = [], 0
        for p in self.module.parameters():
            parameters.append(flat[at : at + p.numel()].view_as(p))
            at += p.numel()
        return parameters[0::2], parameters[1::2]

    def __call__(self, flat, mode="sum"):
        weights, biases = self._stack(flat)
        hashes = self.module.coefficients
        if self.multi:
            ends = torch.cat([OFFSETS, torch.tensor([len(IDS)])])
            return ops.dhe_bag_multi(IDS, ends, [hashes], weights, biases, [2], mode=mode)
        return ops.dhe_bag(IDS, OFFSETS, hashes, weights, biases, mode=mode)

    def plain(self, flat, mode="sum"):
        weights, biases = self._stack(flat)
        hashes = self.module.coefficients
        return reference.dhe_bag(IDS, OFFSETS, hashes, weights, biases, mode=MODES[mode], dtype=flat.dtype)


def functions(dtype, mode):
    """(the operator, the formula, where to differentiate): tables and decoders, one or in a list of one."""
    ends = torch.cat([OFFSETS, torch.tensor([len(IDS)])])
    yield lambda w: ops.embedding_bag(IDS, w, OFFSETS, mode=mode), lambda w: plain(w, mode), table(dtype)
    yield lambda w: ops.embedding_bag_multi([w], IDS, ends, mode), lambda w: plain(w, mode), table(dtype)
    for multi in (False, True):
        dhe = Dhe(dtype, multi)
        yield lambda w, d=dhe: d(w, mode), lambda w, d=dhe: d.plain(w, mode), dhe.flat


def close(a, b):
    tolerance = 1e-4 if a.dtype == torch.float32 else 1e-9
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def loss(f):
    return lambda w: f(w).pow(3).sum()


#: Of a function f, where to take it, and a direction there.
TRANSFORMS = {
    "jvp": lambda f, at, d: torch.func.jvp(f, (at,), (d,))[1],
    "grad": lambda f, at, d: torch.func.grad(loss(f))(at),
    "jacrev": lambda f, at, d: torch.func.jacrev(f)(at),
    "jacfwd": lambda f, at, d: torch.func.jacfwd(f)(at),
    "hessian": lambda f, at, d: torch.func.hessian(loss(f))(at),
    "hvp": lambda f, at, d: torch.autograd.functional.hvp(loss(f), at, d)[1],
    "jacobian": lambda f, at, d: torch.autograd.functional.jacobian(f, at, vectorize=True),
    "forward jacobian": lambda f, at, d: torch.autograd.functional.jacobian(
        f, at, strategy="forward-mode", vectorize=True
    ),
    "vmap": lambda f, at, d: torch.func.vmap(f)(torch.stack([at, at + d])),
    "vmap of grad": lambda f, at, d: torch.func.vmap(torch.func.grad(loss(f)))(torch.stack([at, at + d])),
}


@pytest.mark.parametrize("name", TRANSFORMS)
@modes
@dtypes
def test_every_transform_is_that_of_the_formula(name, mode, dtype):
    for ours, theirs, at in functions(dtype, mode):
        direction = torch.linspace(-1, 1, at.numel(), dtype=dtype).view_as(at)
        close(*(TRANSFORMS[name](f, at, direction) for f in (ours, theirs)))


@modes
@dtypes
def test_forward_mode_by_dual_numbers(mode, dtype):
    for ours, theirs, at in functions(dtype, mode):
        with fwd.dual_level():
            found = [fwd.unpack_dual(f(fwd.make_dual(at, torch.ones_like(at)))) for f in (ours, theirs)]
            close(found[0].primal, found[1].primal)
            close(found[0].tangent, found[1].tangent)


@modes
@dtypes
def test_a_gradient_penalty(mode, dtype):
    for ours, theirs, at in functions(dtype, mode):
        grads = []
        for f in (ours, theirs):
            w = at.clone().requires_grad_()
            loss = f(w).pow(3).sum()
            (g,) = torch.autograd.grad(loss, w, create_graph=True)
            (loss + g.square().sum()).backward()
            grads.append(w.grad)
        close(*grads)


@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_second_derivatives_with_weights_and_padding(mode):
    def f(w, psw):
        return ops.embedding_bag(IDS, w, OFFSETS, mode=mode, per_sample_weights=psw, padding_idx=1)

    at = table().requires_grad_(), torch.rand(6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(f, at, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(f, at, check_fwd_over_rev=True)


def test_second_derivatives_of_sparse_and_scaled_gradients():
    collection = EmbeddingBagCollection([FeatureConfig("a", 5, 3)], sparse=True)
    w = collection.tables["a"].weight
    y = collection(IDS, torch.cat([OFFSETS, torch.tensor([6])]))
    (g,) = torch.autograd.grad(y.square().sum(), w, create_graph=True)
    assert g.is_sparse
    g.to_dense().square().sum().backward()
    v = w.detach().clone().requires_grad_()
    (h,) = torch.autograd.grad(plain(v, "sum").square().sum(), v, create_graph=True)
    h.square().sum().backward()
    close(w.grad.to_dense(), v.grad)

    w = table().requires_grad_()
    y = ops.embedding_bag(IDS, w, OFFSETS, mode="sum", scale_grad_by_freq=True)
    (g,) = torch.autograd.grad(y.square().sum(), w, create_graph=True)
    times = torch.bincount(IDS, minlength=5)[:, None]
    (h,) = torch.autograd.grad(plain(w, "sum").square().sum(), w, create_graph=True)
    close(g, h / times)
    again, plainly = (torch.autograd.grad(x.sum(), w, retain_graph=True)[0] for x in (g, h / times))
    close(again, plainly / times)  # the way back through y is scaled too


@pytest.mark.parametrize("option", ["sparse", "scale_grad_by_freq"])
def test_what_transforms_lack_is_refused_by_name(option):
    def f(w):
        return ops.embedding_bag(IDS, w, OFFSETS, mode="sum", **{option: True}).sum()

    with pytest.raises(NotImplementedError, match=option):
        torch.func.grad(f)(table(torch.float32))
    w = table()
    with pytest.raises(NotImplementedError, match="offsets"):
        torch.func.vmap(lambda o: ops.embedding_bag(IDS, w, o, mode="sum"))(OFFSETS.expand(2, -1))


@pytest.mark.parametrize("bad", [5, -1])
def test_transforms_check_ids_too(bad):
    def f(w):
        return ops.embedding_bag(torch.tensor([bad]), w, torch.tensor([0])).sum()

    with pytest.raises(IdOutOfRangeError, match=str(bad)):
        torch.func.grad(f)(table())
    with pytest.raises(IdOutOfRangeError, match=str(bad)):
        torch.func.jvp(f, (table(),), (table(),))
    w = table()
    with pytest.raises((IndexError, RuntimeError), match=r"range|bounds"):
        torch.func.vmap(lambda i: ops.embedding_bag(i[None], w))(torch.tensor([[1, bad]]))


def test_per_sample_gradients_as_of_torchs_module():
    x = torch.randint(0, 10, (5, 3), generator=torch.Generator().manual_seed(0))
    found = []
    for kind in (torch.nn.EmbeddingBag, EmbeddingBag):
        module = kind(10, 4, _weight=torch.linspace(-1, 1, 40).view(10, 4))
        parameters = {"weight": module.weight.detach()}

        def loss(p, i, module=module):
            return torch.func.functional_call(module, p, (i[None],)).square().sum()

        found.append([torch.func.grad(loss)(parameters, row)["weight"] for row in x])
        if kind is EmbeddingBag:
            batched = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)["weight"]
            close(batched, torch.stack(found[-1]))
    close(torch.stack(found[1]), torch.stack(found[0]))


@pytest.mark.parametrize("name", ["dhe", "table", "hybrid", "low_rank"])
def test_gradients_by_functional_calls_of_modules(name):
    x = torch.randint(0, 10, (5, 3), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    module = {
        "dhe": lambda: DeepHashEmbeddingBag(4, SMALL),
        "table": lambda: EmbeddingBag(10, 4),
        "hybrid": lambda: mprec.nn.HybridEmbeddingBag(10, 4, SMALL),
        "low_rank": lambda: mprec.nn.LowRankEmbeddingBag(10, 4),
    }[name]()
    parameters = {k: v.detach() for k, v in module.named_parameters()}
    found = torch.func.grad(lambda p: torch.func.functional_call(module, p, (x,)).square().sum())(parameters)
    expected = torch.autograd.grad(module(x).square().sum(), list(module.parameters()))
    assert list(found) == list(parameters)
    for ours, plain in zip(found.values(), expected, strict=True):
        close(ours, plain)


def test_weights_of_a_feature_that_serves_several_tables():
    psw = torch.ones(4, requires_grad=True)
    w, v = torch.randn(10, 3), torch.randn(10, 5)
    ids = torch.tensor([1, 2, 4, 5])
    shared = {"features": [0, 0], "num_features": 1}
    ends = torch.tensor([0, 2, 4])
    ops.embedding_bag_multi([w, v], ids, ends, per_sample_weights=psw, **shared).sum().backward()
    close(psw.grad, w[ids].sum(1) + v[ids].sum(1))
    psw.grad = None
    one, two = DeepHashEmbeddingBag(3, SMALL), DeepHashEmbeddingBag(5, SMALL)
    stacks = [one.coefficients, two.coefficients], one.weights + two.weights, one.biases + two.biases, [2, 2]
    ops.dhe_bag_multi(ids, ends, *stacks, per_sample_weights=psw, **shared).sum().backward()
    close(psw.grad, one.materialize(6)[ids].sum(1) + two.materialize(6)[ids].sum(1))


@pytest.mark.parametrize("kind", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.bool])
@modes
@dtypes
def test_integers_of_any_type_have_the_gradient_of_int64(kind, mode, dtype):
    ids = torch.tensor([1, 1, 0, 1, 0]) if kind == torch.bool else IDS[:5]
    grads = []
    for ids_now in (ids, ids.to(kind)):
        w = table(dtype).requires_grad_()
        psw = None if mode == "max" else torch.ones(5, dtype=dtype, requires_grad=True)
        out = ops.embedding_bag(ids_now, w, torch.tensor([0, 2]), mode=mode, per_sample_weights=psw)
        out.square().sum().backward()
        grads.append((w.grad, torch.ones(1) if psw is None else psw.grad))
    assert torch.equal(grads[0][0], grads[1][0])
    assert torch.equal(grads[0][1], grads[1][1])


def test_offsets_of_a_narrow_type_count_beyond_it():
    w = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    ids = torch.arange(600) % 3
    ops.embedding_bag(ids, w, torch.tensor([0, 200], dtype=torch.uint8), mode="max").sum().backward()
    v = w.detach().clone().requires_grad_()
    ops.embedding_bag(ids, v, torch.tensor([0, 200]), mode="max").sum().backward()
    assert torch.equal(w.grad, v.grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_gradients_of_narrow_tables_are_summed_in_float32(dtype, sparse, weighted):
    ids, n = torch.ones(5000, dtype=torch.int64), 5000
    w = torch.zeros(3, 2, dtype=dtype, requires_grad=True)
    psw = torch.ones(n, dtype=dtype, requires_grad=True) if weighted else None
    out = ops.embedding_bag(ids, w, torch.arange(n), mode="sum", sparse=sparse, per_sample_weights=psw)
    out.sum().backward()
    grad = w.grad.to_dense()
    assert grad.dtype == dtype
    assert abs(float(grad[1, 0]) - n) <= n * 2.0**-9
    stack = DeepHashEmbeddingBag(2, DheConfig(k=4, hidden=(3,)), dtype=dtype)
    ends = torch.arange(n + 1)
    pooled = ops.dhe_bag(ids, ends, *stack.stack(), include_last_offset=True, last_activation="none")
    pooled.sum().backward()
    assert abs(float(stack.decoder[-1].bias.grad[0]) - n) <= n * 2.0**-8


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_a_nan_among_candidates_is_torchs(dtype):
    n = float("nan")
    w = torch.tensor([[1.0, n, -1.0, n], [n, 2.0, n, n], [0.5, 3.0, n, 1.0]], dtype=dtype, requires_grad=True)
    v = w.detach().float().clone().requires_grad_()
    ids, offsets = torch.tensor([0, 1, 2, 1, 2]), torch.tensor([0, 3])
    y, z = ops.embedding_bag(ids, w, offsets, mode="max"), F.embedding_bag(ids, v, offsets, mode="max")
    torch.testing.assert_close(y.float(), z, equal_nan=True)
    y.sum().backward()
    z.sum().backward()
    assert torch.equal(w.grad.float(), v.grad)
    assert torch.equal(reference.embedding_bag(w, ids, offsets, 2).isnan(), z.isnan())


def test_a_table_of_maxima_may_change_before_the_backward_pass():
    x = torch.tensor([[1, 2], [3, 4]])
    grads = []
    for kind in (torch.nn.EmbeddingBag, EmbeddingBag):
        module = kind(10, 3, mode="max", max_norm=0.1, _weight=torch.linspace(-1, 1, 30).view(10, 3))
        (module(x) + module(x + 2)).sum().backward()
        grads.append(module.weight.grad)
    close(*grads)


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_the_default_dtype_does_not_matter(default):
    torch.set_default_dtype(default)
    try:
        for sparse in (False, True):
            module = EmbeddingBag(10, 3, mode="sum", sparse=sparse, dtype=torch.float32)
            module(torch.tensor([1, 2]), torch.tensor([0])).sum().backward()
            assert module.weight.grad.dtype == torch.float32
        for optimizer in (mprec.optim.SGD, mprec.optim.Adagrad, mprec.optim.RowWiseAdagrad, mprec.optim.Adam):
            module = EmbeddingBag(10, 3, mode="sum", dtype=torch.float32)
            owner = optimizer(module.parameters(), lr=0.1)
            module(torch.tensor([1, 2]), torch.tensor([0])).sum().backward()
            del owner
        hashes = mprec.hashing.coefficients(8, "universal", 0)
        assert ops.hash_encode(hashes, torch.tensor([1, 2])).dtype == torch.float32
        dhe = DeepHashEmbeddingBag(3, SMALL, dtype=torch.float32)
        dhe(torch.arange(6).view(2, 3)).sum().backward()
        features = [FeatureConfig("a", 5, 3), FeatureConfig("b", 5, 3, "hybrid", dhe=SMALL)]
        collection = EmbeddingBagCollection(features, dtype=torch.float32)
        batch = torch.arange(4), torch.arange(5)
        trained = collection(*batch)
        cached = mprec.cache.CachedDeepHashEmbeddingBag(dhe, 1 << 14)
        with torch.no_grad():
            assert dhe(torch.arange(6).view(2, 3)).dtype == torch.float32
            assert cached(torch.arange(6).view(2, 3)).dtype == torch.float32
            assert torch.equal(collection(*batch), trained)
            quantized = mprec.nn.QuantizedEmbeddingBagCollection(collection)
            assert quantized.to("cpu")(*batch).dtype == torch.float32
            codes = LowRankEmbeddingBagCollection([FeatureConfig("a", 5, 3)], rank=2).to("cpu")
            assert codes(torch.tensor([1]), torch.tensor([0, 1])).dtype == torch.float32
        like = {"dtype": torch.float32}
        assert MLP([3, 4, 1], **like)(torch.randn(2, 3, **like)).dtype == torch.float32
        first = torch.randn(2, 3, **like).requires_grad_()
        products = DotInteraction()(first, torch.randn(2, 2, 3, **like))
        products.sum().backward()
        assert products.dtype == first.grad.dtype == torch.float32
        path = DLRM([FeatureConfig("a", 5, 3)], 2, 3, (4,), (4,)).float()
        path.top[0].bias = None
        inputs = torch.randn(2, 2, **like), torch.tensor([1, 2]), torch.arange(3)
        with torch.no_grad():
            close(mprec.compile_path(path)(*inputs), path(*inputs).sigmoid())
    finally:
        torch.set_default_dtype(torch.float32)


def test_gradient_operators_check_ids():
    grad, w = torch.ones(1, 4), torch.zeros(3, 4)
    for by_freq in (True, False):
        for bad in (10**6, -1):
            with pytest.raises(IdOutOfRangeError, match=str(bad)):
                torch.ops.mprec.embedding_bag_backward(
                    grad, w, torch.tensor([bad]), torch.tensor([0]), 0, None, False, -1, by_freq, False, True,
                    False,
                )  # fmt: skip
