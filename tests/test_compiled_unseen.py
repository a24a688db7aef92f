"""Whole paths as one native call, of collections in which unseen IDs have their feature's mean."""

import copy
import pickle

import cached_dlrm
import pytest
import torch
from concurrent_calls import assert_same_concurrently
from float64_dlrm import UNIT, check, embedded, scores, vectors
from hypothesis import given, settings
from hypothesis import strategies as st

import mprec
from mprec import reference
from mprec.cache import CachedEmbeddingBagCollection
from mprec.errors import IdOutOfRangeError, PathCompileError
from mprec.models import DLRM
from mprec.names import MODES
from mprec.nn import DheConfig, FeatureConfig, MeanForUnseen, QuantizedEmbeddingBagCollection
from mprec.testing import isa, runnable_isas

DHE, DIM = DheConfig(k=24, hidden=(16,)), 8
BEYOND = 20  # IDs past the vocabulary


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make(hybrid="both", inner=lambda collection: collection):
    torch.manual_seed(0)
    features = [
        FeatureConfig("user", 40, DIM),
        FeatureConfig("day", 7, DIM, mode="max"),
        FeatureConfig("item", 300, DIM, "hybrid", DHE, mode="mean"),
        FeatureConfig("word", 90, DIM, "hot_low_rank", mode="mean", parameters={"hot": 5, "rank": 2}),
        FeatureConfig("place", 60, DIM, "dhe", DHE),
    ]
    model = DLRM(features, 3, DIM, (12,), (16,), hybrid).eval()
    g = torch.Generator().manual_seed(1)
    seen = {
        f.name: torch.randperm(f.num_embeddings, generator=g)[: f.num_embeddings // 2]
        for f in features
        if f.name != "day"
    }
    model.embeddings = MeanForUnseen(inner(model.embeddings), seen)
    return model


def batch(model, samples, longest=3, seed=0, dtype=torch.int64, unseen=True):
    g = torch.Generator().manual_seed(seed + samples)
    own = model.embeddings
    lengths = torch.randint(0, longest + 1, (len(own.features), samples), generator=g)
    ids = []
    for i, (f, n) in enumerate(zip(own.features, lengths.sum(1).tolist(), strict=True)):
        if not own.sizes[i]:
            ids.append(torch.randint(0, f.num_embeddings, (n,), generator=g))
        elif unseen:
            ids.append(torch.randint(0, f.num_embeddings + BEYOND, (n,), generator=g))
        else:
            known = own.known[own.starts[i] : own.starts[i] + f.num_embeddings].nonzero()[:, 0]
            ids.append(known[torch.randint(0, len(known), (n,), generator=g)])
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.flatten().cumsum(0)])
    return torch.randn(samples, 3, generator=g), torch.cat(ids).to(dtype), offsets.to(dtype)


def means(module, indices, offsets):
    """The definition in float64: an ID that is not known has the mean of the vectors of those that are."""
    samples, out = (len(offsets) - 1) // len(module.features), []
    for i, f in enumerate(module.features):
        own = offsets[i * samples : (i + 1) * samples + 1].long()
        ids = indices[own[0] : own[-1]].long()
        for part in f.parts:
            weights = module.collection._members(part)[f.name]
            table = vectors(part.container, weights, torch.arange(f.num_embeddings))
            if module.sizes[i]:
                known = module.known[module.starts[i] : module.starts[i] + f.num_embeddings]
                mean = table[known].mean(0)
                table = torch.cat([torch.where(known[:, None], table, mean), mean.expand(BEYOND, -1)])
            out.append(reference.pool(table[ids], own - own[0], MODES[f.mode], include_last_offset=True))
    return torch.cat(out, dim=1)


def check_means(model, got, dense, indices, offsets):
    want = means(model.embeddings, indices, offsets)
    # A mean of many vectors, and the difference to one of them, are rounded to float32.
    bound = scores(model, dense, want, 128 * UNIT * float(want.abs().max()))
    assert float(((got.double() - bound.value).abs() / bound.error).max()) <= 1


@pytest.mark.parametrize("name", runnable_isas())
@pytest.mark.parametrize("hybrid", ["both", "mean"])
def test_scores_are_those_of_float64(name, hybrid):
    model = make(hybrid)
    path = mprec.compile_path(model)
    with isa(name):
        for samples in (1, 5, 132, 300):
            for unseen in (True, False):
                inputs = batch(model, samples, unseen=unseen)
                got = path(*inputs)
                check(model, got, *inputs)
                check_means(model, got, *inputs)
    empty = torch.zeros(4, 3), torch.empty(0, dtype=torch.int64), torch.zeros(21, dtype=torch.int64)
    check(model, path(*empty), *empty)


@settings(max_examples=40, deadline=None)
@given(
    samples=st.integers(1, 400),
    longest=st.integers(1, 5),
    threads=st.sampled_from([1, 2, 3]),
    dtype=st.sampled_from([torch.int32, torch.int64]),
)
def test_any_batch(samples, longest, threads, dtype):
    model = make()
    path = mprec.compile_path(model)
    torch.set_num_threads(threads)
    inputs = batch(model, samples, longest, dtype=dtype)
    check(model, path(*inputs), *inputs)


@pytest.mark.parametrize(
    "inner",
    [
        lambda collection: QuantizedEmbeddingBagCollection(collection, "int8"),
        lambda collection: CachedEmbeddingBagCollection(collection, 1 << 15),
    ],
    ids=["quantised", "cached"],
)
def test_around_other_collections(inner):
    model = make(inner=inner)
    path = mprec.compile_path(model)
    for seed in range(3):
        inputs = batch(model, 70, seed=seed)
        check(model, path(*inputs), *inputs)
    assert path._native.changed() is False


@torch.no_grad()
def test_caches_are_asked_for_the_proxy():
    """As by the model: an unseen ID costs one decoded ID in all."""
    made = cached_dlrm.make(1 << 20)
    made.embeddings = MeanForUnseen(made.embeddings, {"city": torch.arange(20)})
    model, other = copy.deepcopy(made), copy.deepcopy(made)  # their caches are empty: the means were decoded
    path = mprec.compile_path(other)
    for seed in range(3):
        inputs = cached_dlrm.batch(model, 40, seed=seed)
        torch.testing.assert_close(path(*inputs), model(*inputs).sigmoid(), rtol=1e-5, atol=1e-6)
    found, own = other.embeddings.collection.stats(), model.embeddings.collection.stats()
    assert cached_dlrm.counts(found) == cached_dlrm.counts(own)
    assert 0 < found.features["city"].rows <= 20


@torch.no_grad()
def test_what_changes_is_noticed():
    model = make()
    path = mprec.compile_path(model)
    inputs = batch(model, 30)

    def corrections():
        model.embeddings.corrections.mul_(0.5)

    def known():
        model.embeddings.known[:40] = True
        model.embeddings.refresh()

    def refreshed():
        model.embeddings.collection.tables["user"].weight.mul_(2)
        model.embeddings.refresh()

    def proxies():
        known = model.embeddings.known[:40].nonzero()[:, 0]
        model.embeddings.proxies[0] = known[-1]

    def collection():
        model.embeddings = make().embeddings
        model.embeddings.collection.tables["user"].weight.mul_(-3)
        model.embeddings.refresh()

    before = path(*inputs)
    for change in (corrections, known, refreshed, proxies, collection):
        change()
        after = path(*inputs)
        assert change is proxies or not torch.allclose(before, after, atol=1e-6), change.__name__
        check(model, after, *inputs)
        before = after
    check_means(model, before, *inputs)
    model.embeddings = model.embeddings.collection
    known_alone = batch(make(), 30, unseen=False)
    check(model, path(*known_alone), *known_alone)


def test_no_seen_ids_at_all():
    model = make()
    model.embeddings = MeanForUnseen(model.embeddings.collection, {})
    inputs = batch(model, 9)
    want = embedded(model.embeddings.collection, *inputs[1:])
    bound = scores(model, inputs[0], want, 64 * UNIT * float(want.abs().max()))
    got = mprec.compile_path(model)(*inputs)
    assert float(((got.double() - bound.value).abs() / bound.error).max()) <= 1


@pytest.mark.parametrize(("feature", "bad"), [(0, -1), (1, 7), (1, -1), (2, -5), (3, -1), (4, -1)])
def test_an_id_out_of_range_raises_what_the_model_raises(feature, bad):
    model = make()
    path = mprec.compile_path(model)
    dense, indices, offsets = batch(model, 9)
    indices[offsets[feature * 9]] = bad
    texts = []
    for call in (path, lambda *inputs: model(*inputs).sigmoid()):
        with pytest.raises(IdOutOfRangeError) as caught, torch.no_grad():
            call(dense, indices, offsets)
        texts.append(str(caught.value))
    assert texts[0] == texts[1]


def test_corrections_of_other_features_are_refused():
    model = make()
    model.embeddings.corrections[0, -1] = 1
    with pytest.raises(PathCompileError, match=r"corrections\[0\]: expected zeros in other features"):
        mprec.compile_path(model)


def test_copies_pickles_and_concurrent_calls():
    model = make()
    path = mprec.compile_path(model)
    work = [batch(model, samples) for samples in (1, 50, 133)]
    want = [path(*inputs) for inputs in work]
    for other in (copy.deepcopy(path), pickle.loads(pickle.dumps(path))):
        assert torch.equal(other(*work[1]), want[1])
    assert_same_concurrently(path, work, want, 40)


def test_what_native_code_refuses():
    from test_fuzz_native import program_arguments

    def program(feature=0, part=0, known=(1, 0, 1), proxy=2, averaged=False, numbers=8):
        stage = feature, part, torch.tensor(known, dtype=torch.uint8), proxy, averaged, torch.zeros(numbers)
        return mprec._C.PathProgram(**program_arguments((0, 1)) | {"unseen": [stage] * (1 + (feature == 1))})

    program()
    program(numbers=24)
    for message, changed in (
        ("each feature below 2 at most once, got 2", {"feature": 2}),
        ("each feature below 2 at most once, got 1", {"feature": 1}),
        ("ID 1, which stands for others, is unknown", {"proxy": 1}),
        ("ID 3, which stands for others, is unknown", {"proxy": 3}),
        ("9 numbers from part 0 on are none of 3 parts of 8", {"numbers": 9}),
        ("16 numbers from part 2 on are none of 3 parts", {"part": 2, "numbers": 16}),
        ("8 numbers from part -1 on", {"part": -1}),
    ):
        with pytest.raises(ValueError, match=message):
            program(**changed)
