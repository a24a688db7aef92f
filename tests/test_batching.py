import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mprec.data import Batch
from mprec.data.batching import concatenate, num_features, take

bags = st.lists(st.integers(0, 99), max_size=3)


def make(samples):
    """A batch from ``samples[b][t]`` = bag (list of IDs); dense and label number the samples."""
    features = len(samples[0])
    order = [samples[b][t] for t in range(features) for b in range(len(samples))]
    lengths = torch.tensor([0, *(len(bag) for bag in order)])
    numbers = torch.arange(len(samples), dtype=torch.float32)
    return Batch(
        numbers.unsqueeze(1),
        torch.tensor([i for bag in order for i in bag], dtype=torch.int64),
        lengths.cumsum(0),
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
    with pytest.raises(ValueError, match="different numbers of features"):
        concatenate([one, two])
    with pytest.raises(ValueError):
        concatenate([])
    with pytest.raises(ValueError, match="step"):
        take(make([[[1]]] * 4), slice(0, 4, 2))
    with pytest.raises(ValueError, match="offsets"):
        num_features(Batch(torch.zeros(2, 0), torch.zeros(0), torch.zeros(2), torch.zeros(2)))
