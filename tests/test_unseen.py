"""Unseen IDs have the mean of the seen ones: against the definition, ID by ID."""

import copy

import pytest
import torch

from mprec.errors import IdOutOfRangeError, InvalidOffsetsError
from mprec.nn import (
    DheConfig,
    EmbeddingBagCollection,
    FeatureConfig,
    MeanForUnseen,
    QuantizedEmbeddingBagCollection,
    with_representation,
)

torch.set_num_threads(1)
FEATURES = [
    FeatureConfig("user", 40, 4),
    FeatureConfig("day", 7, 3, mode="mean"),
    FeatureConfig("item", 30, 5),
]
SEEN = {"user": torch.tensor([3, 5, 5, 8, 39]), "day": torch.tensor([0, 6], dtype=torch.int32)}


def vectors(collection, f):
    """What each ID of feature f gives: [num_embeddings, output_dim]."""
    n, count = collection.features[f].num_embeddings, len(collection.features)
    offsets = torch.zeros(count * n + 1, dtype=torch.int64)
    offsets[f * n : (f + 1) * n] = torch.arange(n)
    offsets[(f + 1) * n :] = n
    out = collection(torch.arange(n), offsets).double()
    return out.split(list(collection.output_dims), dim=1)[f]


def expected_output(collection, indices, offsets, psw):
    count = len(collection.features)
    batch = (len(offsets) - 1) // count
    blocks = []
    for f, feature in enumerate(collection.features):
        table = vectors(collection, f)
        if feature.name in SEEN:
            seen = SEEN[feature.name].long().unique()
            mean = table[seen].mean(0)
            known = torch.zeros(len(table), dtype=torch.bool).index_fill(0, seen, True)
            table = torch.where(known[:, None], table, mean)
            table = torch.cat([table, mean.expand(1000, -1)])  # IDs beyond the vocabulary
        block = torch.zeros(batch, table.shape[1], dtype=torch.float64)
        for b in range(batch):
            begin, end = offsets[f * batch + b], offsets[f * batch + b + 1]
            if end > begin:
                rows = table[indices[begin:end].long()]
                if psw is not None:
                    rows = rows * psw[begin:end, None].double()
                block[b] = rows.sum(0) if feature.mode == "sum" else rows.sum(0) / (end - begin)
        blocks.append(block)
    return torch.cat(blocks, 1)


def make_batch(size, seed, beyond=0, dtype=torch.int64):
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 4, (len(FEATURES), size), generator=g)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.flatten().cumsum(0)])
    ids = []
    for f, n in zip(FEATURES, lengths.sum(1), strict=True):
        top = f.num_embeddings + (beyond if f.name in SEEN else 0)
        ids.append(torch.randint(0, top, (int(n),), generator=g))
    return torch.cat(ids).to(dtype), offsets.to(dtype)


@pytest.mark.parametrize("kind", ["table", "dhe", "hybrid", "select"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_against_the_definition(kind, weighted, dtype):
    config = DheConfig(k=32, hidden=(8,))
    collection = EmbeddingBagCollection(with_representation(FEATURES, kind, config, select_largest=1))
    wrapped = MeanForUnseen(collection, SEEN)
    for seed in range(4):
        indices, offsets = make_batch(5, seed, beyond=10, dtype=dtype)
        psw = torch.rand(len(indices)) if weighted else None
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                out = wrapped(indices, offsets, psw)
            expected = expected_output(collection, indices, offsets, psw)
            torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)
    assert wrapped.output_dims == collection.output_dims
    assert "user: 4 of 40 IDs seen; day: 2 of 7" in repr(wrapped)


def test_batches_of_seen_ids_are_the_collections():
    collection = EmbeddingBagCollection(FEATURES)
    wrapped = MeanForUnseen(collection, SEEN)
    call = torch.tensor([3, 39, 0, 6, 17, 2]), torch.tensor([0, 1, 2, 3, 4, 5, 6])
    assert torch.equal(wrapped(*call), collection(*call))


def test_means_follow_the_weights_on_refresh_and_travel_in_the_state_dict():
    collection = EmbeddingBagCollection(FEATURES)
    wrapped = MeanForUnseen(collection, SEEN)
    with torch.no_grad():
        collection.tables["user"].weight.add_(1)
    wrapped.refresh()
    indices, offsets = make_batch(5, 1)
    expected = expected_output(collection, indices, offsets, None)
    torch.testing.assert_close(wrapped(indices, offsets).double(), expected, rtol=1e-4, atol=1e-5)
    other = MeanForUnseen(EmbeddingBagCollection(FEATURES), {"user": [0], "day": [0]})
    other.load_state_dict(wrapped.state_dict())
    assert torch.equal(other(indices, offsets), wrapped(indices, offsets))
    assert torch.equal(copy.deepcopy(wrapped)(indices, offsets), wrapped(indices, offsets))


def test_over_a_quantised_collection():
    quantized = QuantizedEmbeddingBagCollection(EmbeddingBagCollection(FEATURES), "int8")
    wrapped = MeanForUnseen(quantized, SEEN)
    indices, offsets = make_batch(5, 2, beyond=3)
    expected = expected_output(quantized, indices, offsets, None)
    torch.testing.assert_close(wrapped(indices, offsets).double(), expected, rtol=1e-4, atol=1e-5)


def test_bad_input():
    collection = EmbeddingBagCollection(FEATURES)
    with pytest.raises(ValueError, match="no feature 'users'"):
        MeanForUnseen(collection, {"users": torch.tensor([1])})
    with pytest.raises(ValueError, match="'user' has no seen ID"):
        MeanForUnseen(collection, {"user": torch.tensor([], dtype=torch.int64)})
    with pytest.raises(IdOutOfRangeError, match=r"seen\['user'\]\[0\] is 40"):
        MeanForUnseen(collection, {"user": torch.tensor([40])})
    with pytest.raises(ValueError, match="pooled by maximum"):
        MeanForUnseen(
            EmbeddingBagCollection([FeatureConfig("a", 4, 2, mode="max")]), {"a": torch.tensor([1])}
        )
    wrapped = MeanForUnseen(collection, SEEN)
    good = torch.tensor([0, 1, 2, 3])
    with pytest.raises(IdOutOfRangeError, match="feature 'user'"):
        wrapped(torch.tensor([-1, 0, 0]), good)
    with pytest.raises(IdOutOfRangeError, match="feature 'item'"):  # not in seen: as in the collection
        wrapped(torch.tensor([1, 0, 30]), good)
    for offsets in ([0, 2, 1, 3], [0, 1, 2, 4], [1, 1, 2, 3], [0, 1, 2], []):
        with pytest.raises(InvalidOffsetsError):
            wrapped(torch.tensor([1, 0, 2]), torch.tensor(offsets, dtype=torch.int64))
    with pytest.raises(TypeError, match="expected int64 or int32"):
        wrapped(torch.tensor([1.0, 0, 2]), good)
    none = torch.empty(0, dtype=torch.int64)
    assert wrapped(none, torch.tensor([0])).shape == (0, 12)
    assert torch.equal(wrapped(none, torch.tensor([0] * 4)), torch.zeros(1, 12))
