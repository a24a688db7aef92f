"""Crossed features against pairs counted in Python; specs and commands."""

import json

import numpy as np
import pytest

from mprec.cli import main
from mprec.data import load
from mprec.data.cross import _mixed, cross
from mprec.errors import DataError

SPEC = "synthetic:rows=400,vocabulary=30+5+7,bag=2,seed=1,dense=1"  # f2 has bags


@pytest.fixture(scope="module")
def dataset():
    return load(SPEC)


def bags(column):
    if column.offsets is None:
        return [[i] for i in column.ids.tolist()]
    return [part.tolist() for part in np.split(column.ids, column.offsets[1:-1])]


@pytest.mark.parametrize("pair", ["f0:f1", "f0:f2", "f2:f1"])
def test_an_id_is_a_pair(dataset, pair):
    found = cross(dataset, [pair])
    first, second = (dataset.column(name) for name in pair.split(":"))
    crossed = found.column(pair.replace(":", "_x_"))
    assert crossed.vocabulary == first.vocabulary * second.vocabulary
    for a, b, both in zip(bags(first), bags(second), bags(crossed), strict=True):
        assert both == [i * second.vocabulary + j for i in a for j in b]
    assert found.features[:3] == dataset.features
    assert found.describe()["crosses"] == {"pairs": [pair], "size": 1 << 20}
    assert dataset.column("f0").ids.base is not found.column("f0").ids.base  # its matrix is its own
    rows = np.array([5, 3, 3])
    batch, alone = found.batch(rows), found.take(rows).batch(slice(None))
    assert np.array_equal(batch.indices, alone.indices)


def test_too_many_pairs_are_hashed(dataset):
    exact = cross(dataset, ["f0:f1"]).column("f0_x_f1").ids
    hashed = cross(dataset, ["f0:f1"], size=97).column("f0_x_f1")
    assert hashed.vocabulary == 97
    pairs = {}
    for a, b in zip(exact.tolist(), hashed.ids.tolist(), strict=True):
        assert pairs.setdefault(a, b) == b  # one ID for a pair, wherever it stands
    # SplitMix64's output for 1, as its authors' code gives it, and about as many collisions as by chance.
    assert int(_mixed(np.array([0x9E3779B97F4A7C15], dtype=np.uint64))[0]) == 0xE220A8397B1DCDAF
    by_chance = 97 * (1 - (1 - 1 / 97) ** len(pairs))
    assert abs(len(set(pairs.values())) - by_chance) < 15


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("cross=f0", "expected two features joined by a colon, got 'f0'"),
        ("cross=f0:f0", "expected two features"),
        ("cross=f0:f9", "cross 'f0:f9': no feature 'f9' in synthetic"),
        ("cross=f0:f1+f0:f1", "feature names: expected each once"),
        ("cross=f0:f1,cross_size=0", "cross_size: expected an integer from 1"),
        ("cross=f0:f1,cross_size=many", "cross_size: expected an integer from 1"),
        ("cross_size=5", "cross_size goes with cross"),
    ],
)
def test_bad_crosses(spec, message):
    with pytest.raises(DataError, match=message):
        load(f"{SPEC},{spec}")


def test_two_columns_of_bags_and_raw_values_are_refused(dataset):
    twice = cross(dataset, ["f0:f2"])
    with pytest.raises(DataError, match="at most one of the two may have several IDs a row"):
        cross(twice, ["f2:f0_x_f2"])


def test_trained_models_remember_their_crosses(tmp_path, capsys):
    model, made = str(tmp_path / "model.pt"), str(tmp_path / "bundle")
    small = ["--epochs", "1", "--dim", "8", "--top", "8", "--bottom", "8", "--json"]
    how = ["--representation", "table", "--cross", "f0:f1,f0:f2", "--cross-size", "100"]
    assert main(["train", "--data", SPEC, *how, "--output", model, *small]) == 0
    trained = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert trained["dataset"]["features"][3:] == [["f0_x_f1", 100], ["f0_x_f2", 100]]
    derived = ["--data", SPEC, "--output", made, "--seconds", "0.1", "--recipes", "table[int8]", "--json"]
    assert main(["derive", model, *derived]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["paths"]
    asked = ["loadtest", "--checkpoints", made, "--data", f"{SPEC},cross=f1:f2"]
    assert main(asked) == 2
    assert "has other features or vocabularies" in capsys.readouterr().err
    assert main(["train", "--data", SPEC, *how[:2], "--cross-size", "9", "--output", model]) == 2
    assert "--cross-size goes with --cross" in capsys.readouterr().err
