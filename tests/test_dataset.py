"""ClickDataset: batches, splits, validation, against a plain per-row model."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mprec import metrics
from mprec.data import ClickDataset, Column
from mprec.errors import DataError


def make(rows=50, seed=0, dense=2):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, 4, rows)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return ClickDataset(
        "toy",
        columns=[
            Column("a", 10, rng.integers(0, 10, rows)),
            Column("bag", 7, rng.integers(0, 7, offsets[-1]), offsets),
            Column("b", 3, rng.integers(0, 3, rows).astype(np.int32)),
        ],
        labels=rng.integers(0, 2, rows),
        dense=rng.standard_normal((rows, dense)),
        times=rng.integers(0, 20, rows),
        users=rng.integers(0, 6, rows),
    )


def bag_of(column, row):
    if column.offsets is None:
        return [int(column.ids[row])]
    return column.ids[column.offsets[row] : column.offsets[row + 1]].tolist()


def check_batch(dataset, batch, rows):
    assert batch.indices.dtype == batch.offsets.dtype == torch.int64
    assert batch.dense.dtype == batch.labels.dtype == torch.float32
    assert len(batch) == len(rows)
    bags = [bag_of(column, row) for column in dataset.columns for row in rows]
    assert batch.offsets.tolist() == [0, *np.cumsum([len(bag) for bag in bags])]
    assert batch.indices.tolist() == [i for bag in bags for i in bag]
    np.testing.assert_array_equal(batch.labels, dataset.labels[rows])
    np.testing.assert_array_equal(batch.dense, dataset.dense[rows])


@given(st.lists(st.integers(-50, 49), max_size=20), st.integers(0, 3))
def test_batch_is_the_rows_feature_major(rows, seed):
    dataset = make(seed=seed)
    check_batch(dataset, dataset.batch(rows), np.arange(50)[np.array(rows, dtype=int)])


@pytest.mark.parametrize("rows", [slice(0, 8), slice(45, 99), slice(0, 0), slice(None, None, 7)])
def test_batch_of_a_slice(rows):
    dataset = make()
    check_batch(dataset, dataset.batch(rows), np.arange(50)[rows])


def test_batch_without_bags_and_without_dense():
    dataset = ClickDataset("toy", [Column("a", 3, np.array([0, 2, 1]))], labels=[0, 1, 1])
    batch = dataset.batch([2, 0])
    assert batch.dense.shape == (2, 0)
    assert batch.indices.tolist() == [1, 0]
    assert batch.offsets.tolist() == [0, 1, 2]


def test_batches_cover_every_row_once_and_shuffle_by_seed():
    dataset = make()
    values = [torch.cat([b.dense[:, 0] for b in dataset.batches(16, seed=s)]) for s in (None, 1, 1, 2)]
    assert [len(b) for b in dataset.batches(16)] == [16, 16, 16, 2]
    np.testing.assert_array_equal(values[0], dataset.dense[:, 0])
    assert torch.equal(values[1], values[2])
    assert not torch.equal(values[1], values[3])
    for shuffled in values[1:]:
        assert torch.equal(shuffled.sort().values, values[0].sort().values)


def test_bad_rows():
    with pytest.raises(TypeError, match="rows: expected"):
        make().batch(np.array([0.5]))
    with pytest.raises(IndexError):
        make().batch([50])
    with pytest.raises(ValueError, match="batch_size: expected at least 1, got 0"):
        next(make().batches(0))


def test_take_and_counts():
    dataset = make()
    rows = np.array([7, 3, 3, 40])
    taken = dataset.take(rows)
    check_batch(dataset, taken.batch(slice(None)), rows)
    np.testing.assert_array_equal(taken.times, dataset.times[rows])
    counted = np.zeros(7, dtype=int)
    np.add.at(counted, dataset.column("bag").ids, 1)
    np.testing.assert_array_equal(dataset.counts("bag"), counted)
    with pytest.raises(KeyError, match="no feature 'x'"):
        dataset.column("x")


def test_time_split_is_ordered_and_loses_nothing():
    dataset = make()
    parts = dataset.split((0.6, 0.2, 0.2), by="time")
    assert [len(part) for part in parts] == [30, 10, 10]
    assert parts[0].times.max() <= parts[1].times.min() <= parts[1].times.max() <= parts[2].times.min()
    rows = np.concatenate([part.dense[:, 0] for part in parts])
    np.testing.assert_array_equal(np.sort(rows), np.sort(dataset.dense[:, 0]))


def test_time_split_without_times_keeps_row_order():
    dataset = ClickDataset("toy", [Column("a", 9, np.arange(9))], labels=np.ones(9))
    assert [part.columns[0].ids.tolist() for part in dataset.split((1 / 3, 2 / 3))] == [
        [0, 1, 2],
        [3, 4, 5, 6, 7, 8],
    ]


def test_user_time_split_cuts_each_history():
    dataset = make(rows=300)
    train, valid, test = dataset.split(by="user-time")
    assert len(train) + len(valid) + len(test) == 300
    for user in range(6):
        sizes = [int((part.users == user).sum()) for part in (train, valid, test)]
        np.testing.assert_allclose(sizes, np.array([0.8, 0.1, 0.1]) * sum(sizes), atol=1)
        assert train.times[train.users == user].max() <= test.times[test.users == user].min()


def test_split_arguments():
    with pytest.raises(ValueError, match="add up to 1"):
        make().split((0.5, 0.6))
    with pytest.raises(ValueError, match="by: expected one of time, user-time"):
        make().split(by="random")
    with pytest.raises(ValueError, match="names no users"):
        ClickDataset("toy", [], labels=[0, 1]).split(by="user-time")


@pytest.mark.parametrize(
    ("columns", "labels", "message"),
    [
        ([Column("a", 3, np.array([0]))], [0, 1], "feature 'a' has 1 rows, labels have 2"),
        ([Column("a", 3, np.array([0]))] * 2, [0], "expected each once"),
        ([Column("a", 3, np.array([0]))], [0.5], "labels: expected 0 or 1"),
    ],
)
def test_inconsistent_datasets_are_refused(columns, labels, message):
    with pytest.raises(DataError, match=message):
        ClickDataset("toy", columns, labels)


@pytest.mark.parametrize(
    ("ids", "offsets", "message"),
    [
        ([3], None, r"ID 3 is outside \[0, 3\)"),
        ([-1], None, "ID -1 is outside"),
        ([0.5], None, "vector of integers"),
        ([0, 1], [0, 1], "rise from 0"),
        ([0, 1], [0, 2, 1, 2], "rise from 0"),
    ],
)
def test_inconsistent_columns_are_refused(ids, offsets, message):
    with pytest.raises(DataError, match=message):
        Column("a", 3, np.array(ids), None if offsets is None else np.array(offsets))


def test_calibration_and_normalised_entropy():
    labels = np.array([1, 0, 0, 1, 0])
    told = np.array([0.9, 0.2, 0.4, 0.6, 0.4])
    assert metrics.calibration(labels, told) == pytest.approx(2.5 / 2)
    share = np.full(5, 0.4)
    assert metrics.normalised_entropy(labels, share) == pytest.approx(1)
    expected = metrics.log_loss(labels, told) / metrics.log_loss(labels, share)
    assert metrics.normalised_entropy(labels, told) == pytest.approx(expected)
    assert np.isnan(metrics.normalised_entropy(np.zeros(3), np.full(3, 0.1)))
    assert np.isnan(metrics.calibration(np.zeros(3), np.full(3, 0.1)))
