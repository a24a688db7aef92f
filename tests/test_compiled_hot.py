"""Whole paths as one native call, of hot rows over a rest: against the model and against float64."""

import copy
import pickle

import pytest
import torch
from concurrent_calls import assert_same_concurrently
from float64_dlrm import check, check_weights
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import mprec
from mprec.cache import CachedEmbeddingBagCollection
from mprec.errors import IdOutOfRangeError, PathCompileError
from mprec.models import DLRM
from mprec.nn import DheConfig, FeatureConfig, QuantizedEmbeddingBagCollection
from mprec.testing import isa, runnable_isas

DHE = DheConfig(k=24, hidden=(16,))
HOT = {"a": [3, 7, 20, 33, 49], "c": [0, 1, 11, 29], "d": list(range(60)), "e": [399]}


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def features(dim=16):
    return [
        FeatureConfig("a", 50, dim, "hot_dhe", DHE, mode="mean", parameters={"hot": 5}),
        FeatureConfig("b", 40, dim, mode="max"),
        FeatureConfig("c", 30, dim, "hot_low_rank", parameters={"hot": 4, "rank": 2}),
        FeatureConfig("d", 60, dim, "hot_dhe", DHE, parameters={"hot": 100}),  # all are hot
        FeatureConfig("e", 400, dim, "hot_low_rank", mode="mean", parameters={"hot": 1, "rank": 3}),
        FeatureConfig("f", 70, dim, "hybrid", DHE),
    ]


def make(dim=16, num_dense=5, hybrid="both", **options):
    torch.manual_seed(0)
    model = DLRM(features(dim), num_dense, dim, (24,) if num_dense else (), (32,), hybrid, **options).eval()
    for f in model.embeddings.features:
        if f.name in HOT:
            model.embeddings._members(f.parts[0])[f.name].ids.copy_(torch.tensor(HOT[f.name]))
    return model


def hot(model, name):
    feature = next(f for f in model.embeddings.features if f.name == name)
    return model.embeddings._members(feature.parts[0])[name]


def batch(model, samples, longest=3, seed=0, dtype=torch.int64, share=0.5):
    """Of each feature about that share of hot IDs."""
    g = torch.Generator().manual_seed(seed + samples)
    found = model.embeddings.features
    lengths = torch.randint(0, longest + 1, (len(found), samples), generator=g)
    if longest == 1:
        lengths.fill_(1)
    ids = []
    for f, n in zip(found, lengths.sum(1).tolist(), strict=True):
        any_id = torch.randint(0, f.num_embeddings, (n,), generator=g)
        of = torch.tensor(HOT.get(f.name, [0]))
        hot_id = of[torch.randint(0, len(of), (n,), generator=g)]
        ids.append(torch.where(torch.rand(n, generator=g) < share, hot_id, any_id))
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.flatten().cumsum(0)])
    return torch.randn(samples, model.num_dense, generator=g), torch.cat(ids).to(dtype), offsets.to(dtype)


@pytest.mark.parametrize("name", runnable_isas())
@pytest.mark.parametrize("hybrid", ["both", "mean"])
@pytest.mark.parametrize(("dim", "num_dense"), [(16, 5), (3, 0), (33, 5)])
def test_scores_are_those_of_float64(name, hybrid, dim, num_dense):
    model = make(dim, num_dense, hybrid)
    path = mprec.compile_path(model)
    with isa(name):
        for samples in (1, 5, 132, 133, 300):
            for longest in (1, 4):
                inputs = batch(model, samples, longest)
                got = path(*inputs)
                check(model, got, *inputs)
                check_weights(model, got, *inputs)


@pytest.mark.parametrize("share", [0.0, 1.0])
@pytest.mark.parametrize("longest", [0, 1, 5])
def test_halves_that_are_empty(share, longest):
    model = make()
    path = mprec.compile_path(model)
    for samples in (0, 1, 40):
        inputs = batch(model, samples, longest, share=share)
        check_weights(model, path(*inputs), *inputs)


@pytest.mark.parametrize("interaction", ["dot", "cat"])
@pytest.mark.parametrize("precision", ["bfloat16", "int8"])
def test_dense_layers_in_fewer_bits(interaction, precision):
    model = make(interaction=interaction)
    path = mprec.compile_path(model, precision)
    for samples in (3, 150):
        inputs = batch(model, samples)
        check(model, path(*inputs), *inputs, precision=precision)


@pytest.mark.parametrize("tables", ["float16", "bfloat16", "int8", "int4"])
def test_rows_of_every_format(tables):
    model = make()
    for f in model.embeddings.features:  # int4 rows have an even number of columns
        if f.name == "e":
            hot(model, "e").rest.rows = mprec.nn.EmbeddingBag(400, 2, mode="mean")
            hot(model, "e").rest.projection = nn.Linear(2, 16, bias=False)
    model.embeddings = QuantizedEmbeddingBagCollection(model.embeddings, tables=tables)
    path = mprec.compile_path(model)
    for samples in (1, 70):
        inputs = batch(model, samples)
        got = path(*inputs)
        check(model, got, *inputs)
        check_weights(model, got, *inputs)


@settings(max_examples=60, deadline=None)
@given(
    samples=st.integers(1, 400),
    longest=st.integers(0, 5),
    share=st.sampled_from([0.1, 0.9]),
    threads=st.sampled_from([1, 2, 3]),
    name=st.sampled_from(runnable_isas()),
    dtype=st.sampled_from([torch.int32, torch.int64]),
)
def test_any_batch(samples, longest, share, threads, name, dtype):
    model = make()
    path = mprec.compile_path(model)
    inputs = batch(model, samples, longest, dtype=dtype, share=share)
    torch.set_num_threads(threads)
    with isa(name):
        got = path(*inputs)
        check(model, got, *inputs)
        check_weights(model, got, *inputs)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_set_of_hot_ids(data):
    """Crowded in one stretch of the vocabulary, spread over all of it, or all of it."""
    size = data.draw(st.sampled_from([1, 2, 63, 1000, 1 << 40]))
    dense_ids = st.integers(max(0, size - 50), size - 1)
    any_ids = st.one_of(dense_ids, st.integers(0, size - 1))
    ids = sorted(data.draw(st.sets(any_ids, min_size=1, max_size=40)))
    feature = FeatureConfig("a", size, 4, "hot_dhe", DHE, parameters={"hot": len(ids)})
    torch.manual_seed(0)
    model = DLRM([feature], 0, 4, (), (8,)).eval()
    hot(model, "a").ids.copy_(torch.tensor(ids))
    others = data.draw(st.lists(any_ids, max_size=40))
    near = [i for each in ids for i in (each - 1, each, each + 1) if 0 <= i < size]
    indices = torch.tensor(near + others)
    offsets = torch.arange(len(indices) + 1)
    inputs = torch.zeros(len(indices), 0), indices, offsets
    check_weights(model, mprec.compile_path(model)(*inputs), *inputs)


def test_hot_rows_beside_a_row_cache():
    model = make()
    model.embeddings = CachedEmbeddingBagCollection(model.embeddings, 1 << 14)
    path = mprec.compile_path(model)
    for seed in range(4):
        inputs = batch(model, 50, seed=seed)
        check_weights(model, path(*inputs), *inputs)
    assert model.embeddings.stats().calls == 4


@pytest.mark.parametrize("feature", ["a", "c", "e"])
@pytest.mark.parametrize("shift", [-1, 1])
def test_an_id_out_of_range_raises_what_the_model_raises(feature, shift):
    model = make()
    path = mprec.compile_path(model)
    dense, indices, offsets = batch(model, 9, 2)
    position = [f.name for f in model.embeddings.features].index(feature)
    f = model.embeddings.features[position]
    indices[offsets[position * 9]] = -1 if shift < 0 else f.num_embeddings
    texts = []
    for call in (path, lambda *inputs: model(*inputs).sigmoid()):
        with pytest.raises(IdOutOfRangeError, match=rf"feature '{feature}'") as caught, torch.no_grad():
            call(dense, indices, offsets)
        texts.append(str(caught.value))
    assert texts[0] == texts[1]
    with pytest.raises(IdOutOfRangeError, match=rf"feature {position}, bag .*\[0, {f.num_embeddings}\)"):
        mprec._C.run_program(path.program(), dense, indices, offsets, 1)


def changes():
    def hot_rows(model):
        hot(model, "a").hot.weight.neg_()

    def hot_rows_replaced(model):
        hot(model, "c").hot.weight = nn.Parameter(torch.randn(4, 16))

    def hot_rows_moved(model):
        hot(model, "d").hot.weight.data = torch.randn(60, 16)

    def hot_module(model):
        hot(model, "a").hot = copy.deepcopy(hot(model, "a").hot)
        hot(model, "a").hot.weight.mul_(3)

    def rest(model):
        hot(model, "a").rest.decoder[0].weight.neg_()

    def rest_module(model):
        hot(model, "a").rest = copy.deepcopy(hot(model, "a").rest)
        hot(model, "a").rest.decoder[1].bias.add_(1)

    def rest_rows(model):
        hot(model, "e").rest.rows.weight.mul_(-2)

    def projection(model):
        hot(model, "e").rest.projection.weight.mul_(-2)

    def ids(model):
        hot(model, "a").ids.copy_(torch.arange(5) + 10)

    def ids_replaced(model):
        hot(model, "a").ids = torch.arange(5) + 10

    def feature(model):
        model.embeddings.hot_dhe["a"] = copy.deepcopy(model.embeddings.hot_dhe["a"])
        hot(model, "a").hot.weight.mul_(3)

    def state(model):
        other = make()
        for p in other.parameters():
            p.mul_(1.3)
        model.load_state_dict(other.state_dict())

    return {f.__name__: f for f in list(locals().values()) if callable(f)}


@torch.no_grad()
@pytest.mark.parametrize("change", list(changes()))
def test_changed_weights_are_used(change):
    model = make()
    path = mprec.compile_path(model)
    inputs = batch(model, 30)
    before = path(*inputs)
    changes()[change](model)
    after = path(*inputs)
    assert not torch.allclose(before, after, atol=1e-7, rtol=0)
    check_weights(model, after, *inputs)
    native = path._native
    assert torch.equal(path(*inputs), after)
    assert path._native is native, "packed again although nothing changed"


@torch.no_grad()
def test_a_model_that_is_no_longer_compiled_runs_as_before():
    model = make()
    path = mprec.compile_path(model)
    inputs = batch(model, 12)
    hot(model, "a").rest.decoder[0].register_forward_hook(lambda module, args, out: 2 * out)
    torch.testing.assert_close(path(*inputs), model(*inputs).sigmoid())


@pytest.mark.parametrize(
    ("ids", "text"),
    [
        ([3, 7, 7, 20, 33], "expected rising ones from 0 to 49, got 7 after 7"),
        ([3, 7, 20, 33, 50], "got 50 after 33"),
        ([-1, 7, 20, 33, 49], "got -1 after -1"),
    ],
)
def test_ids_that_no_search_finds_are_refused(ids, text):
    model = make()
    hot(model, "a").ids.copy_(torch.tensor(ids))
    with pytest.raises(PathCompileError, match=text):
        mprec.compile_path(model)


def test_rows_that_do_not_fit_are_refused():
    model = make()
    hot(model, "c").hot.weight = nn.Parameter(torch.randn(3, 16))
    with pytest.raises(PathCompileError, match="hot: expected 4 rows, got 3"):
        mprec.compile_path(model)
    model = make()
    hot(model, "c").rest.rows.weight = nn.Parameter(torch.randn(29, 2))
    with pytest.raises(PathCompileError, match="hot: expected 30 rows, got 29"):
        mprec.compile_path(model)


def test_copies_and_pickles():
    model = make()
    path = mprec.compile_path(model)
    inputs = batch(model, 12)
    want = path(*inputs)
    for other in (copy.deepcopy(path), pickle.loads(pickle.dumps(path))):
        assert torch.equal(other(*inputs), want)
        with torch.no_grad():
            hot(other.model, "a").hot.weight.add_(1)
        assert not torch.equal(other(*inputs), want)
    assert torch.equal(path(*inputs), want)


def test_concurrent_calls():
    model = make()
    path = mprec.compile_path(model)
    work = [batch(model, samples) for samples in (1, 50, 133, 7)]
    want = [path(*inputs) for inputs in work]
    assert_same_concurrently(path, work, want, 50)


def test_threads_share_samples():
    torch.manual_seed(0)
    big = [
        FeatureConfig(f"f{i}", 5000, 16, kind, DHE if kind == "hot_dhe" else None, mode="mean")
        for i, kind in enumerate(["hot_dhe", "hot_low_rank", "hot_dhe"])
    ]
    model = DLRM(big, 5, 16, (256,), (256,)).eval()
    path = mprec.compile_path(model)
    inputs = batch(model, 3000, 4)
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        check_weights(model, path(*inputs), *inputs)


def test_what_native_code_refuses():
    from test_fuzz_native import program_arguments

    def program(**changed):
        arguments = program_arguments((0, 1), before="hot")
        names = "ids", "size", "feature", "part", "mode", "rows", "rest"
        own = dict(zip(names, arguments["hot"][0], strict=True)) | changed
        return mprec._C.PathProgram(**arguments | {"hot": [tuple(own.values())]})

    def table(*shape):
        return {"rows": torch.randn(shape)}, "rows", 0, 3, 0, 8, None, None

    program()
    for message, changed in (
        ("pooled by sum or mean, got max", {"mode": 2}),
        ("feature 2 is none of the 2", {"feature": 2}),
        ("each part below 4 once, got 2", {"part": 2}),
        ("each part below 4 once, got 4", {"part": 4}),
        ("expected rising ones from 0 to 8, got 9", {"size": 9}),
        ("expected at least 1, got 0", {"size": 0}),
        ("expected 1 to 4294967295 hot ones, got 0", {"ids": torch.empty(0, dtype=torch.int64)}),
        ("expected 2 rows, got 1", {"ids": torch.arange(2), "rows": table(1, 8)}),
        ("expected rows of one vector", {"rows": table(3, 16)}),
        ("expected 10 rows, got 9", {"rest": table(9, 8)}),
    ):
        with pytest.raises(ValueError, match=message):
            program(**changed)
