"""Tables in huge pages, and what `import mprec` offers."""

import copy
import pickle

import pytest
import torch
from torch import nn

import mprec
from mprec import huge_pages
from mprec.nn import use_huge_pages


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
    assert mprec.nn.use_huge_pages is use_huge_pages
    assert mprec.hashing.PRIME == 2**31 - 1
    assert {"nn", "ops", "serving", "training"} <= set(dir(mprec))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = mprec.nonsense
