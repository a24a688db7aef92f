"""``mprec predict``: a score for every row of a log, with labels and without."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from test_criteo import line, write
from test_sequence import SCHEMA, save

from mprec import checkpoint, cli, data
from mprec.errors import DataError
from mprec.metrics import Metrics
from mprec.paths import bundle, vocabularies_of
from mprec.training import evaluate, predict

pytestmark = pytest.mark.usefixtures("one_thread")
SHAPE = ["--dim", "8", "--bottom", "8", "--top", "8", "--epochs", "1", "--batch-size", "128"]


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("logs")
    return [save(folder, day, rows=1500) for day in (0, 1)]


@pytest.fixture(scope="module")
def model(logs, tmp_path_factory):
    file = tmp_path_factory.mktemp("model") / "model.pt"
    arguments = ["--data", str(logs[0]), "--representation", "table", "--output", str(file)]
    assert cli.main(["train", *arguments, *SHAPE]) == 0
    return file


@pytest.fixture(scope="module")
def expected(logs, model):
    """The next day's labels, and the model's own scores of it."""
    dataset = data.load(str(logs[1]), vocabularies=vocabularies_of(model))
    return dataset.labels, predict(checkpoint.load(model)[0], dataset)


def run(capsys, *arguments):
    capsys.readouterr()
    assert cli.main(["predict", "--json", *map(str, arguments)]) == 0
    return json.loads(capsys.readouterr().out)


def refusal(capsys, *arguments):
    capsys.readouterr()
    assert cli.main(["predict", *map(str, arguments)]) == 2
    return capsys.readouterr().err


def read(file):
    if file.suffix == ".npy":
        return np.load(file)
    if file.suffix == ".parquet":
        return pa.parquet.read_table(file)["probability"].to_numpy()
    head, *rows = file.read_text().split()
    assert head == "probability"
    return np.array(rows, dtype=np.float32)


@pytest.mark.parametrize("suffix", [".csv", ".npy", ".parquet"])
def test_the_next_day_is_scored_in_its_order(logs, model, expected, suffix, tmp_path, capsys):
    labels, scores = expected
    output = tmp_path / f"scores{suffix}"
    result = run(capsys, model, "--data", logs[1], "--output", output, "--batch-size", 97)
    np.testing.assert_allclose(read(output), scores, atol=1e-5)
    assert (result["rows"], result["path"], result["output"]) == (len(labels), "table", str(output))
    assert result["mean"] == pytest.approx(scores.mean(), abs=1e-5)
    assert result["metrics"] == pytest.approx(Metrics.of(labels, read(output)).to_dict())
    assert result["metrics"]["auc"] == pytest.approx(Metrics.of(labels, scores).auc, abs=1e-3)


def test_a_part_has_the_quality_that_training_told(logs, model, capsys):
    told = checkpoint.load(model)[1]["metrics"]["test"]
    found = run(capsys, model, "--data", logs[0], "--part", "test")
    assert found["rows"] == 150
    assert found["metrics"] == pytest.approx(told, abs=1e-4)
    assert cli.main(["predict", str(model), "--data", str(logs[0]), "--part", "test"]) == 0
    assert f"150 rows by table: AUC {told['auc']:.3f}" in capsys.readouterr().out


def test_a_log_without_labels(logs, model, expected, tmp_path, capsys):
    """Nor has it a column for the time."""
    table = pa.parquet.read_table(logs[1]).drop_columns(["clicked"])
    file, output = tmp_path / "new.parquet", tmp_path / "scores.npy"
    pa.parquet.write_table(table, file)
    (tmp_path / "schema.json").write_text(json.dumps({**SCHEMA, "time": "at"}))
    result = run(capsys, model, "--data", file, "--unlabelled", "--output", output)
    np.testing.assert_allclose(read(output), expected[1], atol=1e-5)
    assert result["metrics"] is None
    assert cli.main(["predict", str(model), "--data", str(file), "--unlabelled"]) == 0
    assert f"1500 rows by table: mean probability {result['mean']:.4f}" in capsys.readouterr().out
    assert "no column 'clicked'" in refusal(capsys, model, "--data", file)
    unlabelled = data.load(f"{file},labelled=false", vocabularies=vocabularies_of(model))
    assert not unlabelled.labelled
    assert not unlabelled.take(slice(0, 3)).labelled
    with pytest.raises(DataError, match="read without labels"):
        unlabelled.split()
    with pytest.raises(DataError, match="read without labels"):
        evaluate(checkpoint.load(model)[0], unlabelled)
    with pytest.raises(DataError, match="read without labels"):
        data.load(f"{file},labelled=false,cross=user:item").split()
    arguments = ["--representation", "table", "--output", str(tmp_path / "m.pt")]
    assert cli.main(["train", "--data", f"{file},labelled=false", *arguments]) == 2
    assert "read without labels" in capsys.readouterr().err


def test_criteo_s_test_file(tmp_path, capsys):
    rng = np.random.default_rng(0)
    lines = [
        line(
            str(rng.integers(2)),
            [str(i) for i in rng.integers(-1, 50, 13)],
            [f"{i:x}" for i in rng.integers(0, 9, 26)],
        )
        for _ in range(400)
    ]
    train, test = write(tmp_path / "train.txt", lines), tmp_path / "test.txt"
    write(test, [text[2:] for text in lines])
    labelled = data.criteo.read(train)
    for chunk in (64, 1 << 20):
        found = data.criteo.read(
            test,
            labelled=False,
            vocabularies=labelled.vocabularies,
            cache=tmp_path / "cache",
            chunk_bytes=chunk,
        )
        assert not found.labelled
        assert (found.matrix == labelled.matrix).all()
        assert (found.dense == labelled.dense).all()
        assert not found.labels.any()
    assert data.criteo.read(train, cache=tmp_path / "cache").labelled
    file, output = tmp_path / "model.pt", tmp_path / "scores.npy"
    arguments = ["--data", str(train), "--representation", "table", "--output", str(file)]
    assert cli.main(["train", *arguments, *SHAPE]) == 0
    result = run(capsys, file, "--data", test, "--unlabelled", "--output", output)
    assert result["metrics"] is None
    np.testing.assert_allclose(read(output), predict(checkpoint.load(file)[0], labelled), atol=1e-5)
    assert "labelled=false" in refusal(capsys, file, "--data", test)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (line("1"), "expected 39 fields, found 40"),
        (line("")[1:].replace("\t", "x\t", 1), "expected an integer or nothing"),
        (line("", [], ["zz"])[1:], "hexadecimal"),
        (line("1")[2:].replace("\t", ","), "38 commas, where tabs"),
    ],
)
def test_bad_lines_without_labels_are_explained_as_they_are(tmp_path, text, reason):
    file = write(tmp_path / "test.txt", [line("")[1:], text])
    with pytest.raises(DataError, match=f"test.txt:2: .*{reason}"):
        data.criteo.read(file, labelled=False, strict=True)


def test_a_bundle_s_best_path_or_the_one_that_is_named(logs, model, expected, tmp_path, capsys):
    folder = tmp_path / "bundle"
    arguments = ["--data", str(logs[0]), "--output", str(folder), "--seconds", "0.1", "--all"]
    assert cli.main(["derive", str(model), *arguments, "--recipes", "low_rank:2[int8]"]) == 0
    members = {member.name: member for member in bundle.load(folder)[0]}
    best = max(members.values(), key=lambda member: member.metrics["valid"]["auc"])
    assert run(capsys, folder, "--data", logs[1])["path"] == best.name
    output = tmp_path / "scores.npy"
    run(capsys, folder, "--data", logs[1], "--path", "low_rank:2[int8]", "--output", output)
    dataset = data.load(str(logs[1]), vocabularies=vocabularies_of(folder))
    np.testing.assert_allclose(read(output), predict(members["low_rank:2[int8]"].model, dataset), atol=1e-5)
    assert "--path: expected one of table, low_rank:2[int8], got 'dhe'" in refusal(
        capsys, folder, "--data", logs[1], "--path", "dhe"
    )


def test_clicks_alone_have_no_auc(logs, model, tmp_path, capsys):
    table = pa.parquet.read_table(logs[1])
    file = tmp_path / "clicks.parquet"
    pa.parquet.write_table(table.filter(table["clicked"]), file)
    (tmp_path / "schema.json").write_text(json.dumps(SCHEMA))
    metrics = run(capsys, model, "--data", file)["metrics"]
    assert metrics["auc"] is None
    assert metrics["log_loss"] > 0


def test_a_parquet_needs_pyarrow(logs, model, tmp_path, capsys, monkeypatch):
    """Which is known before anything is scored."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    told = refusal(capsys, model, "--data", logs[1], "--output", tmp_path / "scores.parquet")
    assert "pip install 'mprec[tables]'" in told


def test_what_is_refused_leaves_the_old_file(logs, model, tmp_path, capsys):
    output = tmp_path / "scores.csv"
    output.write_text("old")
    log = ["--data", logs[1], "--output"]
    assert "--output: expected a name that ends in .csv, .npy, .parquet" in refusal(
        capsys, model, *log, tmp_path / "scores.txt"
    )
    assert "No such file" in refusal(capsys, model, *log, tmp_path / "absent" / "scores.csv")
    assert "--batch-size: expected at least 1, got 0" in refusal(
        capsys, model, *log, output, "--batch-size", 0
    )
    assert "--threads: expected at least 1" in refusal(capsys, model, *log, output, "--threads", 0)
    assert "other features or vocabularies" in refusal(
        capsys, model, "--data", "synthetic:rows=100", "--output", output
    )
    assert "synthetic is always read with its labels" in refusal(
        capsys, _of_synthetic(tmp_path), "--data", "synthetic:rows=100", "--unlabelled"
    )
    assert "a log without labels has no parts" in refusal(
        capsys, model, "--data", logs[1], "--unlabelled", "--part", "test"
    )
    assert output.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir() if "scores" in file.name] == ["scores.csv"]


def _of_synthetic(folder):
    file = folder / "synthetic.pt"
    arguments = ["--data", "synthetic:rows=500", "--representation", "table", "--output", str(file)]
    assert cli.main(["train", *arguments, *SHAPE]) == 0
    return file


def test_a_malformed_line_would_shift_the_scores(tmp_path, capsys):
    """Training may leave it out; here it is an error if scores are written."""
    lines = [line(str(i % 2), [str(i % 7)], [f"{i % 5:x}"]) for i in range(400)]
    train = write(tmp_path / "train.txt", lines)
    file, output = tmp_path / "model.pt", tmp_path / "scores.npy"
    arguments = ["--data", str(train), "--representation", "table", "--output", str(file)]
    assert cli.main(["train", *arguments, *SHAPE]) == 0
    bad = write(tmp_path / "bad.txt", [*lines[:200], "x", *lines[200:]])
    assert f"{bad}:201: expected 40 fields" in refusal(capsys, file, "--data", bad, "--output", output)
    assert not output.exists()
    with pytest.warns(UserWarning, match="1 malformed line"):
        assert run(capsys, file, "--data", bad)["rows"] == 400
