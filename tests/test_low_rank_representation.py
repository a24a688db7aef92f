"""Low rank: a table of r columns and a projection that IDs share, against float64 formulas of torch's."""

import pytest
import torch
import torch.nn.functional as F

from mprec import checkpoint
from mprec.cache import materialize
from mprec.data import load
from mprec.errors import IdOutOfRangeError
from mprec.models import DLRM
from mprec.nn import (
    DheConfig,
    EmbeddingBagCollection,
    FeatureConfig,
    QuantizedEmbeddingBagCollection,
    with_representation,
)
from mprec.optim import split_parameters
from mprec.planner import Measurement, Option, default_options, fit_effects
from mprec.training import TrainOptions, train_representations

DIM = 8
FEATURES = [
    FeatureConfig("a", 30, DIM, "low_rank", mode="mean"),
    FeatureConfig("b", 40, DIM),
    FeatureConfig("c", 50, DIM, "low_rank", parameters={"rank": 3}),
    FeatureConfig("d", 60, DIM, "dhe", DheConfig(k=16, hidden=(8,))),
    FeatureConfig("e", 20, DIM, "low_rank"),
]


def batch(size=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 4, (len(FEATURES) * size,), generator=generator)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    bounds = torch.tensor([f.num_embeddings for f in FEATURES]).repeat_interleave(size)
    ids = torch.rand(int(offsets[-1]), generator=generator) * bounds.repeat_interleave(lengths)
    return ids.long(), offsets


def collection(features=FEATURES, **options):
    torch.manual_seed(1)
    return EmbeddingBagCollection(features, **options)


def expected(module, ids, offsets, weights=None):
    """Of each low-rank feature, in float64: the pooled rows times the projection."""
    size, found = (len(offsets) - 1) // len(module.features), {}
    for i, f in enumerate(module.features):
        if f.representation != "low_rank":
            continue
        ends = offsets[i * size : (i + 1) * size + 1]
        mine = slice(int(ends[0]), int(ends[-1]))
        part = module.low_rank._modules[f.name]
        vectors = (part.rows.weight.double() @ part.projection.weight.double().T)[ids[mine]]
        if weights is not None:
            vectors = vectors * weights[mine, None].double()
        pooled = torch.zeros(size, DIM, dtype=torch.float64)
        lengths = ends.diff()
        pooled = pooled.index_add(0, torch.arange(size).repeat_interleave(lengths), vectors)
        found[f.name] = pooled / lengths.clamp(min=1)[:, None] if f.mode == "mean" else pooled
    return found


def columns(module, out):
    return dict(zip([f.name for f in module.features], out.split(module.output_dims, dim=1), strict=True))


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_vectors_are_rows_times_the_projection(grad, weighted):
    module, (ids, offsets) = collection(), batch()
    weights = torch.rand(len(ids)) if weighted else None
    with torch.set_grad_enabled(grad):
        out = columns(module, module(ids, offsets, weights))
    for name, vectors in expected(module, ids, offsets, weights).items():
        torch.testing.assert_close(out[name].double(), vectors, rtol=1e-5, atol=1e-6)
    alone = collection([f for f in FEATURES if f.representation == "low_rank"][:1])
    with torch.no_grad():
        pooled = alone(torch.tensor([3, 4]), torch.tensor([0, 2]), out=torch.empty(1, DIM))
    rows = F.embedding_bag(torch.tensor([[3, 4]]), alone.low_rank["a"].rows.weight, mode="mean")
    torch.testing.assert_close(pooled, rows @ alone.low_rank["a"].projection.weight.T)


def test_gradients():
    module, (ids, offsets) = collection(dtype=torch.float64), batch(2)
    part = module.low_rank["c"]
    names = ("rows.weight", "projection.weight")

    def run(*values):
        with torch.nn.utils.stateless._reparametrize_module(part, dict(zip(names, values, strict=True))):
            return columns(module, module(ids, offsets))["c"]

    inputs = tuple(part.get_parameter(name).detach().clone().requires_grad_() for name in names)
    assert torch.autograd.gradcheck(run, inputs)


def test_sizes_and_parameters():
    f = FEATURES[0]
    rank = 2  # dim / 4
    assert f.num_parameters() == (30 + DIM) * rank
    assert Option("low_rank", f).nbytes == 4 * (30 + DIM) * rank
    assert Option("low_rank[int8]", f, precision="int8").nbytes == 30 * (rank + 8) + 4 * DIM * rank
    assert Option("low_rank", f).flops == rank + 2 * rank * DIM
    module = collection()
    for feature in FEATURES:
        parts = [module._members(part)[feature.name] for part in feature.parts]
        assert sum(p.numel() for part in parts for p in part.parameters()) == feature.num_parameters()
    tables, _ = split_parameters(module)
    assert {len(table) for table in tables} == {30, 40, 50, 20}  # its rows train as tables do
    for wrong in ({"rank": 0}, {"rank": DIM + 1}, {"rank": 2.0}, {"ranks": 2}):
        with pytest.raises(ValueError, match=r"'x': (rank|parameters): "):
            FeatureConfig("x", 5, DIM, "low_rank", parameters=wrong)
    with pytest.raises(ValueError, match="parameters: table has no 'rank'"):
        FeatureConfig("x", 5, DIM, parameters={"rank": 2})
    with pytest.raises(ValueError, match="low_rank pools by sum or mean"):
        FeatureConfig("x", 5, DIM, "low_rank", mode="max")
    assert FeatureConfig.from_dict(FEATURES[2].to_dict()) == FEATURES[2]


def test_bad_ids_name_the_feature():
    module = collection()
    with torch.no_grad(), pytest.raises(IdOutOfRangeError, match="'c'"):
        module(torch.tensor([0, 0, 50, 0, 0]), torch.arange(6))


@pytest.mark.parametrize("precision", ["float16", "bfloat16", "int8", "float32"])
def test_quantised_rows(precision):
    module, (ids, offsets) = collection(), batch()
    small = QuantizedEmbeddingBagCollection(module, tables=precision)
    out = columns(module, small(ids, offsets))
    exact = {f.name: part for f in FEATURES if (part := module.low_rank._modules.get(f.name))}
    with torch.no_grad():
        for name, part in exact.items():
            part.rows.weight.copy_(small.low_rank[name].rows.dequantize())
    for name, vectors in expected(module, ids, offsets).items():
        torch.testing.assert_close(out[name].double(), vectors, rtol=1e-4, atol=1e-5)
    assert small.nbytes > 0


def test_as_plain_tables():
    module, (ids, offsets) = collection(), batch()
    with torch.no_grad():
        torch.testing.assert_close(materialize(module)(ids, offsets), module(ids, offsets))


def test_compiles_without_a_break():
    module, (ids, offsets) = collection(), batch()
    torch.compiler.reset()
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(ids, offsets), module(ids, offsets))


def test_training_checkpoints_and_plans(tmp_path):
    data = load("synthetic:rows=600")
    trained = train_representations(data, ["low_rank"], TrainOptions(epochs=1), bottom=(8,), top=(8,))
    model = trained["low_rank"].model
    file = tmp_path / "low_rank.pt"
    checkpoint.save(file, model, trained["low_rank"].metadata)
    loaded, metadata = checkpoint.load(file)
    assert metadata["representation"] == "low_rank"
    assert loaded.state_dict().keys() == model.state_dict().keys()
    first = next(iter(data.batches(16)))
    with torch.no_grad():
        scores = [m(first.dense, first.bags) for m in (model, loaded)]
    assert torch.equal(*scores)
    tables = DLRM(with_representation(model.features, "table"), data.num_dense, 16)
    with pytest.raises(RuntimeError, match="is a low_rank in the state_dict, but a table"):
        tables.load_state_dict(model.state_dict())
    effects = fit_effects(model.features, [Measurement("table", 0.8), Measurement("low_rank[float16]", 0.79)])
    options = default_options(model.features, DheConfig(), effects)
    assert [option.config.representation for option in options[0]] == ["table", "low_rank"]
    assert options[0][1].precision == "float16"
