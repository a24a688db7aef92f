"""One's own log: a table with a schema, against rows in plain Python."""

import gzip
import json
from datetime import UTC, datetime

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.feather
import pyarrow.parquet
import pytest

from mprec.data import load, table
from mprec.data.vocabulary import RawValues, Vocabulary, key_of
from mprec.errors import DataError

SCHEMA = {
    "label": {"column": "rating", "at_least": 4},
    "features": {
        "user": {},
        "item": {"column": "film", "min_count": 2},
        "tags": {"separator": "|"},
        "device": {"raw": True},
    },
    "dense": {"age": {}, "price": {"log1p": True}},
    "time": "at",
}
ROWS = [
    # user, film, tags, device, rating, age, price, at
    (7, "Heat", "a|b", "x", 5, 30.0, 7, 10),
    (9, "Alien", "", "y", 3, None, 0, 20),
    (7, "Alien", "b", None, 4, 31.5, None, 30),
    (-1, "Heat", "b|b|c", "x", 1, 8.0, 3, 40),
    (None, None, None, "z", 2, 9.0, 1, 50),
]
NAMES = ("user", "film", "tags", "device", "rating", "age", "price", "at")


def columns(rows=ROWS):
    return dict(zip(NAMES, map(list, zip(*rows, strict=True)), strict=True))


def save(folder, kind, rows=ROWS, schema=SCHEMA):
    data, file = pa.table(columns(rows)), folder / f"log.{kind}"
    if kind == "parquet":
        pa.parquet.write_table(data, file, row_group_size=2)
    elif kind == "arrow":
        pa.feather.write_feather(data, str(file))
    else:
        options = pa.csv.WriteOptions(delimiter="\t" if kind == "tsv" else ",")
        pa.csv.write_csv(data, folder / "plain", options)
        text = (folder / "plain").read_bytes()
        file.write_bytes(gzip.compress(text) if kind.endswith(".gz") else text)
    (folder / "log.schema.json").write_text(json.dumps(schema))
    return file


@pytest.mark.parametrize("kind", ["parquet", "csv", "csv.gz", "tsv", "arrow"])
def test_a_table_is_read(tmp_path, kind):
    file = save(tmp_path, kind)
    dataset = load(str(file))
    assert dataset.name == "table"
    assert dataset.labels.tolist() == [1, 0, 1, 0, 0]
    assert dataset.times.tolist() == [10, 20, 30, 40, 50]
    np.testing.assert_allclose(
        dataset.dense, [[30, np.log(8)], [0, 0], [31.5, 0], [8, np.log(4)], [9, np.log(2)]], rtol=1e-6
    )
    assert [name for name, _ in dataset.features] == ["user", "item", "tags", "device"]
    # The training part is the first four rows: 7 twice; Heat and Alien twice each; b three times.
    assert dataset.column("user").ids.tolist() == [1, 3, 1, 2, 0]
    film = dataset.column("item").ids.tolist()
    assert sorted(film[:2]) == [1, 2]
    assert film == [film[0], film[1], film[1], film[0], 0]
    device = dataset.column("device")
    assert device.vocabulary == (1 << 62) + 1
    assert device.ids.tolist() == [key_of(v, "text") + 1 for v in ("x", "y", None, "x", "z")]
    tags = dataset.column("tags")
    assert tags.offsets.tolist() == [0, 2, 2, 3, 6, 6]
    b = int(tags.ids[1])
    assert b == 1
    assert tags.ids.tolist() == [tags.ids[0], b, b, b, b, tags.ids[5]]
    assert len({b, int(tags.ids[0]), int(tags.ids[5])}) == 3
    batch = dataset.batch(np.array([3, 0]))
    assert batch.indices.tolist() == [2, 1, film[3], film[0], b, b, tags.ids[5], tags.ids[0], b,
                                      *device.ids[[3, 0]].tolist()]  # fmt: skip
    assert batch.offsets.tolist() == [0, 1, 2, 3, 4, 7, 9, 10, 11]
    assert [type(dataset.vocabularies[n]) for n in ("user", "device")] == [Vocabulary, RawValues]


def test_the_next_table_and_raw_values_by_its_vocabularies(tmp_path):
    first = load(str(save(tmp_path, "parquet")))
    later = tmp_path / "later"
    later.mkdir()
    second = load(str(save(later, "csv", [ROWS[3], (12, "Nope", "c", "q", 5, 1, 1, 60)])),
                  vocabularies=first.vocabularies)  # fmt: skip
    assert second.features == first.features
    assert second.column("user").ids.tolist() == [2, 0]
    film = int(first.column("item").ids[0])
    assert second.column("item").ids.tolist() == [film, 0]
    assert first.vocabularies["item"].ids_of(["Heat", "Nope", None]).tolist() == [film, 0, 0]
    assert first.vocabularies["user"].ids_of([7, -1, 9]).tolist() == [1, 2, 3]
    for name, wrong in (("user", "7"), ("user", True), ("user", 1.5), ("item", 7), ("user", 1 << 62)):
        with pytest.raises(ValueError, match=r"expected .* or null, got"):
            first.vocabularies[name].ids_of([wrong])
    save(later, "csv", [("7", *ROWS[0][1:])] * 2 + [("Ann", *ROWS[0][1:])])
    with pytest.raises(DataError, match="feature 'user': expected integer, as in training, got text"):
        load(str(later / "log.csv"), vocabularies=first.vocabularies)


def test_lists_timestamps_booleans_and_dictionaries(tmp_path):
    moments = [datetime(2026, 1, day, tzinfo=UTC) for day in (3, 1, 2)]
    data = pa.table(
        {
            "clicked": [True, False, True],
            "bag": pa.array([[3, 4], None, [4]]),
            "kind": pa.array(["u", None, "v"]).dictionary_encode(),
            "at": pa.array(moments),
            "who": ["A", "A", "B"],
        }
    )
    pa.parquet.write_table(data, tmp_path / "log.parquet")
    schema = {"label": "clicked", "features": ["bag", "kind"], "time": "at", "users": "who"}
    (tmp_path / "schema.json").write_text(json.dumps({**schema, "split": "user-time"}))
    dataset = load(str(tmp_path))
    assert dataset.labels.tolist() == [1, 0, 1]
    assert np.argsort(dataset.times).tolist() == [1, 2, 0]
    assert dataset.default_split == "user-time"
    assert dataset.column("bag").offsets.tolist() == [0, 2, 2, 3]
    assert len(set(dataset.users.tolist())) == 2
    assert dataset.num_dense == 0
    kinds = dataset.column("kind").ids.tolist()
    assert len(set(kinds)) == 3


def test_a_table_is_cached(tmp_path, monkeypatch):
    file, root = save(tmp_path, "parquet"), tmp_path / "cache"
    first = table.read(file, cache=root)
    with monkeypatch.context() as patch:
        patch.setattr(table, "_read_columns", None)  # is not called
        second = table.read(file, cache=root)
    np.testing.assert_array_equal(first.matrix, second.matrix)
    np.testing.assert_array_equal(first.column("tags").ids, second.column("tags").ids)
    other = {**SCHEMA, "features": ["user"]}
    (tmp_path / "log.schema.json").write_text(json.dumps(other))
    assert table.read(file, cache=root).features == first.features[:1]


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({**SCHEMA, "label": "age"}, "label 'age', row 0: expected 0 or 1, found 30"),
        ({**SCHEMA, "label": "film"}, "label 'film': expected numbers or true and false"),
        ({**SCHEMA, "label": {"column": "age", "at_least": 1}}, "row 1: expected a number, found nothing"),
        ({**SCHEMA, "features": ["nope"]}, "no column 'nope'; it has user, film"),
        ({**SCHEMA, "features": ["age"]}, "feature column 'age': expected integers or text, got double"),
        ({**SCHEMA, "dense": ["film"]}, "dense column 'film': expected numbers"),
        ({**SCHEMA, "features": {"user": {"raw": True}}}, "raw values: expected at least 0, got -1"),
        ({**SCHEMA, "features": {"user": {"separator": "|"}}}, "a separator is for columns of text"),
        ({**SCHEMA, "features": {}}, "features: expected at least one"),
        ({**SCHEMA, "features": {"user": {"min": 3}}}, "features: 'user': unknown key 'min'"),
        ({**SCHEMA, "features": {"user": {"oov": 0}}}, "features: 'user': oov: expected at least 1"),
        ({**SCHEMA, "features": {"a.b": "user"}}, "expected names without dots"),
        ({**SCHEMA, "split": "random"}, "split: expected one of time, user-time"),
        ({**SCHEMA, "split": "user-time"}, "user-time needs users"),
        ({**SCHEMA, "times": "at"}, "unknown key 'times'"),
        ({**SCHEMA, "time": "film"}, "time 'film': expected numbers or timestamps"),
        ([], "expected an object, got list"),
        ({**SCHEMA, "label": 3}, "label: expected a column"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, schema, message):
    rows = ROWS if "nothing" in message or "age" in message else [row for row in ROWS if row[1] is not None]
    file = save(tmp_path, "parquet", rows, schema)
    with pytest.raises(DataError, match=message.replace("(", r"\(")):
        load(str(file))


def test_files_that_are_no_tables(tmp_path):
    file = save(tmp_path, "parquet")
    file.write_bytes(b"nonsense")
    with pytest.raises(DataError, match=r"log\.parquet: "):
        load(str(file))
    (tmp_path / "log.schema.json").unlink()
    with pytest.raises(DataError, match=r"is told by a schema, log\.schema\.json or schema\.json beside it"):
        load(str(file))
    (tmp_path / "x.txt").write_text("")
    with pytest.raises(DataError, match="expected a name that ends in"):
        load(f"table:{tmp_path / 'x.txt'}")
    with pytest.raises(DataError, match="No such file"):
        load(f"table:{tmp_path / 'x.parquet'}")
    with pytest.raises(DataError, match="files of one kind"):
        table.read([save(tmp_path, "csv"), file])
