"""Hot rows over a compact rest, against the vectors of both halves in float64."""

import numpy as np
import pytest
import torch

from mprec import checkpoint
from mprec.cache import materialize
from mprec.data import load
from mprec.errors import IdOutOfRangeError, InvalidOffsetsError
from mprec.models import compile_path
from mprec.nn import DheConfig, EmbeddingBagCollection, FeatureConfig, QuantizedEmbeddingBagCollection
from mprec.optim import split_parameters
from mprec.planner import MeasuredCosts, Measurement, Option, default_options, fit_effects
from mprec.training import TrainOptions, build_model, train_representations

DIM = 8
DHE = DheConfig(k=16, hidden=(8,))
FEATURES = [
    FeatureConfig("a", 50, DIM, "hot_dhe", DHE, mode="mean", parameters={"hot": 5}),
    FeatureConfig("b", 40, DIM),
    FeatureConfig("c", 30, DIM, "hot_low_rank", parameters={"hot": 4, "rank": 2}),
    FeatureConfig("d", 60, DIM, "hot_dhe", DHE, parameters={"hot": 100}),  # all are hot
]
HOT = {"a": [3, 7, 20, 33, 49], "c": [0, 1, 11, 29], "d": list(range(60))}


def collection(features=FEATURES, **options):
    torch.manual_seed(1)
    module = EmbeddingBagCollection(features, **options)
    for f in features:
        for part in f.parts:
            if part.name.startswith("hot"):
                module._members(part)[f.name].ids.copy_(torch.tensor(HOT[f.name]))
    return module


def batch(size=7, seed=0, features=FEATURES):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 4, (len(features) * size,), generator=generator)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    bounds = torch.tensor([f.num_embeddings for f in features]).repeat_interleave(size)
    ids = torch.rand(int(offsets[-1]), generator=generator) * bounds.repeat_interleave(lengths)
    return ids.long(), offsets


def vector(module, f, i):
    """Of one ID, in float64, by what the module holds."""
    part = module._members(f.parts[0])[f.name]
    if f.representation == "table":
        return part.weight[i].double()
    if i in HOT[f.name]:
        return part.hot.weight[HOT[f.name].index(i)].double()
    if f.representation == "hot_low_rank":
        return part.rest.projection.weight.double() @ part.rest.rows.weight[i].double()
    return part.rest(torch.tensor([i]), torch.tensor([0, 1]))[0].double()


def expected(module, ids, offsets, weights=None):
    size, features = (len(offsets) - 1) // len(module.features), module.features
    out = torch.zeros(size, len(features), DIM, dtype=torch.float64)
    for bag, (begin, end) in enumerate(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)):
        f = features[bag // size]
        for i in range(begin, end):
            weight = 1.0 if weights is None else weights[i].double()
            out[bag % size, bag // size] += weight * vector(module, f, int(ids[i]))
        if f.mode == "mean":
            out[bag % size, bag // size] /= max(end - begin, 1)
    return out.flatten(1)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_each_id_has_its_row_or_the_rests_vector(grad, weighted, dtype):
    module, (ids, offsets) = collection(), batch()
    weights = torch.rand(len(ids)) if weighted else None
    with torch.no_grad():
        want = expected(module, ids, offsets, weights)
    with torch.set_grad_enabled(grad):
        out = module(ids.to(dtype), offsets.to(dtype), weights)
    assert out.requires_grad == grad
    torch.testing.assert_close(out.detach().double(), want, rtol=1e-5, atol=1e-6)
    for size in (0, 1):  # nothing is hot, nothing is there
        few, ends = batch(size, features=FEATURES)
        assert module(few, ends).shape == (size, DIM * len(FEATURES))


def test_gradients():
    module, (ids, offsets) = collection(FEATURES[2:3], dtype=torch.float64), batch(3, features=FEATURES[2:3])
    weights = torch.rand(len(ids), dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in module.named_parameters()]

    def run(weights, *values):
        values = dict(zip(names, values, strict=True))
        return torch.func.functional_call(module, values, (ids, offsets, weights))

    inputs = [p.detach().clone().requires_grad_() for p in module.parameters()]
    assert torch.autograd.gradcheck(run, (weights, *inputs))


def test_sizes_and_parameters():
    a, _, c, d = FEATURES
    low_rank = 30 * 2 + DIM * 2
    assert c.num_parameters() == 4 * DIM + low_rank
    assert Option("hot_low_rank", c).nbytes == 4 * (4 * DIM + 8) + 4 * low_rank
    assert Option("hot_low_rank", c, precision="int8").nbytes == 4 * (8 + 16) + 30 * (2 + 8) + 4 * DIM * 2
    decoder = DHE.num_parameters(DIM)
    assert a.num_parameters() == 5 * DIM + decoder
    assert Option("hot_dhe", a).nbytes == 5 * (4 * DIM + 8) + 4 * decoder + 4 * 4 * DHE.k
    assert d.num_parameters() == 60 * DIM + decoder
    assert FeatureConfig("x", 160, DIM, "hot_dhe").num_parameters() > 10 * DIM  # a sixteenth
    module = collection()
    for f in FEATURES:
        held = sum(p.numel() for part in f.parts for p in module._members(part)[f.name].parameters())
        assert held == f.num_parameters()
    tables, _ = split_parameters(module)
    assert sorted(map(len, tables)) == [4, 5, 30, 40, 60]
    for name, wrong in (("hot_dhe", {"hot": 0}), ("hot_dhe", {"hot": 2.0}), ("hot_low_rank", {"rank": 0})):
        with pytest.raises(ValueError, match=r"'x': (hot|rank): "):
            FeatureConfig("x", 5, DIM, name, parameters=wrong)
    with pytest.raises(ValueError, match="hot_dhe has no 'rank'"):
        FeatureConfig("x", 5, DIM, "hot_dhe", parameters={"rank": 2})
    with pytest.raises(ValueError, match="hot_dhe pools by sum or mean"):
        FeatureConfig("x", 5, DIM, "hot_dhe", mode="max")
    assert FeatureConfig.from_dict(c.to_dict()) == c


def test_bad_inputs_name_the_feature():
    module, ids = collection(), torch.zeros(4, dtype=torch.int64)
    for at, bad, name in ((0, 50, "a"), (2, 30, "c"), (3, -1, "d")):
        wrong = ids.clone()
        wrong[at] = bad
        for grad in (False, True):
            with torch.set_grad_enabled(grad), pytest.raises(IdOutOfRangeError, match=repr(name)):
                module(wrong, torch.arange(5))
    with pytest.raises(InvalidOffsetsError):
        module(ids, torch.tensor([0, 1, 3, 2, 4]))


def test_as_plain_tables_and_quantised():
    module, (ids, offsets) = collection(), batch()
    with torch.no_grad():
        torch.testing.assert_close(materialize(module)(ids, offsets), module(ids, offsets))
        small = QuantizedEmbeddingBagCollection(module, tables="int8")
        rounded = collection()
        rounded.load_state_dict(module.state_dict())
        for name in ("a", "d"):
            rounded.hot_dhe[name].hot.weight.copy_(small.hot_dhe[name].hot.dequantize())
        rounded.hot_low_rank["c"].hot.weight.copy_(small.hot_low_rank["c"].hot.dequantize())
        rounded.hot_low_rank["c"].rest.rows.weight.copy_(small.hot_low_rank["c"].rest.rows.dequantize())
        rounded.tables["b"].weight.copy_(small.tables["b"].dequantize())
        torch.testing.assert_close(small(ids, offsets), rounded(ids, offsets), rtol=1e-4, atol=1e-5)
    assert small.nbytes < sum(p.nbytes for p in module.parameters())


def test_the_most_frequent_ids_of_training_are_hot():
    data = load("synthetic:rows=3000,features=2,vocabulary=200,seed=3")
    chosen = {"*": {"representation": "hot_dhe", "parameters": {"hot": 20}}}
    model = build_model(data, "mixed", chosen=chosen, dim=DIM, dhe=DHE)
    for name, size in data.features:
        hot = model.embeddings.hot_dhe[name].ids
        counts = data.counts(name)
        others = np.setdiff1d(np.arange(size), hot.numpy())
        assert len(hot.unique()) == 20
        assert bool((hot.diff() > 0).all())
        assert counts[hot].min() >= counts[others].max()
    few = data.take(slice(0, 5))  # fewer occur than have room
    ids = build_model(few, "mixed", chosen=chosen, dim=DIM, dhe=DHE).embeddings.hot_dhe[name].ids
    assert len(ids.unique()) == 20
    assert set(few.column(name).ids) <= set(ids.tolist())


@pytest.mark.parametrize("kind", ["hot_dhe", "hot_low_rank"])
def test_training_checkpoints_and_plans(tmp_path, kind):
    data = load("synthetic:rows=600")
    options = {"bottom": (8,), "top": (8,), "dhe": DHE}
    trained = train_representations(data, [kind], TrainOptions(epochs=1), **options)[kind]
    file = tmp_path / "hot.pt"
    checkpoint.save(file, trained.model, trained.metadata)
    loaded, metadata = checkpoint.load(file)
    assert metadata["representation"] == kind
    first = next(iter(data.batches(16)))
    with torch.no_grad():
        scores = [m(first.dense, first.indices, first.offsets) for m in (trained.model, loaded)]
    assert torch.equal(*scores)
    scores = compile_path(loaded)(first.dense, first.bags)
    with torch.no_grad():
        torch.testing.assert_close(scores, loaded(first.dense, first.bags).sigmoid())
    features = trained.model.features
    effects = fit_effects(features, [Measurement("table", 0.8), Measurement(f"{kind}[int8]", 0.79)])
    made = default_options(features, DHE, effects)[0]
    assert [option.config.representation for option in made] == ["table", kind]
    assert MeasuredCosts(batch_size=8, seconds=0.01).feature_seconds(made[1]) > 0


def test_compiles_with_a_break():
    module, (ids, offsets) = collection(), batch()
    torch.compiler.reset()
    compiled = torch.compile(module, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(ids, offsets), module(ids, offsets))
