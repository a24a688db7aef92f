"""Whole paths as one native call, of decoders behind row caches and codebooks: scores, counters, changes."""

import copy
import dataclasses
import pickle
import threading
from functools import partial

import pytest
import torch
from cached_dlrm import DIM, batch, books, counts, make, plain
from concurrent_calls import assert_same_concurrently
from float64_dlrm import UNIT, check, check_weights, embedded, scores
from hypothesis import given, settings
from hypothesis import strategies as st

import mprec
from mprec.cache import CachedEmbeddingBagCollection
from mprec.errors import IdOutOfRangeError, InvalidOffsetsError
from mprec.models import DLRM
from mprec.nn import DheConfig, FeatureConfig
from mprec.testing import isa, runnable_isas


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ------------------------------------------------------------------------------------------ what it computes


@pytest.mark.parametrize("name", runnable_isas())
@pytest.mark.parametrize("hybrid", ["both", "mean"])
@pytest.mark.parametrize("nbytes", [20_000, 1 << 20])
def test_scores_are_those_of_float64(name, hybrid, nbytes):
    """With caches that hold a part of the IDs, and with ones that hold all."""
    model = make(nbytes, hybrid)
    path = mprec.compile_path(model)
    with isa(name):
        for samples in (1, 5, 132, 133, 300):
            for longest in (1, 4):
                inputs = batch(model, samples, longest)
                got = path(*inputs)
                check(model, got, *inputs)
                check_weights(model, got, *inputs)
    stats = model.embeddings.stats()
    assert all(f.hits for f in stats.features.values())
    assert stats.features.keys() == {"city", "item", "words", "user"}


@settings(max_examples=40, deadline=None)
@given(
    samples=st.integers(0, 400),
    longest=st.integers(0, 5),
    threads=st.sampled_from([1, 2, 3]),
    name=st.sampled_from(runnable_isas()),
    dtype=st.sampled_from([torch.int32, torch.int64]),
    admit=st.booleans(),
)
def test_any_batch(samples, longest, threads, name, dtype, admit):
    model = make(admit=admit)
    path = mprec.compile_path(model)
    torch.set_num_threads(threads)
    with isa(name):
        for seed in range(2):
            inputs = batch(model, samples, longest, seed, dtype)
            check_weights(model, path(*inputs), *inputs)


@pytest.mark.parametrize("precision", ["bfloat16", "int8"])
def test_dense_layers_in_fewer_bits(precision):
    model = make()
    path = mprec.compile_path(model, precision)
    for seed in range(3):
        inputs = batch(model, 70, seed=seed)
        check(model, path(*inputs), *inputs, precision=precision)


def test_filled_rows_are_not_decoded():
    model = make(1 << 23, admit=False)
    held = model.embeddings.fill({name: torch.ones(50) for name in ("city", "item", "words", "user")})
    assert set(held.values()) == {50}
    dense, indices, offsets = batch(model, 40)
    inputs = dense, indices % 50, offsets
    check_weights(model, mprec.compile_path(model)(*inputs), *inputs)
    stats = model.embeddings.stats()
    assert stats.decoded == 0
    assert all(f.hit_rate == 1 for f in stats.features.values())


def coded(model, made, indices, offsets):
    """The collection's output in float64: IDs with a code have the sum of its centroids."""
    own = copy.deepcopy(model.embeddings)
    samples = (len(offsets) - 1) // len(own.features)
    want = embedded(own, indices, offsets).unflatten(1, (-1, DIM))
    part = 0
    for i, f in enumerate(own.features):
        if f.name in made:
            book, rows = made[f.name], torch.zeros(samples, DIM).double()
            centroids = book.centroids.double().view(-1, 256, DIM)
            for s in range(samples):
                ids = indices[offsets[i * samples + s] : offsets[i * samples + s + 1]]
                for x in ids.tolist():
                    if x < len(book.codes):
                        rows[s] += sum(c[int(k)] for c, k in zip(centroids, book.codes[x], strict=True))
                    else:
                        rows[s] += own.dhe[f.name](torch.tensor([x]), torch.tensor([0, 1]))[0].double()
            want[:, part + len(f.parts) - 1] = rows  # both features pool by sum
        part += len(f.parts)
    return want.flatten(1)


@torch.no_grad()
@pytest.mark.parametrize("budgets", [{"words": 20_000}, {"words": 20_000, "city": 10_000}])
def test_codebooks(budgets):
    """Behind a cache and without one; IDs past the codes are decoded. A cache whose IDs all have codes, and
    which nobody fills, stays empty."""
    model = make(budgets, codebooks=(made := books(plain())))
    path = mprec.compile_path(model)
    for seed in range(2):
        dense, indices, offsets = batch(model, 50, seed=seed)
        got = path(dense, indices, offsets)
        want = coded(model, made, indices, offsets)
        bound = scores(model, dense, want, 64 * UNIT * float(want.abs().max()))
        assert float(((got.double() - bound.value).abs() / bound.error).max()) <= 1
        exact = scores(model, dense, embedded(model.embeddings, indices, offsets))
        assert float((got.double() - exact.value).abs().max()) > 1e-6  # they are approximate
    assert model.embeddings.stats().coded > 0


# ------------------------------------------------------------------------------------------ what it counts


@torch.no_grad()
@pytest.mark.parametrize("coded", [False, True])
@pytest.mark.parametrize("admit", [False, True])
def test_counters_are_those_of_the_models_own_calls(coded, admit):
    """Of each ID asked for, repeated ones too; of what enters and what leaves; of what is decoded."""
    model = make(30_000, admit=admit, codebooks=books(plain(), 2) if coded else None)
    other = copy.deepcopy(model)
    path = mprec.compile_path(other)
    for seed in range(6):
        inputs = batch(model, (60, 1, 133)[seed % 3], 3, seed)
        torch.testing.assert_close(path(*inputs), model(*inputs).sigmoid(), rtol=1e-5, atol=1e-6)
    assert counts(other.embeddings.stats()) == counts(model.embeddings.stats())
    found = other.embeddings.stats()
    assert found.calls == 6 * 3  # of each group: sums, means, and the maxima of another family
    assert found.lookup_s > 0
    assert found.decode_s > 0
    if admit:
        assert all(f.hits and f.misses for f in found.features.values())
        assert any(f.evictions for f in found.features.values())
        assert any(f.rejections for f in found.features.values())
    else:
        assert not any(f.hits or f.admissions for f in found.features.values())
    other.embeddings.reset_stats()
    assert not any(f.hits for f in other.embeddings.stats().features.values())


@torch.no_grad()
def test_a_path_and_its_model_share_a_cache():
    model = make(1 << 20)
    path = mprec.compile_path(model)
    inputs = batch(model, 100)
    model(*inputs)
    before = model.embeddings.stats()
    path(*inputs)
    after = model.embeddings.stats()
    assert after.decoded == before.decoded  # all rows were there
    assert all(f.misses == before.features[name].misses for name, f in after.features.items())


# ------------------------------------------------------------------------------------------ what it takes


def test_copies_and_pickles_begin_with_empty_caches():
    model = make(1 << 20)
    path = mprec.compile_path(model)
    inputs = batch(model, 12)
    want = path(*inputs)
    for other in (copy.deepcopy(path), pickle.loads(pickle.dumps(path))):
        assert other.model.embeddings.stats().calls == 0
        assert torch.equal(other(*inputs), want)
        assert other.model.embeddings.stats().calls == 3
        with torch.no_grad():
            other.model.embeddings.dhe["city"].decoder[0].weight.add_(1)
        assert not torch.equal(other(*inputs), want)
    torch.testing.assert_close(path(*inputs), want)


@torch.no_grad()
def test_bad_input_raises_what_the_model_raises():
    model = make()
    path = mprec.compile_path(model)
    dense, indices, offsets = batch(model, 9, 2)
    falling, negative, high = offsets.clone(), indices.clone(), indices.clone()
    falling[5] = falling[6] + 1
    negative[0] = -1  # city
    high[offsets[9]] = 50  # tag
    for inputs, error in (
        ((dense, indices, falling), InvalidOffsetsError),
        ((dense, indices, offsets[:-2]), ValueError),
        ((dense, negative, offsets), IdOutOfRangeError),
        ((dense, high, offsets), IdOutOfRangeError),
        ((dense[:, 1:], indices, offsets), ValueError),
        ((dense, indices.float(), offsets), TypeError),
    ):
        texts = []
        for call in (path, lambda *inputs: model(*inputs).sigmoid()):
            with pytest.raises(error) as caught:
                call(*inputs)
            texts.append(str(caught.value))
        assert texts[0] == texts[1]
    with pytest.raises(IdOutOfRangeError, match=r"indices\[0\] \(feature 0, bag .* is -1"):
        mprec._C.run_program(path.program(), dense, negative, offsets, 1)
    check_weights(model, path(dense, indices, offsets), dense, indices, offsets)
    huge = indices.clone()
    huge[0] = 1 << 40  # any ID has an embedding
    torch.testing.assert_close(path(dense, huge, offsets), model(dense, huge, offsets).sigmoid())


def test_concurrent_calls():
    """Calls that admit and evict at the same time give the scores of calls one after another."""
    model = make(20_000)
    path = mprec.compile_path(model)
    torch.set_num_threads(2)
    work = [batch(model, samples, seed=samples) for samples in (1, 50, 133, 7)]
    with torch.no_grad():
        want = [plain()(*inputs).sigmoid() for inputs in work]
    close = partial(torch.allclose, rtol=1e-5, atol=1e-6)
    assert_same_concurrently(path, work, want, 60, close)
    stats = model.embeddings.stats()
    assert stats.calls == 4 * 60 * 3
    asked = 60 * sum(int(offsets[len(dense)] - offsets[0]) for dense, _, offsets in work)
    assert stats.features["city"].hits + stats.features["city"].misses == asked
    assert stats.features["user"].evictions > 0


def test_threads_while_weights_change():
    """Every score is one of weights that were current during the call, whoever stores rows meanwhile."""
    config = DheConfig(k=8, hidden=(), last_activation="none")
    model = DLRM([FeatureConfig("a", 5000, 1, "dhe", config)], 0, 1, (), (), interaction="cat").eval()
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        model.top[0].weight[0, 1] = 0.05  # logit: the bias of the decoder, over 20
    model.embeddings = CachedEmbeddingBagCollection(model.embeddings, 20_000)
    layer = model.embeddings.dhe["a"].decoder[0]
    path = mprec.compile_path(model)
    version, stop, wrong = [0], threading.Event(), []

    def read(seed):
        g = torch.Generator().manual_seed(seed)
        while not stop.is_set():
            ids = (torch.rand(700, generator=g) ** 4 * 5000).long()
            first = version[0]
            out = path(torch.zeros(700, 0), ids, torch.arange(701)).double().logit() * 20
            last = version[0] + 1  # the change may come before the version is raised
            if out.min() < first - 0.01 or out.max() > last + 0.01:
                wrong.append((first, last, out.min().item(), out.max().item()))

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    with torch.no_grad():
        for _ in range(80):
            layer.bias.add_(1)
            version[0] += 1
            if version[0] % 10 == 0:
                model.embeddings.invalidate()
            stop.wait(0.01)
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong
    assert dataclasses.asdict(model.embeddings.stats())["features"]["a"]["hits"] > 0


def test_what_native_code_refuses():
    from test_fuzz_native import decoder_arguments, program_arguments

    def program(decoders=None, parts=(3,), mode=0):
        arguments = program_arguments((0, 1), before="cache")
        made = arguments["cached"][0][0] if decoders is None else decoders
        return mprec._C.PathProgram(**arguments | {"cached": [(made, list(parts), mode, True)]})

    def decoders(dim=8, position=0, features=2):
        decoder = mprec._C.Decoder(**decoder_arguments([16, 5, dim]))
        return mprec._C.CachedDecoders([decoder], [None], [position], [0], features)

    program()
    for message, changed in (
        ("each part below 4 once, got 2", {"parts": [2]}),
        ("a part for each of 1 decoders, got 2", {"parts": [3, 4]}),
        ("a batch of 2 features, got 3", {"decoders": decoders(features=3)}),
        ("expected vectors of 8 numbers, got 9", {"decoders": decoders(9)}),
        ("mode", {"mode": 3}),
    ):
        with pytest.raises(ValueError, match=message):
            program(**changed)
