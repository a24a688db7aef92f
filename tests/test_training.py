"""Training: it learns what can be learnt, stops early, is seeded, and fails with a reason."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch

from mprec import checkpoint
from mprec.cli import train as command
from mprec.data import ClickDataset, Column, load, movielens
from mprec.errors import TrainingError
from mprec.metrics import Metrics
from mprec.nn import DheConfig, FeatureConfig
from mprec.training import (
    MODELS,
    Keep,
    TrainOptions,
    build_model,
    evaluate,
    predict,
    train,
    train_representations,
)

SMALL = {"dim": 8, "dhe": DheConfig(k=256, hidden=(32,)), "bottom": (16,), "top": (16,)}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def dataset():
    return load("synthetic:rows=20000,features=4,vocabulary=40,seed=1,dense=2,bag=2")


@pytest.mark.parametrize("representation", MODELS)
def test_learns_the_planted_model(dataset, representation):
    """Most of the way from guessing to the best AUC that this log allows."""
    options = TrainOptions(epochs=4, batch_size=128, learning_rate=3e-3, table_learning_rate=1e-2)
    trained = train_representations(dataset, [representation], options, **SMALL)[representation]
    found, best = trained.metadata["metrics"]["test"]["auc"], dataset.info["best_auc"]
    assert found > 0.5 + 0.75 * (best - 0.5)
    assert found < best + 0.03
    losses = [epoch["loss"] for epoch in trained.result.history]
    assert losses[-1] < losses[0] < 0.7


@pytest.mark.parametrize("optimizer", ["adam", "rowwise_adagrad"])
def test_table_optimizers(dataset, optimizer):
    options = TrainOptions(epochs=4, batch_size=128, table_optimizer=optimizer, table_learning_rate=0.02)
    trained = train_representations(dataset, ["table"], options, **SMALL)["table"]
    assert trained.metadata["metrics"]["test"]["auc"] > 0.5 + 0.75 * (dataset.info["best_auc"] - 0.5)


def test_large_tables_take_the_optimizer_that_touches_a_batchs_rows():
    dataset = load("synthetic:rows=400,features=1,vocabulary=200000")
    before = build_model(dataset, "table", **SMALL).embeddings.tables["f0"].weight.detach().clone()
    options = TrainOptions(epochs=1, batch_size=100, mapped_tables=False)  # a map moves every row
    after = (
        train_representations(dataset, ["table"], options, **SMALL)["table"]
        .model.embeddings.tables["f0"]
        .weight
    )
    changed = set((after != before).any(dim=1).nonzero()[:, 0].tolist())
    seen = set(dataset.split()[0].columns[0].ids.tolist())
    assert changed <= seen
    assert len(changed) > len(seen) / 2


def test_predictions_and_metrics(dataset):
    model = build_model(dataset, "table", **SMALL)
    model.train()
    parts = np.concatenate([predict(model, dataset.take(slice(a, a + 7000))) for a in (0, 7000, 14000)])
    whole = predict(model, dataset, batch_size=64)
    np.testing.assert_allclose(parts, whole, rtol=1e-5)
    assert model.training
    batch = dataset.batch(slice(0, 10))
    with torch.no_grad():
        np.testing.assert_allclose(whole[:10], model(batch.dense, batch.bags).sigmoid(), rtol=1e-5)
    assert evaluate(model, dataset).accuracy == ((whole >= 0.5) == dataset.labels).mean()
    assert len(predict(model, dataset.take(slice(0, 0)))) == 0


def test_same_seed_same_weights_and_the_global_random_state_is_left_alone(dataset):
    state = torch.random.get_rng_state()
    results = []
    for seed in (0, 0, 1):
        options = TrainOptions(epochs=1, batch_size=512, seed=seed)
        results.append(
            train_representations(dataset, ["hybrid"], options, **SMALL)["hybrid"].model.state_dict()
        )
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
    assert not all(torch.equal(results[0][name], results[2][name]) for name in results[0])


@pytest.mark.parametrize("monitor", ["auc", "log_loss"])
def test_stops_early_and_keeps_the_best_epoch(dataset, monitor):
    """With labels that depend on nothing, validation quality stops improving at once."""
    labels = np.random.default_rng(0).integers(0, 2, len(dataset))
    noise = dataclasses.replace(dataset, labels=labels).take(slice(0, 3000))
    parts = noise.split((0.5, 0.5))
    model = build_model(noise, "table", **SMALL)
    events = []
    options = TrainOptions(epochs=50, batch_size=64, table_learning_rate=0.05, patience=2, monitor=monitor)
    result = train(model, *parts, options, events.append)
    assert len(result.history) == result.best_epoch + 2 < 50
    values = [epoch[monitor] for epoch in result.history]
    assert values[result.best_epoch - 1] == (max(values) if monitor == "auc" else min(values))
    assert evaluate(model, parts[1]) == result.valid
    assert [e.epoch for e in events if e.valid] == list(range(1, len(values) + 1))
    assert len(events) == 24 * len(values)
    assert (events[0].step, events[0].steps, events[0].epochs) == (1, 24, 50)


def test_a_loss_that_is_not_a_number_stops(dataset):
    model = build_model(dataset, "table", **SMALL)
    with torch.no_grad():
        model.top[-1].bias.fill_(float("nan"))
    with pytest.raises(TrainingError, match=r"the loss at epoch 1, step 1 of \d+ is nan: .*learning rates"):
        train(model, *dataset.split()[:2])
    model = build_model(dataset, "table", **SMALL)
    with pytest.raises(TrainingError, match=r"epoch 1.* is (nan|inf)"):
        train(model, *dataset.split()[:2], TrainOptions(learning_rate=1e30, batch_size=32))


def test_threads_are_torchs_again_afterwards(dataset):
    during = []
    model = build_model(dataset, "table", **SMALL)
    parts = dataset.take(slice(0, 600)).split((0.5, 0.5))
    options = TrainOptions(epochs=1, batch_size=100, threads=2)
    train(model, *parts, options, lambda event: during.append(torch.get_num_threads()))
    assert set(during) == {2}
    assert torch.get_num_threads() == 1


def test_bad_arguments(dataset):
    for name, value in (("epochs", 0), ("batch_size", 0), ("patience", 0), ("learning_rate", 0.0)):
        with pytest.raises(ValueError, match=f"{name}: expected"):
            TrainOptions(**{name: value})
    with pytest.raises(ValueError, match="table_optimizer: expected one of auto, adam, sparse_adam, "):
        TrainOptions(table_optimizer="sgd")
    with pytest.raises(ValueError, match="monitor: expected one of auc, log_loss, got 'loss'"):
        TrainOptions(monitor="loss")
    with pytest.raises(ValueError, match="representation: expected one of"):
        build_model(dataset, "bloom")
    model = build_model(dataset, "table", **SMALL)
    with pytest.raises(ValueError, match="train, valid: expected rows, got 20000 and 0"):
        train(model, dataset, dataset.take(slice(0, 0)))
    ones = ClickDataset("ones", [Column("a", 2, np.zeros(4, dtype=int))], labels=np.ones(4))
    with pytest.raises(ValueError, match="labels of one kind only"):
        train(build_model(ones, "table", **SMALL), ones, ones)


def parse(*arguments):
    import argparse

    parser = argparse.ArgumentParser()
    parser.add_argument("--json", action="store_true")
    command.add_arguments(parser)
    return parser.parse_args(arguments)


def test_command(tmp_path, capsys):
    path = tmp_path / "model.pt"
    arguments = (
        "--data synthetic:rows=2000,features=3,vocabulary=50 --representation select --epochs 2 --dim 8"
    )
    arguments += f" --dhe-k 32 --dhe-hidden 16 --top 8 --bottom 8,4 --seed 5 --output {path}"
    assert command.run(parse(*arguments.split(), "--json")) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert "epoch 2/2" in captured.err
    model, metadata = checkpoint.load(path)
    assert metadata["representation"] == result["representation"] == "select"
    assert metadata["seed"] == 5
    assert metadata["dataset"]["features"] == [["f0", 50], ["f1", 33], ["f2", 22]]
    assert [f.representation for f in model.features] == ["dhe", "dhe", "table"]
    assert model.features[0].dhe == DheConfig(k=32, hidden=(16,), seed=5)
    dataset = load("synthetic:rows=2000,features=3,vocabulary=50")
    test = dataset.split()[2]
    assert evaluate(model, test).to_dict() == pytest.approx(metadata["metrics"]["test"], rel=1e-5)
    assert command.run(parse(*arguments.split())) == 0
    assert capsys.readouterr().out.startswith("valid (200 rows): AUC ")


def test_command_checks_before_it_trains(tmp_path):
    arguments = ["--data", "synthetic", "--representation", "table", "--output"]
    with pytest.raises(ValueError, match="--output: there is no folder"):
        command.run(parse(*arguments, str(tmp_path / "no" / "model.pt")))
    with pytest.raises(ValueError, match="epochs: expected at least 1, got 0"):
        command.run(parse(*arguments, str(tmp_path / "model.pt"), "--epochs", "0"))
    with pytest.raises(SystemExit):
        parse(*arguments, "x", "--top", "8,zero")


def test_disk_and_output_are_looked_at_before_training(tmp_path, monkeypatch):
    arguments = ["--data", "synthetic:rows=500", "--representation", "table", "--output"]
    with pytest.raises(IsADirectoryError, match="a folder, a file is wanted"):
        command.run(parse(*arguments, str(tmp_path)))
    usage = shutil.disk_usage(tmp_path)._replace(free=10_000)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(OSError, match="MB will be written and 0 MB are free"):
        command.run(parse(*arguments, str(tmp_path / "model.pt")))
    assert not list(tmp_path.iterdir())


def test_rates_warm_up_and_decay():
    options = TrainOptions(warmup_steps=4, decay="linear")
    factors = [options.rate_factor(step, 14) for step in range(14)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    np.testing.assert_allclose(factors[4:], 1 - np.arange(10) / 10)
    cosine = [TrainOptions(decay="cosine").rate_factor(step, 10) for step in range(11)]
    np.testing.assert_allclose(cosine, 0.5 + 0.5 * np.cos(np.pi * np.arange(11) / 10), atol=1e-12)
    assert {TrainOptions().rate_factor(step, 5) for step in range(5)} == {1.0}


def test_training_uses_the_rates_and_clips(dataset):
    """A warm-up longer than training and a gradient clipped to nothing leave MLPs where they are."""
    parts = dataset.take(slice(0, 600)).split((0.5, 0.5))
    for arguments, tables_move in (({"warmup_steps": 10**12}, False), ({"clip_norm": 1e-30}, True)):
        model = build_model(dataset, "table", **SMALL)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        train(model, *parts, TrainOptions(epochs=1, batch_size=100, mapped_tables=False, **arguments))
        moved = {n for n, t in model.state_dict().items() if not torch.allclose(t, before[n], atol=1e-5)}
        tables = {name for name in before if name.startswith("embeddings.")}
        assert moved == (tables if tables_move else set())


def test_an_epoch_that_tells_less_than_chance_is_not_kept(dataset):
    """AUC alone would keep an epoch whose probabilities are useless."""
    parts = dataset.take(slice(0, 600)).split((0.5, 0.5))
    rates = {"auc": [0.6, 0.7, 0.9, 0.95, 0.65], "normalised_entropy": [1.2, 1.3, 0.99, 1.4, 0.98]}
    epochs = iter([dict(zip(rates, values, strict=True)) for values in zip(*rates.values(), strict=True)])

    def quality(model, part):
        return Metrics(log_loss=0.5, accuracy=0.5, calibration=1.0, **next(epochs))

    model = build_model(dataset, "table", **SMALL)
    told = []
    result = train(
        model,
        *parts,
        TrainOptions(epochs=5, batch_size=300),
        quality=quality,
        keep=Keep(best=lambda plain, so_far: told.append(so_far.best_epoch)),
    )
    assert told == [1, 2, 3]
    assert (result.best_epoch, len(result.history)) == (3, 5)


def test_a_plan_and_a_file_of_features_are_trained(tmp_path, capsys):
    data = "synthetic:rows=1000,features=3,vocabulary=50"
    features = [{"name": "f0", "num_embeddings": 50, "embedding_dim": 8}]
    features += [{"name": "f1", "num_embeddings": 33, "embedding_dim": 8, "representation": "dhe"}]
    features += [{"name": "f2", "num_embeddings": 22, "embedding_dim": 8, "representation": "hybrid"}]
    dhe = {"k": 16, "hidden": [8]}
    features[1]["dhe"] = features[2]["dhe"] = dhe
    rows = [{"feature": f["name"], "precision": "float32", "config": f} for f in features]
    rows[0]["precision"] = "int8"
    plan, own, output = tmp_path / "plan.json", tmp_path / "own.json", tmp_path / "model.pt"
    plan.write_text(json.dumps({"plans": {"here": [{"name": "accurate", "rows": rows}]}}))
    own.write_text(json.dumps({"f1": {"representation": "dhe", "dhe": dhe}, "*": "table"}))
    shape = ["--dim", "8", "--top", "8", "--bottom", "8", "--epochs", "1", "--data", data]
    log = tmp_path / "log.csv"
    shape += ["--output", str(output), "--log", str(log)]
    assert command.run(parse("--plan", str(plan), *shape)) == 0
    model, metadata = checkpoint.load(output)
    assert [f.to_dict() for f in model.features] == [FeatureConfig.from_dict(f).to_dict() for f in features]
    assert metadata["planned_precisions"] == {"f0": "int8"}
    assert "float32" in capsys.readouterr().err
    lines = log.read_text().splitlines()
    assert lines[0].startswith("representation,epoch,loss,seconds,auc,log_loss,accuracy,calibration,norm")
    assert lines[1].startswith("mixed,1,")
    assert command.run(parse("--features", str(own), *shape)) == 0
    model, _ = checkpoint.load(output)
    assert [f.representation for f in model.features] == ["table", "dhe", "table"]
    assert model.features[1].dhe.k == 16


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"nope": "table", "*": "table"}, "feature 'nope': synthetic has none of that name"),
        ({"f0": "table"}, "feature 'f1': no representation is given"),
        ({"*": {"num_embeddings": 7}}, "feature 'f0': num_embeddings: expected 40, got 7"),
        ({"*": {"embedding_dim": 16}}, "feature 'f0': embedding_dim: expected 8, got 16"),
        ({"*": "bloom"}, "feature 'f0': representation: expected one of"),
    ],
)
def test_bad_choices_of_features_are_named(dataset, chosen, message):
    with pytest.raises(ValueError, match=message):
        build_model(dataset, "mixed", chosen=chosen, **SMALL)


def test_bad_plans_are_named(tmp_path):
    file = tmp_path / "plan.json"
    arguments = ["--data", "synthetic:rows=500", "--output", str(tmp_path / "m.pt"), "--plan", str(file)]
    for content, message in (
        ("{", "is not JSON"),
        ('{"features": 1}', "is no plan of mprec plan --output"),
        ('{"plans": {"a": [{"name": "x", "rows": []}], "b": [{"name": "x", "rows": []}]}}', "a/x, b/x: say"),
    ):
        file.write_text(content)
        with pytest.raises(ValueError, match=message):
            command.run(parse(*arguments))


@pytest.mark.slow
@pytest.mark.skipif(
    movielens.find_installed() is None, reason="recbole, which carries the data, is not installed"
)
@pytest.mark.parametrize(("representation", "least"), [("table", 0.775), ("hybrid", 0.775)])
def test_movielens_quality(representation, least):
    """Well above 0.75, where item and user averages alone end up."""
    options = TrainOptions(epochs=3)
    dhe = DheConfig(k=64, hidden=(64,))
    trained = train_representations(load("movielens"), [representation], options, dhe=dhe)[representation]
    assert trained.metadata["metrics"]["test"]["auc"] > least
