"""Low-rank tables: pooled codes and one projection, against their rows in full, pooled in float64."""

import pytest
import torch

from mprec import reference
from mprec.errors import IdOutOfRangeError, InvalidOffsetsError
from mprec.names import MODES
from mprec.nn import FeatureConfig, LowRankEmbeddingBagCollection, LowRankTable

FEATURES = [
    FeatureConfig("user", 30, 6),
    FeatureConfig("genres", 7, 6, mode="mean"),
    FeatureConfig("item", 20, 6),
]


def tables(rank=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    return {
        f.name: LowRankTable(
            torch.randn(f.num_embeddings, rank, generator=g),
            torch.randn(rank, 6, generator=g),
            torch.randn(6, generator=g),
        )
        for f in FEATURES
    }


def batch(longest, size=5, seed=0, shortest=0):
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(shortest, longest + 1, (len(FEATURES), size), generator=g)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.flatten().cumsum(0)])
    ids = [
        torch.randint(0, f.num_embeddings, (int(n),), generator=g)
        for f, n in zip(FEATURES, lengths.sum(1), strict=True)
    ]
    indices = torch.cat(ids)
    return indices, offsets, torch.rand(len(indices), generator=g) * 4 - 2


def expected(rows, indices, offsets, psw, size=5):
    parts = []
    for t, f in enumerate(FEATURES):
        starts = offsets[t * size : (t + 1) * size + 1].long()
        ids = indices[starts[0] : starts[-1]].long()
        weights = None if psw is None else psw[starts[0] : starts[-1]]
        parts.append(
            reference.embedding_bag(rows[f.name], ids, starts - starts[0], MODES[f.mode], weights, True)
        )
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("precision", ["float32", "float16", "int8"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize(("shortest", "longest"), [(1, 1), (0, 3)])
def test_a_batch_is_its_rows_pooled(precision, weighted, dtype, shortest, longest):
    made = tables()
    collection = LowRankEmbeddingBagCollection(FEATURES, made, precision=precision)
    indices, offsets, psw = batch(longest, shortest=shortest)
    indices, offsets, psw = indices.to(dtype), offsets.to(dtype), psw if weighted else None
    rows = {f.name: collection.rows(f.name) for f in FEATURES}
    got = collection(indices, offsets, psw)
    assert not got.requires_grad
    torch.testing.assert_close(got.double(), expected(rows, indices, offsets, psw), rtol=1e-5, atol=1e-5)
    # Every row is its definition, to the rounding of its codes.
    for f in FEATURES:
        exact = made[f.name].codes @ made[f.name].projection + made[f.name].bias
        largest = made[f.name].codes.abs().amax(0)
        step = {"float32": 1e-6, "float16": 2**-11, "int8": 0.5 / 127}[precision] * largest
        bound = step @ made[f.name].projection.abs() + 1e-5
        assert ((rows[f.name] - exact).abs() <= bound).all()


def test_bytes_are_a_byte_a_code_and_the_projections():
    collection = LowRankEmbeddingBagCollection(FEATURES, tables(rank=3), precision="int8")
    assert collection.nbytes == (30 + 7 + 20) * 3 + 3 * (3 * 6 + 6) * 4


def test_limits_clip_codes_and_make_the_others_finer():
    one = tables(rank=1)
    one["user"].codes[0] = 100.0
    limits = {f.name: torch.tensor([4.0]) for f in FEATURES}
    wide, clipped = (
        LowRankEmbeddingBagCollection(FEATURES, one, precision="int8", limits=each) for each in (None, limits)
    )
    exact = one["user"].codes @ one["user"].projection + one["user"].bias
    errors = [(c.rows("user") - exact)[1:].abs().mean() for c in (wide, clipped)]
    assert errors[1] < errors[0] / 5
    assert clipped.codes[0, 0] == 127


def test_state_goes_into_an_empty_one():
    made = LowRankEmbeddingBagCollection(FEATURES, tables(), precision="int8")
    empty = LowRankEmbeddingBagCollection(FEATURES, rank=3, precision="int8")
    assert set(empty.state_dict()) == {"codes", "projections", "biases"}
    empty.load_state_dict(made.state_dict())
    indices, offsets, _ = batch(2)
    assert torch.equal(empty(indices, offsets), made(indices, offsets))


@pytest.mark.parametrize("longest", [1, 2])
@pytest.mark.parametrize("bad", [-1, 7])
def test_ids_out_of_range_are_named(longest, bad):
    collection = LowRankEmbeddingBagCollection(FEATURES, tables())
    indices, offsets, _ = batch(longest, shortest=longest)
    indices[longest * 5 + 1] = bad
    with pytest.raises(IdOutOfRangeError, match=rf"feature 'genres', bag [01]\) is {bad}, not in .*\[0, 7\)"):
        collection(indices, offsets)


def test_bad_offsets_are_refused():
    collection = LowRankEmbeddingBagCollection(FEATURES, tables())
    indices, offsets, _ = batch(1, shortest=1)
    for wrong in (offsets[:-1], offsets + 1, offsets.flip(0)):
        with pytest.raises(InvalidOffsetsError):
            collection(indices, wrong)


def test_what_does_not_fit_is_refused():
    def collection(features=FEATURES, **options):
        return LowRankEmbeddingBagCollection(features, **options)

    with pytest.raises(ValueError, match="rank: expected 1 to embedding_dim, 6, got 7"):
        collection(rank=7)
    with pytest.raises(ValueError, match="precision: expected one of float32, float16, int8, got 'int4'"):
        collection(rank=2, precision="int4")
    with pytest.raises(ValueError, match="feature 'a': a projection does not commute with mode 'max'"):
        collection([FeatureConfig("a", 3, 6, mode="max")], rank=2)
    with pytest.raises(ValueError, match="feature 'a': expected a table, got 'dhe'"):
        collection([FeatureConfig("a", 3, 6, "dhe")], rank=2)
    with pytest.raises(ValueError, match="feature 'b': expected embedding_dim 6 as of 'user', got 4"):
        collection([*FEATURES, FeatureConfig("b", 3, 4)], rank=2)
    wrong = tables()
    wrong["item"] = wrong["user"]
    with pytest.raises(ValueError, match=r"tables: feature 'item': expected shapes \[\(20, 3\)"):
        collection(tables=wrong)
    del wrong["item"]
    with pytest.raises(ValueError, match="tables: none for feature 'item'"):
        collection(tables=wrong)
    with pytest.raises(TypeError, match="low-rank tables keep their precision"):
        collection(rank=2).half()


@pytest.mark.parametrize(
    ("precision", "number", "message"),
    [
        ("float16", 7e4, "'item': float16 holds numbers up to 65504"),
        ("int8", float("inf"), "'item': precision: int8 is for finite codes"),
        ("int8", float("nan"), "'item': precision: int8 is for finite codes"),
    ],
)
def test_codes_that_a_precision_cannot_hold_are_refused(precision, number, message):
    made = tables()
    made["item"].codes[3, 1] = number
    with pytest.raises(ValueError, match=message):
        LowRankEmbeddingBagCollection(FEATURES, made, precision=precision)
    assert LowRankEmbeddingBagCollection(FEATURES, made).codes.dtype == torch.float32
