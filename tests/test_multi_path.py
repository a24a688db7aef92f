"""One model with four paths: what each computes, what they share, and that training reaches all of them."""

import pytest
import torch

from mprec import checkpoint
from mprec.data import load
from mprec.models import DLRM, PATHS, MultiPathDLRM
from mprec.nn import (
    DheConfig,
    EmbeddingBagCollection,
    FeatureConfig,
    MappedEmbeddingBagCollection,
    MeanForUnseen,
    QuantizedEmbeddingBagCollection,
)
from mprec.nn.mapped import folded
from mprec.training import TrainOptions, evaluate, train_representations

DHE = DheConfig(k=16, hidden=(8,))


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def model():
    torch.manual_seed(0)
    features = [FeatureConfig(name, size, 4, dhe=DHE) for name, size in (("a", 9), ("b", 30), ("c", 5))]
    return MultiPathDLRM(features, 2, 4, bottom=(6,), top=(7,), select_largest=1)


@pytest.fixture
def batch():
    return load("synthetic:rows=6,vocabulary=9+30+5,dense=2,bag=3").batch(slice(None))


def score(model, batch):
    return model(batch.dense, batch.bags)


@pytest.mark.parametrize("path", PATHS)
def test_a_path_sees_its_own_vectors(model, batch, path):
    """Against a plain DLRM over tables that are given the vectors that the path should use."""
    plain = DLRM([FeatureConfig(f.name, f.num_embeddings, 4) for f in model.features], 2, 4, (6,), (7,))
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if ".dhe." not in k})
    for feature in model.features:
        table = model.embeddings.tables[feature.name].weight
        decoded = model.embeddings.dhe[feature.name].materialize(feature.num_embeddings)
        use_dhe = {"table": 0, "dhe": 1, "hybrid": 0.5, "select": float(feature.name == "b")}[path]
        with torch.no_grad():
            plain.embeddings.tables[feature.name].weight.copy_(torch.lerp(table, decoded, use_dhe))
    torch.testing.assert_close(score(model.path(path), batch), score(plain, batch))
    torch.testing.assert_close(model.logits(batch)[path], score(plain, batch))
    if path == "hybrid":
        torch.testing.assert_close(score(model, batch), score(plain, batch))


@pytest.mark.parametrize("path", PATHS)
def test_a_path_shares_parameters_and_holds_no_others(model, path):
    own = {id(p) for p in model.parameters()}
    shared = list(model.path(path).parameters())
    assert all(id(p) in own for p in shared)
    assert all(p.device.type == "cpu" for p in shared)
    kinds = {"table": (3, 0), "dhe": (0, 3), "hybrid": (3, 3), "select": (2, 1)}[path]
    embeddings = model.path(path).embeddings
    assert (len(embeddings.tables), len(embeddings.dhe)) == kinds


def test_without_dense_numbers():
    model = MultiPathDLRM([FeatureConfig("a", 9, 4, dhe=DHE)], 0, 4, top=(7,), select_largest=1)
    batch = load("synthetic:rows=6,vocabulary=9+3,dense=0").take(slice(0, 6))
    batch = batch.__class__("one", batch.columns[:1], batch.labels).batch(slice(None))
    for name, logits in model.logits(batch).items():
        torch.testing.assert_close(score(model.path(name), batch), logits)


def test_loss_is_the_mean_over_paths_with_the_hybrid_as_teacher(model, batch):
    logits = {name: value.double() for name, value in model.logits(batch).items()}
    teacher = logits["hybrid"].sigmoid()
    expected = 0
    for name in PATHS:
        p, target = logits[name].sigmoid(), batch.labels.double()
        if name != "hybrid":
            target = 0.7 * target + 0.3 * teacher
        expected = expected - (target * p.log() + (1 - target) * (1 - p).log()).mean() / 4
    torch.testing.assert_close(model.loss(batch, distillation=0.3).double(), expected, rtol=1e-5, atol=0)
    model.loss(batch).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_checkpoint_round_trip(model, batch, tmp_path):
    checkpoint.save(tmp_path / "model.pt", model, {"seed": 1})
    loaded, _ = checkpoint.load(tmp_path / "model.pt")
    assert isinstance(loaded, MultiPathDLRM)
    assert loaded.config() == model.config()
    for name in PATHS:
        torch.testing.assert_close(score(loaded.path(name), batch), score(model.path(name), batch))


def test_unknown_path(model):
    with pytest.raises(ValueError, match="path: expected one of hybrid, table, dhe, select, got 'tree'"):
        model.path("tree")


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("path", PATHS)
def test_hooks_on_the_embeddings_are_run_on_every_path(model, batch, path, late):
    """Registered before the path is made, or afterwards."""
    found = model.path(path) if late else None
    plain = score(model.path(path), batch)
    seen = []
    handles = [
        model.embeddings.register_forward_pre_hook(
            lambda module, given, named: seen.append("before"), with_kwargs=True
        ),
        model.embeddings.register_forward_hook(lambda module, given, out: 2 * out),
        model.embeddings.register_full_backward_hook(lambda module, got, given: seen.append("backward")),
    ]
    found = found or model.path(path)
    out = score(found, batch)
    torch.testing.assert_close(out, model.logits(batch)[path])
    assert not torch.allclose(out, plain)
    seen.clear()
    score(found, batch).sum().backward()
    assert seen == ["before", "backward"]
    for handle in handles:
        handle.remove()
    assert torch.equal(score(found, batch), plain)


def test_hooks_are_run_by_maps_that_are_folded(model, batch):
    model.embeddings = MappedEmbeddingBagCollection(model.embeddings, fresh=True)
    model.embeddings.register_forward_hook(lambda module, given, out: 2 * out)
    for name, logits in model.logits(batch).items():
        torch.testing.assert_close(score(model.path(name), batch), logits)
        torch.testing.assert_close(score(folded(model), batch), score(model, batch))


class Doubled(EmbeddingBagCollection):
    def forward(self, *batch):
        return 2 * super().forward(*batch)


def own_class(collection):
    doubled = Doubled(collection.features)
    doubled.load_state_dict(collection.state_dict())
    return doubled


def own_forward(collection):
    collection.forward = lambda *batch: 2 * EmbeddingBagCollection.forward(collection, *batch)
    return collection


@pytest.mark.parametrize(
    "change",
    [own_class, own_forward, QuantizedEmbeddingBagCollection, lambda c: MeanForUnseen(c, {"a": [1, 2]})],
)
@pytest.mark.parametrize("path", PATHS)
def test_embeddings_that_do_more_than_a_path_would_are_refused(model, change, path):
    model.embeddings = change(model.embeddings)
    with pytest.raises(TypeError, match=r"embeddings: expected an EmbeddingBagCollection of plain tables"):
        model.path(path)


def test_every_path_learns():
    dataset = load("synthetic:rows=20000,features=4,vocabulary=40,seed=1,dense=2")
    options = TrainOptions(epochs=4, batch_size=128, learning_rate=3e-3, table_learning_rate=1e-2)
    trained = train_representations(
        dataset, ["multi-path"], options, dim=8, dhe=DheConfig(k=128, hidden=(32,)), bottom=(16,), top=(16,)
    )["multi-path"]
    best = dataset.info["best_auc"]
    for name in PATHS:
        found = trained.metadata["paths"][name]["test"]
        assert found["auc"] > 0.5 + 0.75 * (best - 0.5)
        assert found == evaluate(trained.model.path(name), dataset.split()[2]).to_dict()
    assert trained.metadata["metrics"]["test"] == pytest.approx(trained.metadata["paths"]["hybrid"]["test"])
