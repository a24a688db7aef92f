import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mprec.bags import Bags
from mprec.data import Batch
from mprec.data.batching import concatenate, num_features, take
from mprec.dispatch import unique_share
from mprec.errors import InvalidOffsetsError

bags = st.lists(st.integers(0, 99), max_size=3)


def make(samples):
    """A batch from ``samples[b][t]`` = bag (list of IDs); dense and label number the samples."""
    features = len(samples[0])
    order = [samples[b][t] for t in range(features) for b in range(len(samples))]
    lengths = torch.tensor([0, *(len(bag) for bag in order)])
    numbers = torch.arange(len(samples), dtype=torch.float32)
    return Batch(
        numbers.unsqueeze(1),
        Bags(
            torch.tensor([i for bag in order for i in bag], dtype=torch.int64),
            lengths.cumsum(0),
            num_features=features,
        ),
        numbers,
    )


def samples_of(batch):
    features, size = num_features(batch), len(batch)
    o = batch.offsets.tolist()
    return [
        [batch.indices[o[t * size + b] : o[t * size + b + 1]].tolist() for t in range(features)]
        for b in range(size)
    ]


@st.composite
def logs(draw):
    features = draw(st.integers(1, 4))
    bag = draw(st.sampled_from([bags, st.lists(st.integers(0, 99), min_size=1, max_size=1)]))
    sample = st.lists(bag, min_size=features, max_size=features)
    return draw(st.lists(st.lists(sample, min_size=1, max_size=5), min_size=1, max_size=4))


@given(logs())
def test_concatenate_keeps_every_bag(parts):
    whole = concatenate([make(part) for part in parts])
    assert samples_of(whole) == [sample for part in parts for sample in part]
    assert len(whole.dense) == len(whole)


@given(logs(), st.integers(0, 6), st.integers(0, 6))
def test_take_is_a_slice(parts, start, stop):
    samples = [sample for part in parts for sample in part]
    batch = make(samples)
    cut = take(batch, slice(start, stop))
    expected = samples[start:stop]
    assert cut.labels.tolist() == batch.labels[start:stop].tolist()
    assert len(cut.dense) == len(cut.labels)
    if expected:
        assert samples_of(cut) == expected
    else:
        assert len(cut.indices) == 0


def test_refusals():
    one, two = make([[[1]]]), make([[[1], [2]]])
    with pytest.raises(ValueError, match="expected 1 features of 1 samples each"):
        concatenate([one, two])
    with pytest.raises(ValueError):
        concatenate([])
    weighted = Batch(one.dense, one.bags._replace(per_sample_weights=torch.ones(1)), one.labels)
    for batches in ([one, weighted], [weighted, one]):
        with pytest.raises(ValueError, match="without per_sample_weights"):
            concatenate(batches)
    with pytest.raises(ValueError, match="step"):
        take(make([[[1]]] * 4), slice(0, 4, 2))
    with pytest.raises(ValueError, match="offsets"):
        num_features(Batch(torch.zeros(2, 0), Bags(torch.zeros(0), torch.zeros(2)), torch.zeros(2)))


@given(
    st.integers(1, 3), st.integers(0, 2000), st.integers(1, 3000), st.sampled_from([torch.int32, torch.int64])
)
def test_unique_share(features, batch, vocabulary, dtype):
    indices = torch.randint(0, vocabulary, (features * batch,), dtype=dtype) - 7
    offsets = torch.arange(features * batch + 1, dtype=dtype)
    found = unique_share(
        Batch(torch.zeros(batch, 0), Bags(indices, offsets, num_features=features), torch.zeros(batch))
    )
    distinct = sum(len(part.unique()) for part in indices.view(features, batch))
    expected = distinct / len(indices) if batch else 1.0
    assert found == pytest.approx(expected, rel=1e-12 if batch <= 256 else 0.04)


def test_unique_share_of_bags_counts_each_feature_for_itself():
    batch = Batch(
        torch.zeros(2, 0),
        Bags(torch.tensor([5, 5, 5, 9]), torch.tensor([0, 2, 3, 3, 4]), num_features=2),
        torch.zeros(2),
    )
    assert unique_share(batch) == 2 / 4
    with pytest.raises(InvalidOffsetsError, match=r"offsets\[2\] .* is 5, expected at most .* 4"):
        unique_share(
            dataclasses.replace(batch, bags=batch.bags._replace(offsets=torch.tensor([0, 2, 5, 3, 4])))
        )
