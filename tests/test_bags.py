"""Bags against the definition of their layout: what they check, select and take apart."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mprec.bags import Bags
from mprec.errors import DtypeError, IdOutOfRangeError, InvalidOffsetsError
from mprec.models import DLRM, compile_path
from mprec.nn import EmbeddingBagCollection, FeatureConfig, QuantizedEmbeddingBagCollection

WHOLE = Bags(torch.tensor([7, 3, 5, 0, 9, 9, 2]), torch.tensor([0, 2, 3, 4, 7]), num_features=2)


def lists(bags: Bags, feature: int) -> list[list[int]]:
    """The feature's bags as the layout defines them."""
    starts = bags.offsets.tolist()
    count = (len(starts) - 1) // bags.num_features
    return [
        bags.indices[starts[b] : starts[b + 1]].tolist()
        for b in range(feature * count, (feature + 1) * count)
    ]


@st.composite
def batches(draw):
    features, samples = draw(st.integers(1, 4)), draw(st.integers(0, 4))
    lengths = draw(st.lists(st.integers(0, 3), min_size=features * samples, max_size=features * samples))
    indices = torch.randint(0, 50, (sum(lengths),))
    weights = torch.rand(len(indices)) if draw(st.booleans()) else None
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    wide = draw(st.booleans())
    batch = Bags(indices if wide else indices.int(), offsets, 0, weights, None, features)
    served = draw(st.lists(st.integers(0, features - 1), min_size=1, max_size=5))
    return batch, served


@given(batches())
def test_features_alone_are_those_of_the_batch(drawn):
    batch, served = drawn
    only = batch.only(served)
    assert (only.num_features, only.batch) == (len(served), batch.batch)
    assert [lists(only, i) for i in range(len(served))] == [lists(batch, f) for f in served]
    taken = []
    for f, (begin, end, part) in zip(served, batch._replace(features=served).parts(len(served)), strict=True):
        assert lists(part, 0) == lists(batch, f)
        assert torch.equal(part.indices, batch.indices[begin:end])
        if batch.per_sample_weights is not None:
            assert torch.equal(part.per_sample_weights, batch.per_sample_weights[begin:end])
            taken.append(part.per_sample_weights)
    if taken:
        assert torch.equal(only.per_sample_weights, torch.cat(taken))


def test_the_last_offset():
    short = Bags(torch.arange(5), torch.tensor([0, 2]), include_last_offset=False)
    assert short.batch == short.with_last_offset().batch == 2
    assert short.with_last_offset().offsets.tolist() == [0, 2, 5]
    assert WHOLE.with_last_offset() is WHOLE


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"mode": 3}, ValueError, "mode: expected 0"),
        ({"mode": 2, "per_sample_weights": torch.ones(7)}, NotImplementedError, "per_sample_weights"),
        ({"per_sample_weights": torch.ones(6)}, ValueError, "expected the shape of indices"),
        ({"per_sample_weights": torch.ones(7).double()}, DtypeError, "same type as weight"),
        ({"indices": torch.ones(7)}, DtypeError, "indices: expected integers"),
        ({"offsets": WHOLE.offsets[None]}, ValueError, "offsets has to be a 1D"),
        ({"offsets": WHOLE.offsets[:4]}, InvalidOffsetsError, "multiple of the number of features, 2"),
        ({"features": [0, 2]}, ValueError, r"features\[1\]: expected in \[0, 2\), got 2"),
        ({"features": [0]}, ValueError, "features: expected one for each of 2 parts"),
        ({"num_features": 0}, ValueError, "num_features: expected at least 1, got 0"),
    ],
)
def test_what_needs_no_values_is_checked(change, error, message):
    WHOLE.checked(2, torch.float32)
    with pytest.raises(error, match=message):
        WHOLE._replace(**change).checked(2, torch.float32)


def test_values_are_checked_by_feature():
    WHOLE.check_offsets()
    WHOLE.check_ids([8, 10])
    WHOLE._replace(features=[1, 0]).check_ids([10, None])
    with pytest.raises(IdOutOfRangeError, match=r"feature 1, bag 1.*9, not in the valid range \[0, 9\)"):
        WHOLE.check_ids([8, 9])
    with pytest.raises(IdOutOfRangeError, match="feature 0, bag 0"):
        WHOLE._replace(features=[1, 0]).check_ids([10, 7])
    with pytest.raises(InvalidOffsetsError):
        WHOLE._replace(offsets=torch.tensor([0, 2, 1, 4, 7])).check_offsets()


def test_integers_of_any_type_and_weights_of_16_bits():
    weights = torch.ones(7)
    bags = WHOLE._replace(indices=WHOLE.indices.to(torch.uint8), per_sample_weights=weights)
    assert bags.checked(2, torch.float32).indices.dtype == torch.int64
    assert bags.checked(2, torch.bfloat16, or_float32=True).per_sample_weights is weights
    with pytest.raises(DtypeError):
        bags.checked(2, torch.bfloat16)
    narrow = bags._replace(per_sample_weights=weights.bfloat16()).checked(2, torch.bfloat16)
    assert narrow.with_float_weights().per_sample_weights.dtype == torch.float32


@pytest.mark.parametrize("weighted", [False, True])
def test_a_collection_and_a_model_take_bags_whole(weighted):
    torch.manual_seed(0)
    features = [FeatureConfig("a", 20, 4, mode="mean"), FeatureConfig("b", 20, 4, "hybrid")]
    bags = WHOLE._replace(per_sample_weights=torch.rand(7)) if weighted else WHOLE
    collection = EmbeddingBagCollection(features)
    given = bags.indices, bags.offsets, bags.per_sample_weights
    for each in (collection, QuantizedEmbeddingBagCollection(collection, tables="float32")):
        assert torch.equal(each(bags), each(*given))
        buffer = torch.empty(2, 12)
        with torch.no_grad():
            assert each(bags, out=buffer) is buffer
        assert torch.equal(buffer, each(*given))
    model = DLRM(features, 3, 4, (8,), (8,)).eval()
    dense = torch.randn(2, 3)
    want = model.score(dense, model.embeddings(*given))
    assert torch.equal(model(dense, bags), want)
    torch.testing.assert_close(compile_path(model)(dense, bags), want.sigmoid(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_features": 1}, "num_features: expected 2, got 1"),
        ({"features": [1, 0]}, "expected those of all features"),
        ({"padding_idx": 3}, "got features None, include_last_offset True, padding_idx 3"),
        ({"offsets": WHOLE.offsets[:-1], "include_last_offset": False}, "include_last_offset False"),
    ],
)
def test_bags_of_other_features_are_refused(change, message):
    model = DLRM([FeatureConfig(name, 20, 4) for name in "ab"], 0, 4, (8,), (8,)).eval()
    bags, dense = WHOLE._replace(**change), torch.zeros(2, 0)
    for call in (lambda: model.embeddings(bags), lambda: model(dense, bags)):
        with pytest.raises(ValueError, match=message):
            call()
    if "num_features" not in change:  # the native call looks at offsets alone
        with pytest.raises(ValueError, match=message):
            compile_path(model)(dense, bags)


def test_weights_beside_a_batch_and_ids_alone_are_refused():
    model = DLRM([FeatureConfig(name, 20, 4) for name in "ab"], 0, 4, (8,), (8,))
    with pytest.raises(ValueError, match="per_sample_weights: expected None beside a batch"):
        model.embeddings(WHOLE, None, torch.ones(7))
    for call in (model, compile_path(model)):
        with pytest.raises(TypeError, match="indices: expected Bags, or a tensor with offsets, got Tensor"):
            call(torch.zeros(2, 0), WHOLE.indices)
