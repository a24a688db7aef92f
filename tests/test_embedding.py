"""Look-ups without pooling against torch's, and the modules in their place."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mprec.optim
from mprec import ops
from mprec.errors import IdOutOfRangeError
from mprec.nn import (
    DeepHashEmbedding,
    DeepHashEmbeddingBag,
    DheConfig,
    Embedding,
    LowRankEmbedding,
    LowRankEmbeddingBag,
)

CONFIG = DheConfig(k=16, hidden=(8,), last_activation="none")
SHAPES = [(), (1,), (5,), (2, 3), (2, 0), (2, 3, 4)]


@pytest.fixture(params=["torch's gradient", "ours"])
def gradient(request, monkeypatch):
    """Either way to the gradient for batches of any size."""
    if request.param == "ours":
        monkeypatch.setattr("mprec.ops._embedding._MANY", 0)
    return request.param


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("padding_idx", [None, 0, -1])
@pytest.mark.parametrize("scale", [False, True])
def test_values_and_gradients_are_torchs(shape, dtype, padding_idx, scale, gradient):
    torch.manual_seed(0)
    theirs = nn.Embedding(9, 4, padding_idx=padding_idx, scale_grad_by_freq=scale)
    with torch.no_grad():
        theirs.weight.normal_()  # the padding row too
    ours = Embedding(9, 4, padding_idx=padding_idx, scale_grad_by_freq=scale)
    ours.load_state_dict(theirs.state_dict())
    ids = torch.randint(9, shape).to(dtype)
    with torch.no_grad():
        assert torch.equal(ours(ids), theirs(ids))
    ours(ids).square().sum().backward()
    theirs(ids).square().sum().backward()
    assert torch.equal(ours(ids), theirs(ids))
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad)
    assert repr(ours) == repr(theirs)


def test_max_norm_sparse_and_pretrained(gradient):
    torch.manual_seed(0)
    rows = torch.randn(9, 4)
    ids = torch.tensor([[1, 2], [2, 8]])
    for options in ({"max_norm": 0.5}, {"sparse": True}, {"freeze": False}, {"padding_idx": 2}):
        theirs = nn.Embedding.from_pretrained(rows.clone(), **{"freeze": False, **options})
        ours = Embedding.from_pretrained(rows.clone(), **{"freeze": False, **options})
        assert torch.equal(ours(ids), theirs(ids))
        assert torch.equal(ours.weight, theirs.weight)
        for m in (ours, theirs):
            m(ids).sum().backward()
        assert ours.weight.grad.is_sparse == theirs.weight.grad.is_sparse
        torch.testing.assert_close(ours.weight.grad.to_dense(), theirs.weight.grad.to_dense())
    frozen = Embedding.from_pretrained(rows)
    assert not frozen(ids).requires_grad


def test_many_ids_use_the_kernels_and_agree():
    torch.manual_seed(0)
    ids = torch.randint(50, (100, 100))
    weight = torch.randn(50, 8, requires_grad=True)
    out = ops.embedding(ids, weight)
    assert "View" in type(out.grad_fn).__name__  # of the operator's rows, not torch's EmbeddingBackward
    (ours,) = torch.autograd.grad(out.square().sum(), weight)
    exact = weight.detach().double().requires_grad_()
    (theirs,) = torch.autograd.grad(F.embedding(ids, exact).square().sum(), exact)
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)
    assert torch.autograd.gradcheck(lambda w: ops.embedding(ids[:3, :4], w, 2), exact)


@pytest.mark.parametrize("bad", [-1, 9])
def test_bad_input_raises_what_torch_raises(bad, gradient):
    ids = torch.tensor([[0, bad]])
    for embedding in (nn.Embedding(9, 4), Embedding(9, 4)):
        with pytest.raises(IndexError):
            embedding(ids)
    for call in (
        lambda e: e(torch.tensor([0.5])),
        lambda e: e([1, 2]),
    ):
        with pytest.raises(Exception) as theirs:
            call(nn.Embedding(9, 4))
        with pytest.raises(theirs.type):
            call(Embedding(9, 4))
    for make in (nn.Embedding, Embedding):
        with pytest.raises(AssertionError, match="num_embeddings"):
            make(9, 4, padding_idx=9)


def test_compiled_scripted_traced_and_mapped():
    embedding = Embedding(9, 4)
    ids = torch.tensor([[1, 2], [0, 8]])
    expected = F.embedding(ids, embedding.weight)
    compiled = torch.compile(embedding, backend="aot_eager", fullgraph=True, dynamic=True)
    assert torch.equal(compiled(ids), expected)
    assert torch.equal(torch.jit.script(embedding)(ids), expected)
    assert torch.equal(torch.fx.symbolic_trace(embedding)(ids), expected)
    assert torch.equal(torch.func.vmap(embedding)(ids), expected)
    weights = {"weight": embedding.weight.detach()}
    grad = torch.func.grad(lambda w: torch.func.functional_call(embedding, w, (ids,)).sum())(weights)
    assert grad["weight"].sum() == ids.numel() * 4


@pytest.mark.parametrize(
    "make", [mprec.optim.SGD, mprec.optim.Adagrad, mprec.optim.RowWiseAdagrad, mprec.optim.Adam]
)
def test_owned_tables_are_updated_once_a_pass(make):
    torch.manual_seed(0)
    embedding = Embedding(9, 4, padding_idx=3)
    bag = mprec.nn.EmbeddingBag.from_pretrained(
        embedding.weight.detach().clone(), freeze=False, mode="sum", padding_idx=3
    )
    optimizers = make(embedding.parameters(), lr=0.1), make(bag.parameters(), lr=0.1)
    ids = torch.tensor([[1, 3, 1], [8, 1, 3]])
    (embedding(ids).sum(1) * torch.arange(4)).sum().backward()
    (bag(ids) * torch.arange(4)).sum().backward()
    torch.testing.assert_close(embedding.weight, bag.weight)
    assert embedding.weight.grad is None
    with torch.profiler.profile():  # who watches changes nothing
        before = embedding.weight.detach().clone()
        embedding(ids).sum().backward()
    assert not torch.equal(embedding.weight, before)
    assert torch.equal(embedding.weight[3], before[3])
    assert [o.state[p]["step"] for o in optimizers for p in o.state] == [2, 1]


@pytest.mark.parametrize("shape", SHAPES)
def test_deep_hash_embedding_is_a_bag_of_one(shape):
    torch.manual_seed(0)
    embedding = DeepHashEmbedding(50, 6, CONFIG, padding_idx=-1)
    assert embedding.padding_idx == 49
    bag = DeepHashEmbeddingBag(6, CONFIG, padding_idx=49)
    bag.load_state_dict(embedding.state_dict())
    ids = torch.randint(50, shape)
    expected = bag(ids.reshape(-1, 1)).view(*shape, 6)
    torch.testing.assert_close(embedding(ids), expected)
    with torch.no_grad():
        torch.testing.assert_close(embedding(ids), expected)
    torch.testing.assert_close(F.embedding(ids, embedding.weight), expected)
    embedding.weight.sum().backward()
    assert embedding.decoder[0].weight.grad.abs().sum() > 0
    assert embedding(torch.tensor(49)).abs().sum() == 0
    with pytest.raises(IdOutOfRangeError, match="50"):
        embedding(torch.tensor([[50]]))


@pytest.mark.parametrize("make", [Embedding, DeepHashEmbedding, LowRankEmbedding])
@pytest.mark.parametrize("gradient", [True, False])
def test_nested_rows_stay_nested(make, gradient):
    rows = [torch.tensor([1, 2]), torch.tensor([3]), torch.tensor([0, 4, 4])]
    module = make(5, 3)
    with torch.set_grad_enabled(gradient):
        out = module(torch.nested.nested_tensor(rows, layout=torch.jagged))
        for got, ids in zip(out.unbind(), rows, strict=True):
            torch.testing.assert_close(got, module(ids))
        tall = torch.nested.nested_tensor([torch.stack([r, r], 1) for r in rows], layout=torch.jagged)
        for got, ids in zip(module(tall).unbind(), rows, strict=True):
            torch.testing.assert_close(got, module(torch.stack([ids, ids], 1)))
        assert out.is_nested
        assert out.requires_grad == gradient
    if make is DeepHashEmbedding:
        with pytest.raises(ValueError, match="jagged"):
            module(torch.nested.nested_tensor(rows, layout=torch.strided))


def test_deep_hash_embedding_without_a_bound():
    embedding = DeepHashEmbedding(None, 4, CONFIG)
    assert embedding(torch.tensor([[2**62]])).shape == (1, 1, 4)
    with pytest.raises(RuntimeError, match="without num_embeddings has no table"):
        _ = embedding.weight


def test_low_rank_is_a_table_of_products():
    torch.manual_seed(0)
    embedding = LowRankEmbedding(20, 8, rank=3, padding_idx=0)
    ids = torch.tensor([[1, 0], [19, 7]])
    table = embedding.rows.weight @ embedding.projection.weight.T
    torch.testing.assert_close(embedding(ids), table[ids])
    torch.testing.assert_close(embedding.weight, table)
    bag = LowRankEmbeddingBag(20, 8, rank=3, mode="sum", padding_idx=0)
    bag.load_state_dict(embedding.state_dict())
    torch.testing.assert_close(bag(ids), table[ids].sum(1))
    assert (embedding.num_embeddings, embedding.embedding_dim, embedding.padding_idx) == (20, 8, 0)
    assert LowRankEmbedding(500, 256, rank=64).weight.std().sub(1).abs() < 0.1
    twin = copy.deepcopy(embedding)
    twin.reset_parameters()
    assert not torch.equal(twin.rows.weight, embedding.rows.weight)
    assert twin.rows.weight[0].abs().sum() == 0
    with pytest.raises(ValueError, match="rank: expected an integer from 1 to embedding_dim, 8, got 9"):
        LowRankEmbedding(20, 8, rank=9)
    with pytest.raises(ValueError, match="mode: low rank pools by 'sum' or 'mean', got 'max'"):
        LowRankEmbeddingBag(20, 8, mode="max")
