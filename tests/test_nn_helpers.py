"""Swapping modules into other people's models, and tables in huge pages."""

import copy
import pickle

import pytest
import torch
from torch import nn

import mprec
from mprec import huge_pages
from mprec.nn import DeepHashEmbeddingBag, DheConfig, EmbeddingBag, swap, use_huge_pages

SMALL = DheConfig(k=16, hidden=(8,))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.user = nn.EmbeddingBag(20, 4, mode="sum", padding_idx=3)
        self.items = nn.ModuleList([nn.EmbeddingBag(50, 4, mode="mean", sparse=True), nn.EmbeddingBag(9, 4)])
        self.again = self.user
        self.words = nn.Embedding(7, 4)
        self.top = nn.Linear(4, 1)

    def forward(self, ids, offsets):
        return self.top(self.user(ids, offsets) + self.items[0](ids, offsets) + self.again(ids, offsets))


def call():
    return torch.tensor([1, 3, 5, 19, 0]), torch.tensor([0, 2, 2])


def test_swapped_tables_change_nothing_but_the_kernels():
    model = Model().eval()
    calls = []
    model.user.register_forward_hook(lambda *_: calls.append(1))
    before, state, parameters = model(*call()), copy.deepcopy(model.state_dict()), list(model.parameters())
    assert swap(model) is model
    assert type(model.user) is EmbeddingBag
    assert [type(m) for m in model.items] == [EmbeddingBag] * 2
    assert type(model.words) is nn.Embedding
    assert model.again is model.user
    assert not model.user.training
    torch.testing.assert_close(model(*call()), before)
    assert len(calls) == 4
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    model.load_state_dict(state)
    model.train()
    model(*call()).sum().backward()
    assert model.items[0].weight.grad.is_sparse
    swap(model)  # a second time changes nothing
    assert type(model.user) is EmbeddingBag


def test_swap_to_deep_hash_embeddings_by_name_and_by_size():
    by_name = swap(Model(), dhe={"items.0": SMALL})
    by_size = swap(Model(), dhe=lambda name, bag: SMALL if bag.num_embeddings == 50 else None)
    for model in (by_name, by_size):
        assert type(model.user) is EmbeddingBag
        bag = model.items[0]
        assert type(bag) is DeepHashEmbeddingBag
        assert (bag.num_embeddings, bag.embedding_dim, bag.mode) == (50, 4, "mean")
        assert model(*call()).shape == (3, 1)


def test_swap_of_a_bag_itself():
    bag = nn.EmbeddingBag(5, 3)
    swapped = swap(bag)
    assert type(swapped) is EmbeddingBag
    assert swapped.weight is bag.weight


def test_swap_refuses_and_leaves_the_model_alone():
    model = Model()
    with pytest.raises(KeyError, match="'words' is no EmbeddingBag"):
        swap(model, dhe={"words": SMALL})
    model.items[1].max_norm = 1.0
    with pytest.raises(ValueError, match=r"items\.1: max_norm=1\.0 has no meaning"):
        swap(model, dhe={"items.1": SMALL})
    assert type(model.user) is nn.EmbeddingBag


def test_huge_pages_keep_values_and_identity():
    module = nn.ModuleList([nn.EmbeddingBag(70_000, 32, mode="sum"), nn.EmbeddingBag(10, 32)])
    tables = [bag.weight for bag in module]
    values = [table.detach().clone() for table in tables]
    small = tables[1].data_ptr()
    assert use_huge_pages(module) == 70_000 * 32 * 4
    assert module[0].weight is tables[0]
    assert tables[0].data_ptr() % (2 << 20) == 0
    assert tables[1].data_ptr() == small
    for table, value in zip(tables, values, strict=True):
        assert torch.equal(table, value)
    ids = torch.tensor([[0, 69_999]])
    assert torch.equal(module[0](ids), values[0][[0, 69_999]].sum(0, keepdim=True))
    torch.optim.SGD(module.parameters(), lr=1.0).zero_grad()
    module[0](ids).sum().backward()
    with torch.no_grad():
        tables[0].sub_(tables[0].grad)
    assert torch.equal(tables[0][0], values[0][0] - 1)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin[0].weight, tables[0])
    if huge_pages.supported():
        assert huge_pages.resident(tables[0].detach()) > 0


def test_top_level_modules_are_imported_on_first_use():
    assert mprec.nn.swap is swap
    assert mprec.hashing.PRIME == 2**31 - 1
    assert {"nn", "ops", "serving", "training"} <= set(dir(mprec))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = mprec.nonsense
