"""Batches and datasets in torch's own tools: pytrees, export, DataLoader with samplers and workers."""

import numpy as np
import pytest
import torch
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, Dataset, RandomSampler, Subset

from mprec.bags import Bags
from mprec.data import Batch, ClickDataset, Column, collate


def dataset(rows=7):
    r = np.random.default_rng(0)
    lengths = r.integers(0, 3, rows)
    columns = [
        Column("a", 9, r.integers(0, 9, rows)),
        Column("b", 5, r.integers(0, 5, lengths.sum()), np.concatenate([[0], np.cumsum(lengths)])),
    ]
    return ClickDataset("log", columns, r.integers(0, 2, rows), r.normal(size=(rows, 2)))


def same(a: Batch, b: Batch) -> bool:
    return all(torch.equal(x, y) for x, y in zip(pytree.tree_leaves(a), pytree.tree_leaves(b), strict=True))


def test_a_batch_is_a_pytree(tmp_path):
    batch = dataset().batch(slice(0, 4))
    leaves, spec = pytree.tree_flatten(batch)
    assert [leaf.data_ptr() for leaf in leaves] == [
        t.data_ptr() for t in (batch.dense, batch.indices, batch.offsets, batch.labels)
    ]
    assert same(pytree.tree_unflatten(leaves, spec), batch)

    class Lengths(torch.nn.Module):
        def forward(self, batch):
            return batch.dense.sum(1) + batch.labels

    program = torch.export.export(Lengths(), (batch,))
    assert torch.equal(program.module()(batch), Lengths()(batch))
    file = tmp_path / "lengths.pt2"
    torch.export.save(program, file)
    with torch.serialization.safe_globals([Batch, Bags]):  # the example in the file
        loaded = torch.export.load(file)
    assert torch.equal(loaded.module()(batch), Lengths()(batch))


def test_what_moves_a_batch_moves_all_its_tensors():
    batch = dataset().batch(slice(0, 4))
    weighted = Batch(batch.dense, batch.bags._replace(per_sample_weights=torch.rand(6)), batch.labels)
    for each in (batch, weighted):
        leaves, spec = pytree.tree_flatten(each)
        assert len(leaves) == 4 + (each is weighted)
        assert same(pytree.tree_unflatten(leaves, spec), each)
        moved = each.to("meta")
        assert all(tensor.is_meta for tensor in moved.tensors().values())
        assert moved.tensors().keys() == each.tensors().keys()
        assert moved.bags.num_features == each.bags.num_features == 2
        assert pytree.tree_map(lambda t: t.to("meta"), each).bags.indices.is_meta


@pytest.mark.parametrize("workers", [0, 2])
def test_a_data_loader_takes_rows_in_a_samplers_order(workers):
    log = dataset()
    assert isinstance(log, Dataset)
    order = list(RandomSampler(log, generator=torch.Generator().manual_seed(3)))
    sampler = RandomSampler(log, generator=torch.Generator().manual_seed(3))
    loader = DataLoader(log, 3, sampler=sampler, collate_fn=collate, num_workers=workers)
    batches = list(loader)
    assert [len(batch) for batch in batches] == [3, 3, 1]
    for i, batch in enumerate(batches):
        assert same(batch, log.batch(order[3 * i : 3 * i + 3]))


def test_rows_one_at_a_time():
    log = dataset()
    assert same(log[-1], log.batch([6]))
    assert same(collate([log[2], log[0]]), log.batch([2, 0]))
    assert same(next(iter(DataLoader(Subset(log, [5, 1]), 2, collate_fn=collate))), log.batch([5, 1]))
    for row in (7, -8):
        with pytest.raises(IndexError, match="of 7"):
            log[row]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="pinned memory needs CUDA")
def test_batches_are_pinned():
    loader = DataLoader(dataset(), 3, collate_fn=collate, pin_memory=True)
    assert all(leaf.is_pinned() for batch in loader for leaf in pytree.tree_leaves(batch))
