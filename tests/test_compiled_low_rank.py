"""Whole paths as one native call, of tables of low rank: codes and projections."""

import pytest
import torch
from float64_dlrm import check
from hypothesis import given, settings
from hypothesis import strategies as st

import mprec
from mprec.errors import IdOutOfRangeError
from mprec.models import DLRM
from mprec.nn import (
    DheConfig,
    FeatureConfig,
    LowRankEmbeddingBagCollection,
    LowRankTable,
    QuantizedEmbeddingBagCollection,
)
from mprec.testing import isa, runnable_isas

VOCABULARIES = (50, 7, 300, 1000)


def low_rank(features, rank, precision="float32"):
    """A collection for serving."""
    dim = features[0].embedding_dim
    tables = {
        f.name: LowRankTable(
            torch.randn(f.num_embeddings, rank), torch.randn(rank, dim) / rank**0.5, torch.randn(dim)
        )
        for f in features
    }
    return LowRankEmbeddingBagCollection(features, tables, precision=precision)


def make(representations, dim=16, modes=("sum", "mean"), rank=None):
    torch.manual_seed(0)
    features = [
        FeatureConfig(
            f"f{i}",
            size,
            dim,
            mode=modes[i % len(modes)],
            representation=representations[i % len(representations)],
            dhe=DheConfig(k=24, hidden=(16,)) if representations[i % len(representations)] == "dhe" else None,
        )
        for i, size in enumerate(VOCABULARIES)
    ]
    return DLRM(features, 5, dim, (24,), (32,)).eval()


def served(rank, precision, dim=16, modes=("sum", "mean")):
    model = make(["table"], dim, modes)
    model.embeddings = low_rank(model.embeddings.features, rank, precision)
    return model


def batch(samples, longest=3, seed=0, dtype=torch.int64):
    g = torch.Generator().manual_seed(seed + samples)
    lengths = torch.randint(0, longest + 1, (len(VOCABULARIES), samples), generator=g)
    if longest == 1:
        lengths.fill_(1)
    ids = [
        torch.randint(0, size, (int(n),), generator=g)
        for size, n in zip(VOCABULARIES, lengths.sum(1), strict=True)
    ]
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.flatten().cumsum(0)])
    return torch.randn(samples, 5, generator=g), torch.cat(ids).to(dtype), offsets.to(dtype)


@pytest.mark.parametrize("name", runnable_isas())
@pytest.mark.parametrize("precision", ["float32", "float16", "int8"])
@pytest.mark.parametrize(("rank", "dim"), [(1, 16), (4, 16), (3, 8), (16, 16), (17, 33), (40, 64)])
def test_codes_of_every_precision(name, precision, rank, dim):
    model = served(rank, precision, dim)
    path = mprec.compile_path(model)
    with isa(name):
        for samples in (1, 5, 132, 300):
            for longest in (1, 4):
                inputs = batch(samples, longest)
                check(model, path(*inputs), *inputs)


@pytest.mark.parametrize("name", runnable_isas())
def test_every_int8_code(name):
    """-128 too, which an own quantiser need not give; each against float64."""
    model = served(2, "int8", modes=("sum",))
    codes = model.embeddings.codes
    codes[:256, 0] = torch.arange(-128, 128)
    codes[:256, 1] = torch.arange(-128, 128).flip(0)
    model.embeddings.projections.mul_(1e-2)
    path = mprec.compile_path(model)
    ids = torch.arange(256)
    indices = torch.cat([ids % size for size in VOCABULARIES])
    offsets = torch.arange(4 * 256 + 1)
    with isa(name):
        check(model, path(torch.zeros(256, 5), indices, offsets), torch.zeros(256, 5), indices, offsets)


@pytest.mark.parametrize("name", runnable_isas())
@pytest.mark.parametrize("precision", [None, "float16", "int8", "int4"])
@pytest.mark.parametrize("others", [["low_rank"], ["low_rank", "table"], ["dhe", "low_rank", "table"]])
def test_features_of_low_rank_beside_others(name, precision, others):
    model = make(others)
    if precision is not None:
        model.embeddings = QuantizedEmbeddingBagCollection(model.embeddings, tables=precision)
    path = mprec.compile_path(model)
    with isa(name):
        for samples in (1, 70):
            inputs = batch(samples)
            check(model, path(*inputs), *inputs)


@settings(max_examples=40, deadline=None)
@given(
    samples=st.integers(1, 400),
    longest=st.integers(0, 5),
    rank=st.integers(1, 16),
    precision=st.sampled_from(["float32", "float16", "int8"]),
    threads=st.sampled_from([1, 2, 3]),
    name=st.sampled_from(runnable_isas()),
    dtype=st.sampled_from([torch.int32, torch.int64]),
)
def test_any_batch(samples, longest, rank, precision, threads, name, dtype):
    model = served(rank, precision)
    path = mprec.compile_path(model)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        with isa(name):
            inputs = batch(samples, longest, dtype=dtype)
            check(model, path(*inputs), *inputs)
    finally:
        torch.set_num_threads(before)


def test_an_id_of_the_next_features_codes_is_refused():
    """All codes are one tensor: an ID past its own feature's would read another's."""
    model = served(4, "int8")
    dense, indices, offsets = batch(3, 1)
    indices[0] = VOCABULARIES[0]
    with pytest.raises(IdOutOfRangeError, match=r"f0.* is 50"):
        mprec.compile_path(model)(dense, indices, offsets)


def test_changed_weights_are_noticed():
    model, other = served(4, "float32"), make(["low_rank"])
    inputs = batch(9)
    for changing, tensors in (
        (model, [model.embeddings.codes, model.embeddings.projections, model.embeddings.biases]),
        (other, [p.detach() for p in other.embeddings.parameters()]),
    ):
        path = mprec.compile_path(changing)
        before = path(*inputs)
        for tensor in tensors:
            tensor.mul_(-0.5)
            after = path(*inputs)
            assert not torch.allclose(after, before, atol=1e-6)
            check(changing, after, *inputs)
            before = after


def test_maxima_of_low_rank_are_not_offered_to_native_code():
    tensors, codes = {"weight": torch.randn(7, 8)}, {"codes": torch.zeros(9, 2, dtype=torch.int8)}
    projection = (torch.randn(2, 8), None)

    def program(mode=0, window=(2, 9), projection=projection):
        return mprec._C.PathProgram(
            num_features=2,
            num_dense=0,
            dim=8,
            tables=[
                (tensors, "weight", 0, 0, 0, 8, None, None),
                (codes, "codes", 1, 1, mode, 8, window, projection),
            ],
            decoders=[],
            bottom=None,
            constant=torch.zeros(8),
            top=([torch.randn(1, 8 + 3)], [torch.zeros(1)], [0]),
            mixing=[],
            interaction="dot",
            watch=mprec._C.WeightWatch.of([(tensors, "weight")]),
            precision="float32",
        )

    program()
    for message, arguments in (
        ("pooled by sum or mean", {"mode": 2}),
        ("rows 2 to 10 are none of 9", {"window": (2, 10)}),
        ("rows -1 to 4", {"window": (-1, 4)}),
        ("rows 5 to 4", {"window": (5, 4)}),
        (r"expected a matrix \[2, 8\]", {"projection": (torch.randn(3, 8), None)}),
        (r"a bias \[8\]", {"projection": (torch.randn(2, 8), torch.randn(7))}),
    ):
        with pytest.raises(ValueError, match=message):
            program(**arguments)
