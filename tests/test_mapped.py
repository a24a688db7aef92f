"""Mapped tables: the map in training, its gradients, and the fold into plain rows, against float64."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.utils.prune

from mprec import checkpoint, optim, reference
from mprec.cache import CachedEmbeddingBagCollection, materialize
from mprec.data import load
from mprec.models import DLRM, MultiPathDLRM
from mprec.names import MODES
from mprec.nn import (
    DheConfig,
    EmbeddingBagCollection,
    FeatureConfig,
    MappedEmbeddingBagCollection,
    QuantizedEmbeddingBagCollection,
    folded,
    with_representation,
)
from mprec.training import TrainOptions, build_model, evaluate, predict, train

DHE = DheConfig(k=16, hidden=(8,))
FEATURES = [
    FeatureConfig("user", 30, 4),
    FeatureConfig("genres", 7, 4, mode="mean"),
    FeatureConfig("page", 1, 4, "dhe", DHE),
    FeatureConfig("item", 20, 6),
    FeatureConfig("both", 9, 4, "hybrid", DHE),
    FeatureConfig("keys", 5, 4, mode="mean"),
]
weighted = pytest.mark.parametrize("weighted", [False, True])


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def batch(features, size=6, seed=0, longest=3):
    """Bags of 0 to ``longest`` IDs, weights included: indices, offsets, per_sample_weights."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, longest + 1, (len(features), size), generator=g)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.flatten().cumsum(0)])
    ids = [
        torch.randint(0, f.num_embeddings, (int(n),), generator=g)
        for f, n in zip(features, lengths.sum(1), strict=True)
    ]
    indices = torch.cat(ids)
    return indices, offsets, torch.rand(len(indices), generator=g) * 4 - 2


def mapped_collection(features=FEATURES, dtype=torch.float32, seed=0):
    """With maps that are far from the identity."""
    torch.manual_seed(seed)
    mapped = MappedEmbeddingBagCollection(EmbeddingBagCollection(features, dtype=dtype))
    with torch.no_grad():
        for table in mapped.tables.values():
            table.weight.normal_()
        for linear in mapped.maps.values():
            linear.weight.normal_()
            linear.bias.normal_()
    return mapped


def expected(mapped, indices, offsets, psw):
    """Every row through its map, then pooled: the definition, in float64."""
    size = (len(offsets) - 1) // len(mapped.features)
    parts = []
    for t, f in enumerate(mapped.features):
        starts = offsets[t * size : (t + 1) * size + 1]
        ids = indices[starts[0] : starts[-1]]
        weights = None if psw is None else psw[starts[0] : starts[-1]]
        mode = MODES[f.mode]
        if f.has_table:
            linear = mapped.maps[f.name]
            rows = mapped.tables[f.name].weight.double() @ linear.weight.double().T + linear.bias.double()
            parts.append(reference.pool(rows[ids], starts - starts[0], mode, weights, True))
        if f.has_dhe:
            c, w, b = mapped.dhe[f.name].stack()
            options = f.dhe.family, f.dhe.activation, f.dhe.last_activation, mode
            parts.append(reference.dhe_bag(ids, starts - starts[0], c, w, b, *options, weights, True))
    return torch.cat(parts, dim=1)


@weighted
@pytest.mark.parametrize("grad", [False, True])
def test_is_the_map_of_every_row_then_pooled_and_so_is_the_fold(weighted, grad):
    mapped = mapped_collection()
    indices, offsets, psw = batch(FEATURES)
    psw = psw if weighted else None
    assert 0 in offsets.diff()
    want = expected(mapped, indices, offsets, psw)
    plain = mapped.fold()
    with torch.set_grad_enabled(grad):
        for module in (mapped, plain):
            got = module(indices, offsets, psw)
            assert got.dtype == torch.float32
            assert got.requires_grad == grad
            torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    assert type(plain) is EmbeddingBagCollection
    assert set(plain.state_dict()) == set(EmbeddingBagCollection(FEATURES).state_dict())


def test_out_takes_the_result_without_gradients():
    mapped = mapped_collection()
    indices, offsets, _ = batch(FEATURES)
    with torch.no_grad():
        out = torch.empty(6, sum(mapped.output_dims))
        assert mapped(indices, offsets, out=out) is out
        assert torch.equal(out, mapped(indices, offsets))


def test_the_identity_changes_nothing_at_first():
    plain = EmbeddingBagCollection(FEATURES)
    state = torch.random.get_rng_state()
    mapped = MappedEmbeddingBagCollection(plain)
    assert torch.equal(state, torch.random.get_rng_state())
    indices, offsets, psw = batch(FEATURES)
    torch.testing.assert_close(mapped(indices, offsets, psw), plain(indices, offsets, psw))
    for name, table in plain.tables.items():
        assert mapped.tables[name] is table
    fresh = MappedEmbeddingBagCollection(plain, fresh=True)
    assert not torch.allclose(fresh(indices, offsets), plain(indices, offsets))
    torch.testing.assert_close(fresh.fold()(indices, offsets), fresh(indices, offsets))


@weighted
@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_gradients(weighted, mode):
    features = [FeatureConfig("a", 5, 3, mode=mode), FeatureConfig("b", 4, 3, mode=mode)]
    mapped = mapped_collection(features, torch.float64)
    indices, offsets, psw = batch(features, size=3)
    psw = psw.double().requires_grad_() if weighted else None
    parameters = list(mapped.parameters())
    assert len(parameters) == 6

    def call(*_):
        return mapped(indices, offsets, psw)

    inputs = [*parameters, psw] if weighted else parameters
    assert torch.autograd.gradcheck(call, inputs, atol=1e-6)


@pytest.mark.parametrize(
    ("ours", "torchs"),
    [
        (lambda p: optim.SGD(p, lr=0.1), lambda p: torch.optim.SGD(p, lr=0.1)),
        (lambda p: optim.Adam(p, lr=0.01), lambda p: torch.optim.SparseAdam(p, lr=0.01)),
    ],
    ids=["sgd", "adam"],
)
def test_optimizers_that_update_rows_in_the_backward_pass(ours, torchs):
    """Steps of the fused optimizer are those of torch's on sparse gradients, the maps' by SGD beside it."""
    features = FEATURES[:2] + FEATURES[3:4]
    models = [mapped_collection(features), mapped_collection(features)]
    models[1].sparse = True
    optimizers = []
    for model, make in zip(models, (ours, torchs), strict=True):
        tables, rest = optim.split_parameters(model)
        assert len(tables) == 3
        optimizers.append((make(tables), torch.optim.SGD(rest, lr=0.01)))
    before = copy.deepcopy(models[0].state_dict())
    for step in range(5):
        indices, offsets, psw = batch(features, seed=step)
        for model, pair in zip(models, optimizers, strict=True):
            for optimizer in pair:
                optimizer.zero_grad()
            model(indices, offsets, psw).square().mean().backward()
            for optimizer in pair:
                optimizer.step()
    state = models[1].state_dict()
    for name, tensor in models[0].state_dict().items():
        assert not torch.equal(tensor, before[name]), name
        torch.testing.assert_close(tensor, state[name], rtol=1e-4, atol=1e-5)


def test_max_is_refused():
    collection = EmbeddingBagCollection([FeatureConfig("a", 5, 3), FeatureConfig("b", 5, 3, mode="max")])
    with pytest.raises(ValueError, match="feature 'b': a map does not commute with mode 'max'"):
        MappedEmbeddingBagCollection(collection)


def test_whatever_reads_tables_reads_the_folded_ones():
    """A quantised, cached, materialised or saved model never leaves the map out."""
    mapped = mapped_collection()
    indices, offsets, _ = batch(FEATURES)
    with torch.no_grad():
        want = mapped(indices, offsets)
        copies = {
            "quantised": QuantizedEmbeddingBagCollection(mapped, tables="float32"),
            "cached": CachedEmbeddingBagCollection(mapped, 1 << 12),
            "mapped again": MappedEmbeddingBagCollection(mapped),
        }
        for name, collection in copies.items():
            torch.testing.assert_close(collection(indices, offsets), want, msg=name, rtol=1e-4, atol=1e-4)
    rows = materialize(mapped, ["both"]).tables["both"].weight
    torch.testing.assert_close(rows[:, :4], mapped.fold().tables["both"].weight)


def test_a_saved_model_is_one_of_plain_tables(tmp_path):
    features = with_representation([FeatureConfig("a", 5, 4), FeatureConfig("b", 6, 4)], "table")
    model = DLRM(features, 0, 4, (8,), (8,))
    plain = model.embeddings
    model.embeddings = mapped_collection(features)
    checkpoint.save(tmp_path / "m.pt", model, {})
    loaded, _ = checkpoint.load(tmp_path / "m.pt")
    indices, offsets, _ = batch(features)
    dense = torch.zeros(6, 0)
    with torch.no_grad():
        torch.testing.assert_close(loaded(dense, indices, offsets), model(dense, indices, offsets))
    twin = folded(model)
    assert twin.top is model.top
    assert type(twin.embeddings) is type(plain)
    assert isinstance(model.embeddings, MappedEmbeddingBagCollection)
    assert folded(twin) is twin


def test_paths_of_a_multi_path_model_with_maps():
    features = [FeatureConfig("a", 5, 4, dhe=DHE), FeatureConfig("b", 6, 4, dhe=DHE)]
    model = MultiPathDLRM(features, 0, 4, (8,), (8,))
    model.embeddings = mapped_collection(model.features)
    rows = batch(features)[:2]
    with torch.no_grad():
        one = model.path("table").embeddings(*rows)
        both = model.embeddings(*rows).view(6, 2, 2, 4)[:, :, 0].flatten(1)
    torch.testing.assert_close(one, both)


@pytest.fixture(scope="module")
def dataset():
    return load("synthetic:rows=6000,features=3,vocabulary=40,seed=1,dense=2,bag=2")


@pytest.mark.parametrize("optimizer", ["adam", "sparse_adam", "rowwise_adagrad"])
def test_training_leaves_plain_tables_of_the_quality_that_was_measured(dataset, optimizer):
    parts = dataset.split()
    model = build_model(dataset, "table", dim=8, bottom=(16,), top=(16,))
    collection = model.embeddings
    keys = list(model.state_dict())
    options = TrainOptions(epochs=3, batch_size=128, mapped_tables=True, table_optimizer=optimizer)
    result = train(model, *parts[:2], options)
    assert model.embeddings is collection
    assert list(model.state_dict()) == keys
    assert evaluate(model, parts[1]) == result.valid
    assert result.history[-1]["loss"] < result.history[0]["loss"]
    unmapped = build_model(dataset, "table", dim=8, bottom=(16,), top=(16,))
    options = dataclasses.replace(options, mapped_tables=False)
    train(unmapped, *parts[:2], options)
    tables = [m.embeddings.tables["f0"].weight.detach().numpy() for m in (model, unmapped)]
    assert not np.allclose(*tables)


def test_a_training_that_fails_leaves_plain_tables(dataset):
    model = build_model(dataset, "table", dim=8)
    collection = model.embeddings

    def stop(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(model, *dataset.split()[:2], TrainOptions(mapped_tables=True), stop)
    assert model.embeddings is collection


def test_mapped_tables_need_a_collection(dataset):
    with pytest.raises(ValueError, match="mapped_tables: expected a model of an EmbeddingBagCollection"):
        train(torch.nn.Linear(2, 2), *dataset.split()[:2], TrainOptions(mapped_tables=True))


@pytest.mark.parametrize("mode", ["sum", "max"])
def test_by_default_tables_are_mapped_where_they_can_be(dataset, mode):
    features = [FeatureConfig(name, size, 8, mode=mode) for name, size in dataset.features]
    model = DLRM(features, dataset.num_dense, 8, (8,), (8,))
    trained, measured = set(), []

    def quality(plain, part):
        measured.append(type(plain.embeddings))
        return evaluate(plain, part)

    options = TrainOptions(epochs=1, batch_size=512)
    train(model, *dataset.split()[:2], options, lambda event: trained.add(type(model.embeddings)), quality)
    assert trained == {MappedEmbeddingBagCollection if mode == "sum" else EmbeddingBagCollection}
    assert measured == [EmbeddingBagCollection]
    if mode == "max":
        with pytest.raises(ValueError, match="does not commute with mode 'max'"):
            train(model, *dataset.split()[:2], TrainOptions(mapped_tables=True))


@pytest.mark.parametrize("how", ["prune", "weight_norm", "parametrize"])
@torch.no_grad()
def test_maps_that_torch_makes_anew_are_followed(how):
    """Pruning and weight norm stand other parameters for the weight: it is that of their values now."""
    mapped, (indices, offsets, psw) = mapped_collection(), batch(FEATURES)
    for linear in mapped.maps.values():
        if how == "prune":
            torch.nn.utils.prune.l1_unstructured(linear, "weight", amount=0.5)
        elif how == "weight_norm":
            torch.nn.utils.parametrizations.weight_norm(linear)
        else:
            torch.nn.utils.parametrize.register_parametrization(linear, "weight", torch.nn.Tanh())
    for name, parameter in mapped.maps.named_parameters():
        if name.endswith(("weight_orig", "original", "original1")):
            parameter.mul_(1.5).add_(0.25)
    twin = mapped_collection()
    for name, linear in mapped.maps.items():
        weight = linear.weight_orig * linear.weight_mask if how == "prune" else linear.weight
        twin.maps[name].weight.copy_(weight)
    want = expected(twin, indices, offsets, psw)
    for module in (mapped, mapped.fold()):
        torch.testing.assert_close(module(indices, offsets, psw).double(), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("change", ["hook", "no bias", "forward"])
def test_maps_that_do_more_than_map_are_refused(change):
    mapped, arguments = mapped_collection(), batch(FEATURES)
    if change == "hook":
        mapped.maps["user"].register_forward_hook(lambda module, inputs, out: 2 * out)
    elif change == "no bias":
        mapped.maps["user"] = torch.nn.Linear(4, 4, bias=False)
    else:
        mapped.maps["user"].forward = lambda rows: rows
    for use in (lambda: mapped(*arguments), mapped.fold):
        with pytest.raises(TypeError, match="maps: feature 'user'"):
            use()


def test_a_trained_model_goes_on_from_where_it_is(dataset):
    """Maps start at the identity, unless the model is said to be fresh."""
    parts = dataset.split()
    slow = TrainOptions(epochs=1, learning_rate=1e-9, table_learning_rate=1e-9, mapped_tables=True)
    for fresh in (False, True):
        model = build_model(dataset, "table", dim=8, bottom=(8,), top=(8,))
        with torch.no_grad():
            for table in model.embeddings.tables.values():
                table.weight.normal_()
        before = predict(model, parts[1])
        state = torch.random.get_rng_state()
        train(model, *parts[:2], slow, fresh=fresh)
        assert torch.equal(state, torch.random.get_rng_state())
        assert np.allclose(predict(model, parts[1]), before, atol=1e-4) == (not fresh)
