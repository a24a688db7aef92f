"""A whole path as one native call: its scores against float64, and what it takes, watches and refuses."""

import copy
import pickle
import sys
import threading
import time

import pytest
import torch
from concurrent_calls import assert_same_concurrently
from float64_dlrm import check
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import mprec
from mprec.cache import CachedEmbeddingBagCollection, materialize
from mprec.errors import IdOutOfRangeError, InvalidOffsetsError, PathCompileError
from mprec.models import DLRM, PATHS, MultiPathDLRM
from mprec.nn import (
    DheConfig,
    FeatureConfig,
    MappedEmbeddingBagCollection,
    MeanForUnseen,
    QuantizedEmbeddingBagCollection,
    with_representation,
)
from mprec.testing import isa, runnable_isas

VOCABULARIES = (50, 7, 300, 1000)
DHE = DheConfig(k=40, hidden=(24,))


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make(
    representation="table",
    dim=16,
    vocabularies=VOCABULARIES,
    num_dense=13,
    bottom=(64, 32),
    top=(77, 30),
    hybrid="both",
    modes=("sum", "mean", "max"),
    dhe=DHE,
    interaction="dot",
):
    torch.manual_seed(0)
    features = [
        FeatureConfig(f"f{i}", size, dim, mode=modes[i % len(modes)]) for i, size in enumerate(vocabularies)
    ]
    features = with_representation(features, representation, dhe=dhe)
    return DLRM(features, num_dense, dim, bottom, top, hybrid=hybrid, interaction=interaction).eval()


def batch(model, samples, longest=3, seed=0, dtype=torch.int64):
    """Bags of 0 to ``longest`` IDs; one each if ``longest`` is 1."""
    g = torch.Generator().manual_seed(seed + samples)
    features = model.embeddings.features
    if longest == 1:
        lengths = torch.ones(len(features) * samples, dtype=torch.int64)
    else:
        lengths = torch.randint(0, longest + 1, (len(features) * samples,), generator=g)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    counts = lengths.view(len(features), samples).sum(1).tolist()
    ids = [
        torch.randint(0, f.num_embeddings, (n,), generator=g) for f, n in zip(features, counts, strict=True)
    ]
    dense = torch.randn(samples, model.num_dense, generator=g)
    return dense, torch.cat(ids).to(dtype), offsets.to(dtype)


# ------------------------------------------------------------------------------------------ what it computes


@pytest.mark.parametrize("name", runnable_isas())
@pytest.mark.parametrize(
    ("representation", "hybrid"),
    [("table", "both"), ("dhe", "both"), ("select", "both"), ("hybrid", "both"), ("hybrid", "mean")],
)
def test_scores_are_those_of_float64(name, representation, hybrid):
    model = make(representation, hybrid=hybrid)
    path = mprec.compile_path(model)
    with isa(name):
        for samples in (1, 2, 3, 4, 5, 13, 66, 67, 132, 133, 264, 265, 600):
            for longest in (1, 4):
                inputs = batch(model, samples, longest)
                check(model, path(*inputs), *inputs)


@pytest.mark.parametrize("name", runnable_isas())
@pytest.mark.parametrize("count", [1, 2, 3, 5, 9, 16, 17, 31, 32, 33, 40])
@pytest.mark.parametrize("dim", [1, 3, 8, 16, 17, 33, 64])
def test_any_number_of_vectors_of_any_size(name, count, dim):
    """Products that end before, at and behind a block of 256 columns, in every tile of the triangle."""
    model = make(dim=dim, vocabularies=(11,) * count, bottom=(9,), top=(5,))
    path = mprec.compile_path(model)
    with isa(name):
        for samples in (1, 6):
            inputs = batch(model, samples, 1)
            check(model, path(*inputs), *inputs)


@pytest.mark.parametrize("name", runnable_isas())
@pytest.mark.parametrize(
    ("num_dense", "bottom", "top"),
    [
        (1, (), ()),
        (0, (), (8,)),
        (3, (1,), (1,)),
        (17, (256,), (257, 256)),
        (260, (33, 300, 20), (16,)),
        (13, (512, 256, 64), (512, 256)),
        (5, (4, 3, 2), (600, 3)),
    ],
)
def test_mlps_of_any_shape(name, num_dense, bottom, top):
    model = make(num_dense=num_dense, bottom=bottom, top=top)
    path = mprec.compile_path(model)
    with isa(name):
        for samples in (1, 4, 5, 29):
            inputs = batch(model, samples)
            check(model, path(*inputs), *inputs)


@settings(max_examples=60, deadline=None)
@given(
    samples=st.integers(1, 600),
    longest=st.integers(0, 5),
    threads=st.sampled_from([1, 2, 3]),
    name=st.sampled_from(runnable_isas()),
    representation=st.sampled_from(["table", "select", "hybrid"]),
    dtype=st.sampled_from([torch.int32, torch.int64]),
)
def test_any_batch(samples, longest, threads, name, representation, dtype):
    model = make(representation, bottom=(20,), top=(30,))
    path = mprec.compile_path(model)
    inputs = batch(model, samples, longest, dtype=dtype)
    torch.set_num_threads(threads)
    with isa(name):
        check(model, path(*inputs), *inputs)


@pytest.mark.parametrize("name", runnable_isas())
@pytest.mark.parametrize(
    ("num_dense", "bottom", "top"),
    [(1, (), ()), (13, (64, 33), (77, 30)), (261, (255,), (257, 3)), (13, (512, 256), (512, 256))],
)
@pytest.mark.parametrize("precision", ["bfloat16", "int8"])
def test_dense_layers_in_fewer_bits(name, precision, num_dense, bottom, top):
    model = make("hybrid", num_dense=num_dense, bottom=bottom, top=top)
    path = mprec.compile_path(model, precision)
    with isa(name):
        for samples in (1, 4, 5, 29, 150):
            inputs = batch(model, samples)
            got = path(*inputs)
            check(model, got, *inputs, precision=precision)
            if bottom:
                assert not torch.equal(got, mprec.compile_path(model)(*inputs))
    assert pickle.loads(pickle.dumps(path)).precision == precision


@pytest.mark.parametrize("name", runnable_isas())
@pytest.mark.parametrize(
    ("representation", "hybrid", "precision"),
    [("table", "both", "float32"), ("hybrid", "mean", "float32"), ("select", "both", "int8")],
)
@pytest.mark.parametrize("num_dense", [0, 13])
def test_vectors_side_by_side(name, representation, hybrid, precision, num_dense):
    model = make(representation, hybrid=hybrid, num_dense=num_dense, dim=70, interaction="cat")
    path = mprec.compile_path(model, precision)
    with isa(name):
        for samples in (1, 5, 150):
            for longest in (1, 4):
                inputs = batch(model, samples, longest)
                check(model, path(*inputs), *inputs, precision=precision)


@pytest.mark.parametrize("tables", [None, "float16", "bfloat16", "float8", "int8", "int4"])
@pytest.mark.parametrize("hybrid", ["both", "mean"])
def test_rows_of_two_vectors(tables, hybrid):
    """A hybrid whose decoders were decoded into rows, once: as long as both of its vectors."""
    model = make("hybrid", hybrid=hybrid, modes=("sum", "mean"))
    model.embeddings = materialize(model.embeddings)
    if tables is not None:
        model.embeddings = QuantizedEmbeddingBagCollection(model.embeddings, tables)
    assert {f.embedding_dim for f in model.embeddings.features} == {32}
    path = mprec.compile_path(model)
    for samples in (1, 5, 140):
        for longest in (1, 4):
            inputs = batch(model, samples, longest)
            check(model, path(*inputs), *inputs)


@pytest.mark.parametrize("decoders", ["float16", "bfloat16", "int8", "lut"])
def test_decoders_in_fewer_bits(decoders):
    model = make("hybrid", dhe=DheConfig(k=40, hidden=(24,), family="sign" if decoders == "lut" else "u7"))
    model.embeddings = QuantizedEmbeddingBagCollection(model.embeddings, decoders=decoders)
    path = mprec.compile_path(model)
    for samples in (1, 40):
        inputs = batch(model, samples)
        check(model, path(*inputs), *inputs)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_seen_in_its_own_sample_alone(precision, value):
    """A sigmoid of infinity is a number, of NaN none; a layer in int8 has no infinities."""
    model = make(bottom=(64, 32), top=(77, 40))
    path = mprec.compile_path(model, precision)
    for samples in (3, 40):
        dense, indices, offsets = batch(model, samples)
        want = path(dense, indices, offsets)
        dense[2, 4] = value
        got = path(dense, indices, offsets)
        assert not 1e-6 < got[2] < 1 - 1e-6
        assert got[2].isnan() or precision != "int8"
        others = torch.arange(samples) != 2
        assert torch.equal(got[others], want[others])


@pytest.mark.parametrize("samples", [1, 5, 150])
def test_int8_scores_are_the_same_on_every_isa(samples):
    """Its sums are integers; what is left is how float32 rounds."""
    model = make(bottom=(64, 32), top=(300, 77))
    path = mprec.compile_path(model, "int8")
    inputs = batch(model, samples)
    scores = []
    for name in runnable_isas():
        with isa(name):
            scores.append(path(*inputs))
    for other in scores[1:]:
        torch.testing.assert_close(other, scores[0], rtol=0, atol=2e-3)


def test_threads_share_samples():
    model = make("hybrid", bottom=(512, 256), top=(512, 256))
    path = mprec.compile_path(model)
    for samples in (2, 16, 131, 600):
        inputs = batch(model, samples)
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            check(model, path(*inputs), *inputs)


def test_all_bags_empty_and_no_samples():
    for representation in ("table", "dhe", "hybrid"):
        model = make(representation)
        path = mprec.compile_path(model)
        inputs = batch(model, 7, 0)
        assert not len(inputs[1])
        check(model, path(*inputs), *inputs)
        assert path(torch.empty(0, 13), torch.empty(0, dtype=torch.int64), torch.zeros(1).long()).shape == (
            0,
        )


@pytest.mark.parametrize("precision", ["float32", "float16", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("dim", [8, 16, 48])
def test_tables_of_every_format(precision, dim):
    model = make("hybrid", dim=dim)
    model.embeddings = QuantizedEmbeddingBagCollection(model.embeddings, tables=precision)
    path = mprec.compile_path(model)
    for name in runnable_isas():
        with isa(name):
            for samples in (1, 70):
                inputs = batch(model, samples)
                check(model, path(*inputs), *inputs)


@pytest.mark.parametrize(
    ("precision", "family"),
    [("float16", "universal"), ("bfloat16", "u7"), ("int8", "u7"), ("int8", "universal"), ("lut", "sign")],
)
def test_decoders_of_every_precision(precision, family):
    model = make("select", dhe=DheConfig(k=40, hidden=(24, 12), family=family, activation="mish"))
    model.embeddings = QuantizedEmbeddingBagCollection(model.embeddings, "float16", precision)
    path = mprec.compile_path(model)
    for name in runnable_isas():
        with isa(name):
            for samples in (1, 70):
                inputs = batch(model, samples)
                # A vector whose hidden layer rounds the other way is another one by a step of its precision.
                embedded = model.embeddings(*inputs[1:])
                with torch.no_grad():
                    want = model.score(inputs[0], embedded).sigmoid()
                torch.testing.assert_close(path(*inputs), want, atol=2e-4, rtol=0)


def test_other_layers():
    model = make(bottom=(), top=())
    model.bottom = nn.Sequential(nn.Linear(13, 20, bias=False), nn.Sigmoid(), nn.Linear(20, 16))
    inputs = batch(model, 9)
    check(model, mprec.compile_path(model)(*inputs), *inputs)


@pytest.mark.parametrize("name", PATHS)
def test_paths_of_a_multi_path_model(name):
    torch.manual_seed(0)
    features = [FeatureConfig(f"f{i}", size, 4, dhe=DHE) for i, size in enumerate(VOCABULARIES)]
    whole = MultiPathDLRM(features, 2, 4, bottom=(6,), top=(7,), select_largest=2).eval()
    model = whole.path(name)
    inputs = batch(model, 40)
    got = mprec.compile_path(model)(*inputs)
    check(model, got, *inputs)
    if name == "hybrid":
        torch.testing.assert_close(mprec.compile_path(whole)(*inputs), got, rtol=0, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", runnable_isas())
def test_numbers_that_are_not_finite(name, bad):
    """They reach the score of their sample, as torch's do, and of no other."""
    model = make(modes=("sum",))
    path = mprec.compile_path(model)
    with isa(name), torch.no_grad():
        for samples in (1, 3, 20):
            dense, indices, offsets = batch(model, samples, 1)
            clean = path(dense, indices, offsets)
            dense[samples // 2, 5] = bad
            got, want = path(dense, indices, offsets), model(dense, indices, offsets).sigmoid()
            torch.testing.assert_close(got, want, equal_nan=True, rtol=1e-5, atol=1e-6)
            others = torch.arange(samples) != samples // 2
            assert torch.equal(got[others], clean[others])
        table = model.embeddings.tables["f1"].weight
        table[int(indices[samples])] = bad  # f1's first bag
        got, want = path(*batch(model, samples, 1)), model(*batch(model, samples, 1)).sigmoid()
        assert not torch.equal(want, clean)
        torch.testing.assert_close(got, want, equal_nan=True, rtol=1e-5, atol=1e-6)
        model.top[0].bias[3] = float("nan")
        assert path(*batch(model, samples, 1)).isnan().all()


# ------------------------------------------------------------------------------------------ what it takes


def raised(call, *inputs):
    with pytest.raises(Exception) as caught:
        call(*inputs)
    return type(caught.value), str(caught.value)


def faults(model):
    dense, indices, offsets = batch(model, 9, 2)
    high, low = indices.clone(), indices.clone()
    high[len(high) // 2] = 10**6
    low[3] = -1
    falling = offsets.clone()
    falling[5] = falling[6] + 1
    wrapping = offsets.clone()
    wrapping[4:7] = torch.tensor([2**62, -(2**63), -(2**62)])
    return {
        "id too high": (dense, high, offsets),
        "id negative": (dense, low, offsets),
        "offsets fall": (dense, indices, falling),
        "offsets wrap around": (dense, indices, wrapping),
        "offsets too short": (dense, indices, offsets[:-2]),
        "offsets end early": (dense, torch.cat([indices, indices]), offsets),
        "offsets begin late": (dense, indices, offsets + 1),
        "dense of other width": (dense[:, 1:], indices, offsets),
        "dense of other length": (dense[1:], indices, offsets),
        "dense of one dimension": (dense[0], indices, offsets),
        "dense in float64": (dense.double(), indices, offsets),
        "ids are floats": (dense, indices.float(), offsets),
        "ids of two dimensions": (dense, indices[None], offsets),
    }


@pytest.mark.parametrize("representation", ["table", "dhe", "select", "hybrid"])
@pytest.mark.parametrize("fault", list(faults(make())))
def test_bad_input_raises_what_the_model_raises(representation, fault):
    model = make(representation)
    inputs = faults(model)[fault]
    if representation == "dhe" and fault == "id too high":
        return check(model, mprec.compile_path(model)(*inputs), *inputs)  # any ID has an embedding
    with torch.no_grad():
        want = raised(lambda *x: model(*x).sigmoid(), *inputs)
    assert raised(mprec.compile_path(model), *inputs) == want
    kind = {"id": IdOutOfRangeError, "of": InvalidOffsetsError}.get(fault[:2])
    if kind and "floats" not in fault and "dimensions" not in fault:
        assert issubclass(want[0], kind)


def test_native_errors_name_the_first_fault():
    model = make()
    native = mprec.compile_path(model)._native
    for fault, kind, text in (
        ("id too high", IdOutOfRangeError, "is 1000000, not in the valid range"),
        ("id negative", IdOutOfRangeError, r"indices\[3\] .* is -1"),
        ("offsets fall", InvalidOffsetsError, r"offsets\[6\]"),
        ("offsets wrap around", InvalidOffsetsError, r"offsets\[4\] .* is 4611686018427387904"),
        ("offsets too short", InvalidOffsetsError, "expected 37 for 4 features of 9 samples, got 35"),
        ("dense of other width", ValueError, r"dense: expected shape \[9, 13\], got \[9, 12\]"),
    ):
        with pytest.raises(kind, match=text):
            mprec._C.run_program(native, *faults(model)[fault], 1)


def test_input_in_other_forms():
    model = make("hybrid")
    path = mprec.compile_path(model)
    dense, indices, offsets = batch(model, 21)
    want = path(dense, indices, offsets)
    wide = torch.randn(21, 20)
    wide[:, 2:15] = dense
    columns = dense.T.contiguous().T
    for inputs in (
        (wide[:, 2:15], indices, offsets),
        (columns, indices, offsets),
        (dense, indices.int(), offsets),
        (dense, indices, offsets.int()),
        (dense, indices.short(), offsets.short()),
        (dense, indices.repeat_interleave(2)[::2], offsets),
        (dense.requires_grad_(), indices, offsets),
    ):
        got = path(*inputs)
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)
        assert not got.requires_grad
    with torch.inference_mode():
        torch.testing.assert_close(path(dense.detach(), indices, offsets), want, rtol=0, atol=0)


# ------------------------------------------------------------------------------------------ what it watches


def changes():
    @torch.no_grad()
    def in_place(model):
        model.top[2].weight.mul_(-1)

    @torch.no_grad()
    def bias(model):
        model.bottom[0].bias.add_(0.5)

    def step(model):
        optimizer = torch.optim.SGD(model.parameters(), 0.5)
        model(*batch(model, 8)).sum().backward()
        optimizer.step()

    def through_data(model):
        model.top[0].weight.data = model.top[0].weight.data + 0.1

    def other_layer(model):
        model.top[2] = nn.Linear(*model.top[2].weight.shape[::-1])

    def other_mlp(model):
        model.bottom = copy.deepcopy(model.bottom)
        model.bottom[0].weight.data.neg_()

    @torch.no_grad()
    def table_in_place(model):
        model.embeddings.tables["f0"].weight.neg_()

    def table_replaced(model):
        model.embeddings.tables["f0"].weight = nn.Parameter(torch.randn(50, 16))

    def table_moved(model):
        model.embeddings.tables["f2"].weight.data = torch.randn(300, 16)

    def table_grown(model):
        model.embeddings.tables["f1"].weight = nn.Parameter(torch.randn(70, 16))

    def table_module(model):
        model.embeddings.tables["f0"] = copy.deepcopy(model.embeddings.tables["f1"])
        model.embeddings.tables["f0"].weight = nn.Parameter(torch.randn(50, 16))

    @torch.no_grad()
    def decoder(model):
        model.embeddings.dhe["f3"].decoder[0].weight.neg_()

    @torch.no_grad()
    def coefficients(model):
        model.embeddings.dhe["f2"].coefficients.copy_(model.embeddings.dhe["f3"].coefficients.flip(1))

    def collection(model):
        model.embeddings = QuantizedEmbeddingBagCollection(copy.deepcopy(model.embeddings), "int4")

    @torch.no_grad()
    def mixing(model):
        model._mixing.mul_(0.5)

    def state(model):
        other = make("hybrid", hybrid="mean")
        with torch.no_grad():
            for p in other.parameters():
                p.mul_(1.3)
        model.load_state_dict(other.state_dict())

    return {f.__name__: f for f in list(locals().values()) if callable(f)}


@pytest.mark.parametrize("change", list(changes()))
def test_changed_weights_are_used(change):
    model = make("hybrid", hybrid="mean")
    path = mprec.compile_path(model)
    inputs = batch(model, 30)
    before = path(*inputs)
    changes()[change](model)
    after = path(*inputs)
    assert not torch.allclose(before, after, atol=1e-7, rtol=0)
    check(model, after, *inputs)
    native = path._native
    assert torch.equal(path(*inputs), after)
    assert path._native is native, "packed again although nothing changed"


def test_a_model_that_is_no_longer_compiled_runs_as_before():
    model = make()
    path = mprec.compile_path(model)
    inputs = batch(model, 5)
    model.top = nn.Sequential(model.top, nn.Identity())
    model.bottom[1] = nn.Tanh()
    with torch.no_grad():
        torch.testing.assert_close(path(*inputs), model(*inputs).sigmoid())


def test_copies_and_pickles():
    model = make("hybrid")
    path = mprec.compile_path(model)
    inputs = batch(model, 12)
    want = path(*inputs)
    for other in (copy.deepcopy(path), pickle.loads(pickle.dumps(path))):
        assert other.model is not model
        assert torch.equal(other(*inputs), want)
        with torch.no_grad():
            other.model.top[0].bias.add_(1)
        assert not torch.equal(other(*inputs), want)
    assert torch.equal(path(*inputs), want)
    assert "DLRM" in repr(path)
    assert path.nbytes >= 4 * sum(p.numel() for m in (model.bottom, model.top) for p in m.parameters())


def test_concurrent_calls():
    model = make("hybrid")
    path = mprec.compile_path(model)
    work = [batch(model, samples) for samples in (1, 50, 133, 7)]
    want = [path(*inputs) for inputs in work]
    assert_same_concurrently(path, work, want, 50)


def test_python_runs_during_a_call():
    """With an endless switch interval another thread runs only if the call gives the lock up."""
    model = make(bottom=(512,), top=(512, 512))
    path = mprec.compile_path(model)
    inputs = batch(model, 4000, 1)
    path(*inputs)
    state = []

    def call():
        state.append("begun")
        path(*inputs)
        state.append("done")

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000)
    try:
        thread = threading.Thread(target=call)
        thread.start()
        while not state:
            time.sleep(0)
        seen = list(state)
        thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert seen == ["begun"]


# ------------------------------------------------------------------------------------------ what it refuses


class Loud(DLRM):
    def score(self, dense, embedded):
        return 2 * super().score(dense, embedded)


def refusals():
    def another(model):
        return nn.Linear(2, 2), "expected a DLRM, got Linear"

    def subclass(model):
        model.__class__ = Loud
        return model, r"Loud computes in its own way: it has a score\(\)"

    def hook(model):
        model.bottom.register_forward_hook(lambda *_: None)
        return model, "bottom: has forward hooks"

    def half(model):
        return model.half(), "expected a float32 tensor on the CPU, got Parameter of torch.float16"

    def meta(model):
        return model.to("meta"), "on meta"

    def dropout(model):
        model.top.insert(1, nn.Dropout())
        return model, r"top\[1\]: expected linear layers.* got Dropout"

    def module(model):
        model.top = nn.Linear(26, 1)
        return model, "top: expected a torch.nn.Sequential, got Linear"

    def activation(model):
        model.top.append(nn.Sigmoid())
        return model, "expected no activation after the last layer"

    def shape(model):
        model.top[0] = nn.Linear(5, 77)
        return model, "top: expected layers from 26 numbers to 1"

    def cache(model):
        model.embeddings = CachedEmbeddingBagCollection(make("dhe").embeddings, 1 << 14)
        nn.utils.parametrizations.weight_norm(model.embeddings.dhe["f1"].decoder[0])
        return model, "a decoder behind a cache has layers that cannot be packed"

    def mapped(model):
        model.embeddings = MappedEmbeddingBagCollection(make(modes=("sum",)).embeddings)
        return model, "got MappedEmbeddingBagCollection"

    def parametrised_rows(model):
        nn.utils.parametrize.register_parametrization(
            model.embeddings.tables["f2"], "weight", nn.Identity(), unsafe=True
        )
        return model, r"embeddings.tables.f2: its weight is parametrised, or not its own"

    def unseen(model):
        model.embeddings = MeanForUnseen(model.embeddings, {"f0": torch.tensor([1])})
        model.embeddings = MeanForUnseen(model.embeddings, {"f1": torch.tensor([1])})
        return model, "got MeanForUnseen"

    def float8(model):
        model = make("dhe")
        model.embeddings = QuantizedEmbeddingBagCollection(model.embeddings, decoders="float8")
        return model, "float8 decoders are for CUDA"

    def parametrised(model):
        nn.utils.parametrizations.weight_norm(model.top[0])
        return model, r"top\[0\]"

    def inference(model):
        with torch.inference_mode():
            return make(), "changes cannot be noticed"

    return {f.__name__: f for f in list(locals().values()) if callable(f)}


@pytest.mark.parametrize("reason", list(refusals()))
def test_what_is_not_compiled_says_why(reason):
    model, text = refusals()[reason](make())
    with pytest.raises(PathCompileError, match=text):
        mprec.compile_path(model)


def test_unknown_precision():
    with pytest.raises(ValueError, match=r"precision: expected one of float32.*, got 'float4'"):
        mprec.compile_path(make(), precision="float4")


def test_a_change_seen_once_is_remembered():
    """A look at a part of the weights finds what one at another part does not: the finding stays."""
    model = make()
    path = mprec.compile_path(model)
    native, inputs = path._native, batch(model, 5)
    old = model.top[0].weight
    model.top[0].weight = nn.Parameter(old.detach() + 1)
    assert mprec._C.run_program(native, *inputs, 1) is None
    model.top[0].weight = old
    assert native.changed()
    path(*inputs)
    assert path._native is not native
