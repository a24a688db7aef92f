"""Deriving: each part against its definition, then whole models, bundles and the commands that take them."""

import json

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from mprec import checkpoint, metrics
from mprec.cli import main
from mprec.data import load
from mprec.derive import derive, distil, kept, low_rank, sensitivity
from mprec.derive.distil import shape_for
from mprec.derive.factorise import code_limits
from mprec.derive.quality import influence
from mprec.derive.recipes import Source, make
from mprec.derive.sensitivity import square_root
from mprec.dispatch import Profile
from mprec.errors import CheckpointError
from mprec.models import DLRM, compile_path
from mprec.nn import (
    DheConfig,
    EmbeddingBagCollection,
    FeatureConfig,
    LowRankEmbeddingBagCollection,
    MappedEmbeddingBagCollection,
)
from mprec.paths import Scorer, bundle, paths_from_checkpoints, sampler, with_cache
from mprec.planner import Candidate, Option, front
from mprec.serving.process_executor import ProcessExecutor
from mprec.training import TrainOptions, evaluate, predict, train_representations

SPEC = "synthetic:rows=5000,features=3,vocabulary=300,seed=1,dense=2,bag=2"
MODEL = {"dim": 8, "dhe": DheConfig(k=32, hidden=(16,)), "bottom": (8,), "top": (8,)}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def dataset():
    return load(SPEC)


@pytest.fixture(scope="module")
def trained(dataset):
    options = TrainOptions(epochs=2, batch_size=128, threads=1)
    return train_representations(dataset, ["table", "dhe", "hybrid", "multi-path"], options, **MODEL)


# ------------------------------------------------------------------------------------------------- quality


def test_values_are_those_of_metrics_and_auc_errors_are_delongs():
    rng = np.random.default_rng(0)
    labels = rng.random(300) < 0.4
    scores = np.clip(rng.normal(0.4 + 0.1 * labels, 0.2), 0, 1).round(2)  # with ties
    found = influence(labels, scores)
    for name in ("auc", "log_loss", "accuracy"):
        assert found[name].estimate.value == pytest.approx(getattr(metrics, name)(labels, scores))
    assert found["auc"].value == pytest.approx(roc_auc_score(labels, scores))
    # DeLong's variance by its definition: structural components over all pairs.
    above, below = scores[labels], scores[~labels]
    wins = (above[:, None] > below) + 0.5 * (above[:, None] == below)
    variance = wins.mean(1).var(ddof=1) / len(above) + wins.mean(0).var(ddof=1) / len(below)
    assert found["auc"].estimate.error == pytest.approx(variance**0.5)
    right = (scores >= 0.5) == labels
    assert found["accuracy"].estimate.error == pytest.approx(right.std(ddof=1) / 300**0.5)


def test_differences_are_paired():
    rng = np.random.default_rng(1)
    labels = rng.random(4000) < 0.5
    scores = np.clip(rng.normal(0.4 + 0.2 * labels, 0.2), 0, 1)
    other = np.clip(scores + rng.normal(0, 0.01, 4000), 0, 1)
    one, two = influence(labels, scores), influence(labels, other)
    for name in one:
        difference = two[name].minus(one[name])
        assert difference.value == pytest.approx(two[name].value - one[name].value)
        assert 0 < difference.error < one[name].estimate.error * 0.6
        assert one[name].minus(one[name]).error == 0
    # Against the spread over resamples.
    drawn = []
    for _ in range(300):
        rows = rng.integers(0, 4000, 4000)
        drawn.append(metrics.auc(labels[rows], other[rows]) - metrics.auc(labels[rows], scores[rows]))
    assert two["auc"].minus(one["auc"]).error == pytest.approx(np.std(drawn), rel=0.25)


def test_samples_that_tell_nothing_are_refused():
    with pytest.raises(ValueError, match="at least two samples of each kind, got 1 positive of 5"):
        influence([1, 0, 0, 0, 0], np.full(5, 0.5))
    with pytest.raises(ValueError, match="expected numbers, got NaN"):
        influence([1, 1, 0, 0], [0.5, np.nan, 0.1, 0.2])
    with pytest.raises(ValueError, match="vectors of one length"):
        influence([1, 1, 0, 0], [0.5, 0.1])
    a, b = influence([1, 1, 0, 0], [0.1] * 4), influence([1, 1, 0, 0, 0], [0.1] * 5)
    with pytest.raises(ValueError, match="different samples"):
        a["auc"].minus(b["auc"])


def test_front():
    def candidate(name, quality, nbytes, *ms):
        return Candidate(name, quality, nbytes, dict(zip((1, 128), ms, strict=True)))

    found = front(
        [
            candidate("table", 0.80, 1000, 1.0, 2.0),
            candidate("smaller", 0.80, 500, 1.04, 2.0),  # as fast, but for noise
            candidate("worse", 0.79, 500, 1.1, 2.2),
            candidate("tiny", 0.70, 10, 9.0, 9.0),
            candidate("quick", 0.70, 900, 0.5, 3.0),
            candidate("twin", 0.70, 10, 9.0, 9.0),
        ]
    )
    assert found == {
        "table": "smaller",
        "smaller": None,
        "worse": "smaller",
        "tiny": None,
        "quick": None,
        "twin": "tiny",
    }


# --------------------------------------------------------------------------------------------- sensitivity


def test_sensitivity_is_the_fisher_information_of_the_pooled_vectors(dataset, trained):
    model = trained["table"].model
    few = dataset.take(slice(0, 50))
    found = sensitivity(model, few)
    batch = few.batch(slice(None))
    pooled = model.embeddings(batch.bags).detach()
    expected = torch.zeros(len(model.features), 8, 8, dtype=torch.float64)
    for row, dense in zip(pooled, batch.dense, strict=True):
        vector = row.clone().requires_grad_()
        logit = model.score(dense[None], vector[None])[0]
        (slope,) = torch.autograd.grad(logit, vector)
        p = float(logit.detach().sigmoid())
        for part, g in zip(expected, slope.double().view(-1, 8), strict=True):
            part += p * (1 - p) * torch.outer(g, g) / 50
    for (name, matrix), want in zip(found.items(), expected, strict=True):
        torch.testing.assert_close(matrix, want, rtol=1e-4, atol=1e-9, msg=name)


def test_square_root():
    g = torch.Generator().manual_seed(0)
    factor = torch.randn(6, 3, generator=g, dtype=torch.float64)  # of rank 3
    matrix = factor @ factor.T
    root, inverse = square_root(matrix, ridge=0.01)
    want = matrix + 0.01 * matrix.trace() / 6 * torch.eye(6, dtype=torch.float64)
    torch.testing.assert_close(root @ root, want)
    torch.testing.assert_close(root @ inverse, torch.eye(6, dtype=torch.float64))
    root, inverse = square_root(torch.zeros(2, 2, dtype=torch.float64))
    torch.testing.assert_close(root, torch.eye(2, dtype=torch.float64))


# ---------------------------------------------------------------------------------- low rank, distillation


def rows_and_counts(n=60, dim=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    rows = torch.randn(n, dim, generator=g) @ torch.randn(dim, dim, generator=g) + 2
    return rows, (torch.rand(n, generator=g) ** 3 * 100).floor()


def loss(rows, table, counts, metric):
    error = rows.double() - (table.codes @ table.projection + table.bias).double()
    return float((counts.double()[:, None] * error * (error @ metric)).sum())


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_low_rank_is_the_best_there_is(rank):
    """As good as the weighted SVD, and better than it after any small change."""
    rows, counts = rows_and_counts()
    g = torch.Generator().manual_seed(5)
    factor = torch.randn(6, 6, generator=g, dtype=torch.float64)
    for metric in (None, factor @ factor.T):
        table = low_rank(rows, counts, rank, metric)
        level = torch.eye(6, dtype=torch.float64) if metric is None else metric
        root, _ = square_root(level)
        centred = rows.double() - (counts.double() @ rows.double()) / counts.double().sum()
        singular = torch.linalg.svdvals(counts.double().sqrt()[:, None] * (centred @ root))
        found = loss(rows, table, counts, root @ root)
        assert found == pytest.approx(float(singular[rank:].square().sum()), rel=1e-4)
        for _ in range(20):
            moved = table._replace(
                projection=table.projection + 0.01 * torch.randn(table.projection.shape, generator=g)
            )
            assert loss(rows, moved, counts, root @ root) > found


def test_low_rank_of_full_rank_is_exact_and_more_is_zeros():
    rows, counts = rows_and_counts()
    for rank in (6, 8):
        table = low_rank(rows, torch.zeros_like(counts), rank)
        torch.testing.assert_close(table.codes @ table.projection + table.bias, rows, rtol=1e-4, atol=1e-4)
        assert table.codes.shape == (60, rank)
    one = low_rank(rows[:1], torch.tensor([3.0]), 2)  # a vocabulary of one ID
    torch.testing.assert_close(one.codes @ one.projection + one.bias, rows[:1])
    with pytest.raises(ValueError, match="rank: expected at least 1"):
        low_rank(rows, counts, 0)
    with pytest.raises(ValueError, match="counts: expected 60 counts >= 0"):
        low_rank(rows, counts[:5], 1)


def test_code_limits_are_of_ids_that_occur():
    rows, counts = rows_and_counts()
    rows[0] *= 50
    counts[0] = 0
    table = low_rank(rows, counts, 2)
    limits = code_limits(table, counts)
    assert (limits < table.codes.abs().amax(0)).all()
    assert torch.equal(limits, table.codes[counts > 0].abs().amax(0))


@pytest.mark.parametrize("with_metric", [False, True])
def test_distilled_decoder_is_near_the_rows(with_metric):
    rows, counts = rows_and_counts(40, 4)
    metric = None
    if with_metric:
        metric = torch.diag(torch.tensor([100.0, 1.0, 1.0, 1.0], dtype=torch.float64))
    state = torch.random.get_rng_state()
    config = DheConfig(k=64, hidden=(32,), last_activation="sigmoid")
    shares = []
    made = distil(rows, counts + 1, config, metric=metric, steps=600, progress=shares.append)
    assert torch.equal(state, torch.random.get_rng_state())
    assert shares[-1] == 1
    assert made.config.last_activation == "none"
    error = made.materialize(40) - rows
    explained = 1 - error.square().sum(0) / (rows - rows.mean(0)).square().sum(0)
    assert (explained > 0.9).all()
    again = distil(rows, counts + 1, config, metric=metric, steps=600)
    assert all(torch.equal(a, b) for a, b in zip(made.parameters(), again.parameters(), strict=True))
    with pytest.raises(ValueError, match="rows: expected finite"):
        distil(rows / 0, counts, config)


def test_distilled_decoder_starts_at_the_mean_and_spread():
    rows, counts = rows_and_counts(200, 4)
    start = distil(rows, counts + 1, DheConfig(k=64, hidden=(32,)), steps=1).materialize(200)
    assert (start.mean(0) - rows.mean(0)).abs().max() < rows.std() / 2
    # A metric's root and the row's own directions apart, the spread is the rows'.
    assert 0.7 < float((start - start.mean(0)).std() / (rows - rows.mean(0)).std()) < 1.4


# ------------------------------------------------------------------------------------------- whole models


def test_recipes_of_a_table_model(dataset, trained, tmp_path):
    model, metadata = trained["table"].model, trained["table"].metadata
    parts = dataset.split()
    said = []
    found = derive(model, metadata, parts, seconds=0, say=said.append)
    names = [each.name for each in found]
    expected = ["table", "table[float16]", "table[int8]", "table[int4]"]
    both = ["table[int8]/int8", "low_rank:2[int8]/int8"]
    assert names[-2:] == both
    rest = [n for n in names[:-2] if n != "dhe"]
    assert [n for n in rest if "low" not in n] == ["table", "table/int8", *expected[1:]]
    assert [n for n in rest if "low" in n] == [f"low_rank:{r}[int8]" for r in (4, 2, 1)]
    assert ("dhe" in names) == (not said)
    by_name = {each.name: each for each in found}
    assert by_name["table"].quality["test"]["auc"].value == evaluate(model, parts[2]).auc
    assert by_name["table"].difference["test"]["auc"].error == 0
    sizes = [by_name[n].nbytes for n in (*expected, "low_rank:2[int8]")]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] == sum(8 * 4 * size for _, size in dataset.features)
    for each in found:
        assert set(each.seconds) == {1, 128, 2048}
        assert each.model.top is model.top
        assert abs(each.difference["valid"]["auc"].value) < 0.1
    front = kept(found)
    assert {member.name for member in front} == {e.name for e in found if e.dominated_by is None}
    json.dumps([each.facts() for each in found])


@pytest.mark.parametrize(
    ("kind", "recipes"),
    [
        ("dhe", ["table", "table[int8]", "low_rank:2"]),
        ("hybrid", ["table", "table[int4]", "low_rank:4[int8]"]),
        ("multi-path", ["table[float16]", "low_rank:8[float16]"]),
    ],
)
def test_models_with_decoders(dataset, trained, kind, recipes):
    """Decoders decoded into rows answer as the model does, hybrids' two vectors and means included."""
    model, metadata = trained[kind].model, trained[kind].metadata
    found = derive(model, metadata, dataset.split(), recipes=recipes, seconds=0)
    names = [each.name for each in found]
    originals = ["hybrid", "table", "dhe", "select"] if kind == "multi-path" else [kind]
    assert names == originals + [r for r in recipes if r not in originals]
    best = max(found[: len(originals)], key=lambda each: each.quality["valid"]["auc"].value)
    test = dataset.split()[2]
    exact = predict(best.model, test)
    loose = {"table": 1e-5, "table[float16]": 1e-2, "low_rank:8[float16]": 1e-2}
    for each in found[len(originals) :]:
        close = np.abs(predict(each.model, test) - exact).max()
        assert close < loose.get(each.name, 0.5), each.name
    assert found[-1].difference["test"]["auc"].value != 0


def test_dense_layers_in_fewer_bits(dataset, tmp_path):
    """Each is a path of its own with the quality of what it answers, and is served so from a bundle."""
    torch.manual_seed(0)
    features = [
        FeatureConfig(name, size, 8, "hybrid", DheConfig(k=32, hidden=(16,)))
        for name, size in dataset.features
    ]
    model = DLRM(features, 2, 8, (64,), (64, 40))
    recipes = ["hybrid/int8", "hybrid/bfloat16", "table[int8]/int8"]
    found = derive(model, {"representation": "hybrid"}, dataset.split(), recipes=recipes, seconds=0)
    assert [each.name for each in found] == ["hybrid", *recipes]
    assert [each.dense for each in found] == ["float32", "int8", "bfloat16", "int8"]
    assert [each.representation for each in found] == ["hybrid", "hybrid", "hybrid", "table"]
    test = dataset.split()[2]
    whole = next(iter(test.batches(len(test))))
    for each in found[1:]:
        assert each.model.top is found[0].model.top
        scores = compile_path(each.model, each.dense)(whole.dense, whole.bags)
        assert each.quality["test"]["auc"].value == pytest.approx(
            roc_auc_score(test.labels, scores), abs=1e-4
        )
        assert 0 < abs(each.difference["test"]["log_loss"].value) < 0.01
    bundle.save(tmp_path / "b", [each.member() for each in found], {})
    members, _ = bundle.load(tmp_path / "b")
    assert [m.dense for m in members] == [each.dense for each in found]
    paths = paths_from_checkpoints([tmp_path / "b"])
    assert [p.model.compiled.precision for p in paths] == [each.dense for each in found]
    assert len({p.shape for p in paths}) == len(paths)
    sample = next(iter(test.batches(50)))
    for path, each in zip(paths, found, strict=True):
        want = compile_path(each.model, each.dense)(sample.dense, sample.bags)
        np.testing.assert_allclose(path.model(sample), want, atol=1e-6)


def test_dhe_recipe_replaces_large_vocabularies_only(dataset):
    torch.manual_seed(0)
    features = [FeatureConfig(name, size, 8) for name, size in dataset.features]
    large = [FeatureConfig("big", 20_000, 8), *features[1:]]
    model = DLRM(large, 2, 8, (8,), (8,))
    with pytest.raises(ValueError, match="train: feature 'big' has another vocabulary"):
        Source(model, dataset)
    small = Source(DLRM(features[2:], 2, 8, (8,), (8,)), dataset)
    with pytest.raises(ValueError, match="no vocabulary is so large"):
        make(small, "dhe")


@pytest.mark.parametrize("part", [1, 4, 16, 64])
def test_a_decoder_is_the_largest_in_its_part_of_the_bytes(part):
    rows, dim = 6040, 16
    config = shape_for(rows, dim, 1 / part)
    feature = FeatureConfig("x", rows, dim, "dhe", config)
    limit = rows * dim * 4 / part
    assert Option("dhe", feature).nbytes <= limit
    wider = DheConfig(k=config.k + 32, hidden=(config.hidden[0] + 8,))
    assert Option("dhe", FeatureConfig("x", rows, dim, "dhe", wider)).nbytes > limit
    assert shape_for(20, dim, 1 / part) is None


def test_dhe_recipes_differ_in_size(dataset):
    small = load("synthetic:rows=2000,vocabulary=3000+20,seed=2")
    torch.manual_seed(0)
    model = DLRM(
        [FeatureConfig(name, size, 8) for name, size in small.features], small.num_dense, 8, (8,), (8,)
    )
    sizes = {part: make(Source(model, small), f"dhe:{part}") for part in (4, 16)}
    configs = {part: made.features[0].dhe for part, made in sizes.items()}
    assert configs == {part: shape_for(3000, 8, 1 / part) for part in (4, 16)}
    assert [f.representation for f in sizes[4].features] == ["dhe", "table"]


def test_mapped_models_are_folded_first(dataset, trained):
    model = trained["table"].model
    features = list(model.features)
    torch.manual_seed(1)
    mapped = DLRM(features, 2, 8, (8,), (8,))
    mapped.embeddings = MappedEmbeddingBagCollection(EmbeddingBagCollection(features))
    with torch.no_grad():
        for linear in mapped.embeddings.maps.values():
            linear.weight.normal_()
    (original, same) = derive(
        mapped.eval(), {"representation": "table"}, dataset.split(), recipes=["low_rank:8"], seconds=0
    )
    assert type(original.model.embeddings) is EmbeddingBagCollection
    test = dataset.split()[2]
    np.testing.assert_allclose(predict(same.model, test), predict(mapped, test), atol=1e-4)


def test_bad_recipes(dataset, trained):
    model, metadata = trained["table"].model, trained["table"].metadata
    parts = dataset.split()
    for recipe in ("tables", "table[int2]", "low_rank", "low_rank:0", "dhe[int8]", "low_rank:2[int4]"):
        with pytest.raises(ValueError, match=r"recipe '.*': expected table, table\["):
            derive(model, metadata, parts, recipes=[recipe], seconds=0)
    with pytest.raises(ValueError, match="recipe 'low_rank:9': rank: expected 1 to embedding_dim, 8"):
        derive(model, metadata, parts, recipes=["low_rank:9"], seconds=0)
    with pytest.raises(ValueError, match="each only once"):
        derive(model, metadata, parts, recipes=["dhe", "dhe"], seconds=0)
    with pytest.raises(ValueError, match="metric: expected one of"):
        derive(model, metadata, parts, metric="f1", seconds=0)


# ------------------------------------------------------------------------------------------------- bundles


@pytest.fixture(scope="module")
def folder(dataset, trained, tmp_path_factory):
    found = derive(
        trained["hybrid"].model,
        trained["hybrid"].metadata,
        dataset.split(),
        recipes=["table", "table[int8]", "table[int4]", "low_rank:2[int8]", "low_rank:4"],
        seconds=0,
    )
    folder = tmp_path_factory.mktemp("bundles") / "bundle"
    bundle.save(folder, [each.member() for each in found], trained["hybrid"].metadata)
    return folder, found


def test_a_bundle_answers_as_what_was_saved(dataset, folder):
    folder, found = folder
    members, metadata = bundle.load(folder)
    assert metadata["representation"] == "hybrid"
    test = dataset.split()[2]
    for member, each in zip(members, found, strict=True):
        assert (member.name, member.representation) == (each.name, each.representation)
        assert member.facts == json.loads(json.dumps(each.facts()))
        np.testing.assert_allclose(predict(member.model, test), predict(each.model, test), atol=1e-6)
        assert member.shape == each.member().shape
    assert len({member.shape for member in members}) == len(members)
    assert isinstance(members[-1].model.embeddings, LowRankEmbeddingBagCollection)


def test_weights_that_paths_share_are_stored_and_loaded_once(folder):
    folder, found = folder
    members, _ = bundle.load(folder)
    assert len({member.model.top[0].weight.data_ptr() for member in members}) == 1
    (file,) = folder.glob("weights-*.pt")
    state = found[0].model.state_dict()
    mlps = sum(t.nbytes for name, t in state.items() if not name.startswith("embeddings"))
    embeddings = sum(each.nbytes for each in found)
    assert file.stat().st_size < embeddings + mlps + 500 * sum(len(e.model.state_dict()) for e in found)


def test_a_bundle_is_paths_for_a_choice(folder):
    folder, found = folder
    paths = paths_from_checkpoints([folder], metric="accuracy")
    assert [path.name for path in paths] == [each.name for each in found]
    assert [p.quality for p in paths] == [e.quality["valid"]["accuracy"].value for e in found]
    assert all(isinstance(path.model, Scorer) and path.inputs == (3, 2) for path in paths)
    with pytest.raises(CheckpointError, match="no validation f1"):
        paths_from_checkpoints([folder], metric="f1")
    cached = with_cache(paths[0], 1 << 12)
    assert cached.name == "hybrid+cache"
    with pytest.raises(ValueError, match="a cache is for plain decoders, not for quantised ones"):
        with_cache(paths[2], 1 << 12)


def test_processes_serve_a_bundle(dataset, folder):
    """Each in a process that shares the weights, which are pages of a file until then."""
    folder, found = folder
    paths = paths_from_checkpoints([folder])
    profile = Profile.measure(paths, sampler(dataset), (1, 8), seconds=0, conditions=("warm",))
    batch = dataset.batch(slice(0, 40))
    executor = ProcessExecutor("cpu", paths, profile)
    executor.start()
    try:
        for path, each in zip(paths, found, strict=True):
            scores = executor.run(path.name, batch)
            np.testing.assert_allclose(scores, Scorer(each.model)(batch), atol=1e-6, err_msg=path.name)
    finally:
        executor.close()


def test_a_bundle_beside_a_checkpoint(folder, trained, tmp_path):
    folder, _ = folder
    checkpoint.save(tmp_path / "own.pt", trained["table"].model, trained["table"].metadata)
    names = [path.name for path in paths_from_checkpoints([folder, tmp_path / "own.pt"])]
    assert names[:2] == ["hybrid", "bundle/table"]
    assert names[-1] == "own"


def test_written_anew(folder, trained, tmp_path):
    _, found = folder
    target = tmp_path / "b"
    for members in (found, found[:2]):
        bundle.save(target, [each.member() for each in members], {})
    assert len(list(target.iterdir())) == 2
    assert [member.name for member in bundle.load(target)[0]] == ["hybrid", "table"]
    with pytest.raises(ValueError, match="each with a name of its own"):
        bundle.save(target, [found[0].member()] * 2, {})
    assert len(bundle.load(target)[0]) == 2


def test_damage_is_found(folder, tmp_path):
    _, found = folder
    target = tmp_path / "b"

    def fresh():
        bundle.save(target, [each.member() for each in found], {})
        (weights,) = target.glob("weights-*.pt")
        return weights, target / "manifest.json"

    weights, manifest = fresh()
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged"):
        bundle.load(target)
    weights, manifest = fresh()
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"cannot read bundle .*weights-"):
        bundle.load(target)
    weights, manifest = fresh()
    for text, message in (
        ("{", "damaged, not JSON"),
        ("[]", "no manifest of a bundle"),
        (
            json.dumps({"format": "mprec bundle", "version": 9}),
            "bundle version 9; this mprec reads version 1",
        ),
        (json.dumps({"format": "mprec bundle", "version": 1, "paths": []}), "names no paths"),
    ):
        manifest.write_text(text)
        with pytest.raises(CheckpointError, match=message):
            paths_from_checkpoints([target])
    manifest.unlink()
    with pytest.raises(CheckpointError, match="is no bundle: cannot read"):
        bundle.load(target)
    _, manifest = fresh()
    changed = json.loads(manifest.read_text())
    changed["paths"][0]["embeddings"]["features"][0]["num_embeddings"] += 1
    manifest.write_text(json.dumps(changed))
    with pytest.raises(CheckpointError, match="the weights do not fit the paths described"):
        bundle.load(target)


# ------------------------------------------------------------------------------------------------- command


def test_train_derive_profile_plan(tmp_path, capsys):
    """The documented sequence, small."""
    model, made, profile = (str(tmp_path / name) for name in ("model.pt", "bundle", "profile.json"))
    small = "--epochs 1 --dim 8 --top 8 --bottom 8 --json"
    common = ["--data", SPEC]
    assert main(["train", *common, "--representation", "table", "--output", model, *small.split()]) == 0
    assert main(["derive", model, *common, "--output", made, "--seconds", "0.1", "--all", "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["kept"] == [path["name"] for path in result["paths"]]
    assert {"table", "table[int8]", "low_rank:2[int8]"} <= set(result["kept"])
    served = ["--checkpoints", made, *common]
    arguments = ["--seconds", "0.2", "--batch-sizes", "1,64", "--output", profile, "--json"]
    assert main(["profile", *served, *arguments]) == 0
    assert set(json.loads(capsys.readouterr().out)["paths"]) == set(result["kept"])
    assert main(["plan", "--checkpoints", made, *common, "--memory", "12KiB", "--json"]) == 0
    (planned, *_) = json.loads(capsys.readouterr().out)["plans"]["here"]
    assert planned["bytes"] <= 12 << 10
    assert {row["choice"] for row in planned["rows"]} <= {
        "table",
        "table[float16]",
        "table[int8]",
        "table[int4]",
        "dhe",
    }
    assert main(["derive", model, *common, "--output", made, "--seconds", "0.1", "--threads", "1"]) == 0
    shown = capsys.readouterr().out
    assert "low_rank:2[int8]" in shown
    assert f"paths in {made}" in shown


def test_command_checks_before_it_works(tmp_path, capsys):
    assert main(["derive", str(tmp_path / "no.pt"), "--data", SPEC, "--output", str(tmp_path / "b")]) == 2
    assert "cannot read checkpoint" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert main(["derive", "x", "--data", SPEC, "--output", str(tmp_path / "file")]) == 2
    assert "is no folder" in capsys.readouterr().err
