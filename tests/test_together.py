"""Look-ups side by side: what each module gives by itself, and one operator call where that is the same."""

import copy

import pytest
import torch
from torch import nn

import mprec.optim
from mprec import ops
from mprec.errors import IdOutOfRangeError
from mprec.nn import DeepHashEmbedding, DheConfig, Embedding, LowRankEmbedding, embed_together, swap

SMALL = DheConfig(k=8, hidden=(4,))


@pytest.fixture
def calls(monkeypatch):
    """How many tables each call of the operator served."""
    served = []
    call = ops.embedding_bag_multi

    def counting(weights, *arguments, **options):
        served.append(len(weights))
        return call(weights, *arguments, **options)

    monkeypatch.setattr("mprec.ops.embedding_bag_multi", counting)
    return served


def tables(*dims, **options):
    torch.manual_seed(0)
    return nn.ModuleList(Embedding(9, dim, **options) for dim in dims)


def alone(modules, ids):
    return [module(i) for module, i in zip(modules, ids, strict=True)]


def same(found, expected):
    assert len(found) == len(expected)
    for ours, plain in zip(found, expected, strict=True):
        assert ours.shape == plain.shape
        assert torch.equal(ours, plain)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("kind", [torch.int64, torch.int32])
def test_vectors_of_any_shapes(grad, kind, calls):
    modules = tables(4, 3, 17, 4, 5)
    owner = mprec.optim.SGD(modules.parameters())
    shapes = (6,), (6, 1), (2, 3), (5,), ()
    ids = [torch.randint(9, shape).to(kind) for shape in shapes]
    ids[1] = torch.randint(9, (6, 4)).to(kind)[:, 1:2]  # a column of a batch
    with torch.set_grad_enabled(grad):
        same(embed_together(modules, ids), alone(modules, ids))
    assert calls == ([3] if grad else [])  # without gradients each by itself is faster
    same(embed_together(iter(modules), iter(ids)), alone(modules, ids))
    assert embed_together([], []) == []
    owner.release()
    calls.clear()
    same(embed_together(modules, ids), alone(modules, ids))
    assert calls == []


@pytest.mark.parametrize("make", ["SGD", "Adagrad", "RowWiseAdagrad", "Adam"])
def test_owned_tables_take_one_step(make, calls):
    modules = tables(4, 3)
    twins = copy.deepcopy(modules)
    optimizers = [getattr(mprec.optim, make)(m.parameters(), lr=0.1) for m in (modules, twins)]
    ids = [torch.randint(9, (6,)) for _ in range(3)]
    sum(v.square().sum() for v in embed_together([*modules, modules[0]], ids)).backward()
    sum(v.square().sum() for v in alone([*twins, twins[0]], ids)).backward()
    assert calls == [3]
    for ours, plain in zip(modules, twins, strict=True):
        torch.testing.assert_close(ours.weight, plain.weight)
        assert optimizers[0].state[ours.weight]["step"] == 1


class Doubled(Embedding):
    def forward(self, input):
        return 2 * super().forward(input)


def hooked():
    module = Embedding(9, 4)
    module.register_forward_hook(lambda module, args, out: out + 1)
    return module


def parametrised():
    module = Embedding(9, 4)
    nn.utils.parametrizations.weight_norm(module)
    return module


OTHERS = {
    "torch's": lambda: nn.Embedding(9, 4),
    "a forward of its own": lambda: Doubled(9, 4),
    "hooks": hooked,
    "parametrised": parametrised,
    "max_norm": lambda: Embedding(9, 4, max_norm=0.5),
    "frequencies": lambda: Embedding(9, 4, scale_grad_by_freq=True),
    "padding": lambda: Embedding(9, 4, padding_idx=2),
    "float64": lambda: Embedding(9, 4, dtype=torch.float64),
    "deep hash": lambda: DeepHashEmbedding(9, 4, SMALL),
    "low rank": lambda: LowRankEmbedding(9, 4),
}


@pytest.mark.parametrize("name", OTHERS)
def test_whatever_is_not_plain_is_called_by_itself(name, calls):
    torch.manual_seed(0)
    modules = nn.ModuleList([Embedding(9, 4), OTHERS[name](), Embedding(9, 4)])
    twins = copy.deepcopy(modules)
    ids = [torch.tensor([2, 2, 8, 0, 1]) for _ in modules]
    owned = range(3) if name in ("a forward of its own", "hooks", "max_norm", "padding") else (0, 2)
    owners = [mprec.optim.SGD([each[i].weight for i in owned], lr=0.1) for each in (modules, twins)]
    found, expected = embed_together(modules, ids), alone(twins, ids)
    same(found, expected)
    assert calls == [2]
    for vectors in (found, expected):
        sum(v.square().sum() for v in vectors).backward()
    for ours, plain in zip(modules.parameters(), twins.parameters(), strict=True):
        torch.testing.assert_close(ours, plain)
        torch.testing.assert_close(ours.grad, plain.grad)
    assert modules[0].weight.grad is None
    assert len(owners) == 2


def test_a_swapped_model_keeps_its_modules(calls):
    model = nn.ModuleDict({"a": nn.Embedding(9, 4), "b": nn.Embedding(9, 6)})
    ids = [torch.tensor([1, 5]), torch.tensor([0, 8])]
    expected = alone(model.values(), ids)
    swap(model)
    owner = mprec.optim.SGD(model.parameters())
    same(embed_together(model.values(), ids), expected)
    assert calls == [2]
    traced = torch.compile(lambda *ids: embed_together(model.values(), ids), backend="eager", fullgraph=True)
    same(traced(*ids), expected)
    assert calls == [2]
    del owner


def test_errors_are_the_modules_own():
    modules = tables(4, 3)
    owner = mprec.optim.SGD(modules.parameters())
    for bad in (9, -1):
        ids = [torch.tensor([0]), torch.tensor([bad])]
        with pytest.raises(IdOutOfRangeError) as own:
            alone(modules, ids)
        with pytest.raises(IdOutOfRangeError) as error:
            embed_together(modules, ids)
        assert str(error.value) == str(own.value)
    with pytest.raises(ValueError, match="as many modules as tensors of IDs, got 2 and 1"):
        embed_together(modules, [torch.tensor([0])])
    first, _ = embed_together(modules, [torch.tensor([1, 2]), torch.tensor([3, 3])])
    with pytest.raises(RuntimeError, match="modified inplace"):
        first.mul_(2.0)
    del owner
