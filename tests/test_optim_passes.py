"""What a backward pass does to tables that an optimizer of mprec owns: one update, or none."""

import copy
import gc

import pytest
import torch
import torch.nn.functional as F
from test_optim import TorchRowWiseAdagrad

from mprec import ops, optim
from mprec.nn import EmbeddingBag, EmbeddingBagCollection, FeatureConfig
from mprec.ops import fused

PAIRS = {
    "sgd": (lambda p: optim.SGD(p, lr=0.5), lambda p: torch.optim.SGD(p, lr=0.5)),
    "adagrad": (lambda p: optim.Adagrad(p, lr=0.5), lambda p: torch.optim.Adagrad(p, lr=0.5)),
    "adam": (lambda p: optim.Adam(p, lr=0.1), lambda p: torch.optim.SparseAdam(p, lr=0.1)),
}
EVERY = {
    **PAIRS,
    "rowwise_adagrad": (
        lambda p: optim.RowWiseAdagrad(p, lr=0.5, eps=1e-6),
        lambda p: TorchRowWiseAdagrad(p, lr=0.5, eps=1e-6),
    ),
}
each = pytest.mark.parametrize("name", EVERY)


def two_tables():
    generator = torch.Generator().manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(6, 4, generator=generator)) for _ in range(2)]
    return ours, [torch.nn.Parameter(w.detach().clone()) for w in ours]


def theirs(ids, w, psw=None, mode="sum"):
    return F.embedding_bag(ids, w, mode=mode, sparse=True, per_sample_weights=psw)


@each
def test_a_table_of_several_features_takes_one_step(name):
    (w, v), (w2, v2) = two_tables()
    mine, other = EVERY[name][0]([w, v]), EVERY[name][1]([w2, v2])
    ids = torch.tensor([[1, 1], [2, 1], [0, 5], [1, 3], [4, 4], [2, 0]])
    psw = torch.rand(12)
    for step in range(3):
        out = ops.embedding_bag_multi([w, v, w], ids.flatten(), torch.arange(0, 13, 2), "sum", psw)
        out.square().sum().backward()
        parts = psw.view(3, 2, 2)
        split = ids.view(3, 2, 2)
        pairs = zip(split, [w2, v2, w2], parts, strict=True)
        torch.cat([theirs(i, t, p) for i, t, p in pairs], 1).square().sum().backward()
        other.step()
        other.zero_grad()
        assert mine.state[w]["step"].item() == step + 1
        torch.testing.assert_close(w, w2, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(v, v2, rtol=1e-4, atol=1e-5)


@each
@pytest.mark.parametrize("padding_idx", [None, 1])
def test_a_module_called_twice_takes_one_step(name, padding_idx):
    module = EmbeddingBag(6, 4, mode="mean", padding_idx=padding_idx)
    other_module = torch.nn.EmbeddingBag(6, 4, mode="mean", sparse=True, padding_idx=padding_idx)
    other_module.load_state_dict(module.state_dict())
    mine, other = EVERY[name][0](module.parameters()), EVERY[name][1](list(other_module.parameters()))
    ids, offsets = torch.tensor([0, 1, 2, 1]), torch.tensor([0, 2])
    for m, o in ((module, mine), (other_module, other)):
        (m(ids, offsets) * m(ids.flip(0), offsets)).sum().backward()
        o.step()
    assert mine.state[module.weight]["step"].item() == 1
    torch.testing.assert_close(module.weight, other_module.weight, rtol=1e-4, atol=1e-5)


def test_other_tables_of_the_pass_are_updated_too():
    """One optimizer, a table met once, one met twice, and one that nobody owns."""
    tables = [torch.nn.Parameter(torch.ones(4, 2)) for _ in range(3)]
    owner = optim.SGD(tables[:2], lr=1.0)
    ids, ends = torch.tensor([0, 1, 2]), torch.arange(4)
    out = ops.embedding_bag_multi(tables, ids, ends)
    (out.sum() + ops.embedding_bag(torch.tensor([[3]]), tables[1], mode="sum").sum()).backward()
    assert torch.equal(tables[0], torch.tensor([0.0, 1, 1, 1])[:, None].expand(4, 2))
    assert torch.equal(tables[1], torch.tensor([1.0, 0, 1, 0])[:, None].expand(4, 2))
    assert torch.equal(tables[2], torch.ones(4, 2))
    assert tables[2].grad is not None
    assert [t.grad for t in tables[:2]] == [None, None]
    del owner


def test_autograd_grad_updates_nothing():
    module = EmbeddingBag(10, 4, mode="sum")
    owner = optim.SGD(module.parameters(), lr=1.0)
    before = module.weight.detach().clone()
    ids, offsets, psw = torch.tensor([1, 2, 3]), torch.tensor([0]), torch.rand(3, requires_grad=True)
    out = module(ids, offsets, psw).sum()
    (g,) = torch.autograd.grad(out, psw, retain_graph=True)
    torch.testing.assert_close(g, before[ids].sum(1))
    (own,) = torch.autograd.grad(out, module.weight, retain_graph=True)
    assert own.sum() == pytest.approx(float(psw.sum()) * 4)
    out.backward(inputs=[psw], retain_graph=True)
    assert torch.equal(module.weight, before)
    assert module.weight.grad is None
    out.backward()
    assert not torch.equal(module.weight, before)
    del owner


def test_a_pass_that_fails_changes_nothing_and_leaves_nothing():
    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            raise ValueError("on purpose")

    w = torch.nn.Parameter(torch.ones(4, 2))
    seed = torch.ones(1, 2, requires_grad=True)
    owner = optim.SGD([w], lr=1.0)
    out = ops.embedding_bag(torch.tensor([[2]]), w, mode="sum") + Fails.apply(seed)
    with pytest.raises(ValueError, match="on purpose"):
        out.sum().backward()
    assert torch.equal(w, torch.ones(4, 2))
    gc.collect()
    assert not fused._passes
    ops.embedding_bag(torch.tensor([[2]]), w, mode="sum").sum().backward()
    assert torch.equal(w[2], torch.zeros(2))
    del owner


@pytest.mark.parametrize("option", ["max", "scale_grad_by_freq"])
def test_what_is_refused_is_refused_before_anything_changes(option):
    features = [FeatureConfig(n, 5, 3, mode=m) for n, m in (("a", "sum"), ("b", "mean"))]
    collection = EmbeddingBagCollection(features)
    odd = torch.nn.Parameter(torch.ones(5, 3))
    owner = optim.SGD([*collection.parameters(), odd], lr=0.1)
    before = copy.deepcopy(collection.state_dict())
    options = {"mode": "max"} if option == "max" else {"mode": "sum", "scale_grad_by_freq": True}
    out = collection(torch.tensor([1, 2]), torch.arange(3)).sum()
    out = out + ops.embedding_bag(torch.tensor([[1]]), odd, **options).sum()
    with pytest.raises(NotImplementedError, match=option):
        out.backward()
    assert all(torch.equal(v, before[k]) for k, v in collection.state_dict().items())
    assert torch.equal(odd, torch.ones(5, 3))
    del owner


def test_a_feature_of_maxima_is_refused_before_the_others_are_updated():
    features = [FeatureConfig(n, 5, 3, mode=m) for n, m in (("a", "sum"), ("b", "max"), ("c", "mean"))]
    collection = EmbeddingBagCollection(features)
    owner = optim.SGD(collection.parameters(), lr=0.1)
    before = copy.deepcopy(collection.state_dict())
    with pytest.raises(NotImplementedError, match="max is not for tables"):
        collection(torch.tensor([1, 2, 3]), torch.arange(4)).sum().backward()
    assert all(torch.equal(v, before[k]) for k, v in collection.state_dict().items())
    del owner


def test_states_of_torchs_optimizers_are_taken():
    for name in ("adagrad", "adam"):
        (w, _), (w2, _) = two_tables()
        mine, other = PAIRS[name][0]([w]), PAIRS[name][1]([w2])
        for step in range(4):
            theirs(torch.tensor([[1, 2]]), w2).square().sum().backward()
            other.step()
            other.zero_grad()
            if step == 1:
                mine.load_state_dict(copy.deepcopy(other.state_dict()))
                w.data.copy_(w2)
            elif step > 1:
                ops.embedding_bag(torch.tensor([[1, 2]]), w, mode="sum").square().sum().backward()
        torch.testing.assert_close(w, w2, rtol=1e-4, atol=1e-5)


def test_states_that_do_not_fit_are_named_when_they_are_loaded():
    w = torch.nn.Parameter(torch.ones(4, 2))
    mine = optim.Adam([w])
    good = copy.deepcopy(mine.state_dict())
    for change, match in (
        (lambda s: s["state"][0].pop("exp_avg"), "no 'exp_avg'"),
        (lambda s: s["state"][0].update(exp_avg=torch.ones(3, 2)), r"'exp_avg'.*expected shape \(4, 2\)"),
        (lambda s: s["param_groups"][0].update(weight_decay=0.1, foreach=None), "weight_decay=0.1 is not"),
        (lambda s: s["param_groups"][0].update(maximize=True), "maximize"),
    ):
        bad = copy.deepcopy(good)
        change(bad)
        with pytest.raises(ValueError, match=match):
            mine.load_state_dict(bad)
        ops.embedding_bag(torch.tensor([[1]]), w, mode="sum").sum().backward()  # as before
    assert mine.state[w]["step"].item() == 4
    fresh = copy.deepcopy(good)
    fresh["state"] = {}  # of an optimizer that has taken no step
    mine.load_state_dict(fresh)
    assert mine.state[w]["step"].item() == 0
    ops.embedding_bag(torch.tensor([[1]]), w, mode="sum").sum().backward()
    assert mine.state[w]["step"].item() == 1


@pytest.mark.parametrize("make", [optim.SGD, optim.Adagrad, optim.RowWiseAdagrad, optim.Adam])
def test_updates_are_refused_where_there_are_replicas(make, monkeypatch):
    """Two real processes are in test_replicas.py."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    w = torch.nn.Parameter(torch.ones(4, 2))
    for sharded in (False, True):
        owner = make([w], lr=1.0, sharded=sharded)
        out = ops.embedding_bag(torch.tensor([[2]]), w, mode="sum").sum()
        if sharded:
            out.backward()
        else:
            with pytest.raises(RuntimeError, match=r"replicas would drift apart.*sharded=True"):
                out.backward()
        assert torch.equal(w, torch.ones(4, 2)) != sharded
        owner.release()


def test_a_frozen_table_stays():
    module, top = EmbeddingBag(10, 4, mode="sum").requires_grad_(False), torch.nn.Linear(4, 1)
    owner = optim.Adagrad(module.parameters(), lr=1.0)
    before = module.weight.clone()
    for frozen in (True, False):
        module.requires_grad_(not frozen)
        top(module(torch.tensor([[1, 2]]))).sum().backward()
        assert torch.equal(module.weight, before) == frozen
        assert owner.state[module.weight]["step"] == (0 if frozen else 1)
