"""From one's own log to answers over HTTP: the commands of docs/own_log.md, one after the other."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from test_cli_serving import ask, serve_process, wait_until_ready

from mprec import checkpoint, cli, data
from mprec.paths import bundle, paths_from_checkpoints, vocabularies_of
from mprec.serving.build import model_inputs
from mprec.serving.http.parse import Limits, parse_json
from mprec.training import predict

pytestmark = pytest.mark.usefixtures("one_thread")
SCHEMA = {
    "label": "clicked",
    "features": {"user": {"min_count": 2}, "item": {}, "tags": {"separator": "|"}},
    "dense": ["price"],
}


def save(folder, day, rows=3000):
    """A day of a shop: users and items are named, and some are new each day."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(day)
    users, items = rng.zipf(1.4, rows) % 90 + 3 * day, rng.zipf(1.3, rows) % 60 + 2 * day
    taste = np.random.default_rng(99).standard_normal(300)
    price = rng.random(rows)
    score = taste[users] + taste[items + 150] - price
    content = {
        "user": [f"user {u}" for u in users],
        "item": (items * 1000).tolist(),
        "tags": ["|".join(f"t{t}" for t in range(i % 3)) for i in items],
        "price": price,
        "clicked": rng.random(rows) < 1 / (1 + np.exp(-score)),
    }
    pa.parquet.write_table(pa.table(content), folder / f"day_{day}.parquet")
    (folder / "schema.json").write_text(json.dumps(SCHEMA))
    return folder / f"day_{day}.parquet"


def run(*arguments):
    assert cli.main([str(a) for a in arguments]) == 0


def run_json(capsys, command, *arguments):
    capsys.readouterr()
    run(command, "--json", *arguments)
    return json.loads(capsys.readouterr().out)


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("logs")
    return [save(folder, day) for day in (0, 1)]


@pytest.fixture(scope="module")
def model(logs, tmp_path_factory):
    file = tmp_path_factory.mktemp("model") / "model.pt"
    shape = "--dim 8 --bottom 8 --top 8 --epochs 3 --batch-size 128"
    run("train", "--data", logs[0], "--representation", "table", *shape.split(), "--output", file)
    return file


@pytest.mark.slow
def test_train_derive_plan_serve_loadtest(logs, model, tmp_path, capsys, own_cache):
    today, tomorrow = logs
    folder, plan = tmp_path / "bundle", tmp_path / "plan.json"
    derived = run_json(
        capsys, "derive", model, "--data", today, "--output", folder, "--seconds", 0.3, "--all",
        "--recipes", "table[int8]", "table[int4]", "low_rank:2[int8]",
    )  # fmt: skip
    assert derived["kept"] == ["table", "table[int8]", "table[int4]", "low_rank:2[int8]"]
    small = tmp_path / "small"
    common = ["--checkpoints", folder, "--data", today]
    planned = run_json(capsys, "plan", *common, "--memory", "6KB", "--bundle", small, "--output", plan)
    assert 0 < planned["paths"]["bytes"] <= 6000
    assert [path.name for path in paths_from_checkpoints([small])] == [
        name for name in derived["kept"] if name in planned["paths"]["kept"]
    ]
    profile = tmp_path / "profile.json"
    run("profile", "--checkpoints", small, "--data", today, "--output", profile, "--seconds", 1)
    (plans,) = planned["plans"].values()
    assert plans
    assert all(p["bytes"] <= 6000 for p in plans)
    # The plan can be trained.
    retrained = tmp_path / "planned.pt"
    shape = "--dim 8 --bottom 8 --top 8 --epochs 1"
    name = ["--plan-name", plans[0]["name"]]
    run("train", "--data", today, "--plan", plan, *name, *shape.split(), "--output", retrained)
    found = [f.representation for f in checkpoint.load(retrained)[0].features]
    assert found == [row["config"]["representation"] for row in plans[0]["rows"]]
    load = ["--profile", profile, "--seconds", 0.5, "--rounds", 1, "--sla-ms", 50]
    # Of a day whose users and items are new.
    assert run_json(capsys, "loadtest", "--checkpoints", small, "--data", tomorrow, *load)
    # Raw values over HTTP have the scores that the log's rows have.
    dataset = data.load(str(tomorrow), vocabularies=vocabularies_of(small))
    rows = pa.parquet.read_table(tomorrow).slice(0, 40).to_pylist()
    query = {
        "values": [[r["user"], r["item"], r["tags"].split("|") if r["tags"] else []] for r in rows],
        "dense": [[r["price"]] for r in rows],
    }
    members, _ = bundle.load(small)
    scores = {member.name: predict(member.model, dataset.take(slice(0, 40))) for member in members}
    arguments = ["--checkpoints", small, "--threads", 1, "--profile-seconds", 0.2]
    with serve_process(*arguments) as (server, said):
        wait_until_ready(said["url"])
        status, answer = ask(f"{said['url']}/score", query)
        assert status == 200, answer
        (path,) = answer["paths"]
        np.testing.assert_allclose(answer["scores"], scores[path], atol=1e-5)
        query["values"][1][1] = "seven"
        status, answer = ask(f"{said['url']}/score", query)
        assert (status, answer["error"]) == (
            400,
            "values[1][1], item: expected an integer or null, got 'seven'",
        )
        server.send_signal(signal.SIGTERM)
        server.communicate(timeout=60)
        assert server.returncode == 0


def test_raw_values_in_a_query(model):
    inputs = model_inputs([model])
    body = json.dumps({"values": [["user 3", 1000, ["t0"]], [None, None, []]], "dense": [[0.5], [1]]})
    batch, _ = parse_json(body.encode(), inputs, Limits())
    known = checkpoint.vocabularies(model)
    user, item, tag = (
        int(known[name].ids_of([value])[0])
        for name, value in (("user", "user 3"), ("item", 1000), ("tags", "t0"))
    )
    assert batch.indices.tolist() == [user, 0, item, 0, tag]
    assert batch.offsets.tolist() == [0, 1, 2, 3, 4, 5, 5]
    for content, message in (
        ({"values": []}, "values: expected at least one row"),
        ({"values": [["user 3", 1000]]}, r"values\[0\]: expected an entry for each of the 3 features"),
        ({"values": [[7, 1000, []]]}, r"values\[0\]\[0\], user: expected a string or null, got 7"),
        ({"values": [["a", 1, []]], "ids": [[0, 0, 0]]}, "give ids or values, not both"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_json(json.dumps({**content, "dense": [[1.0]]}).encode(), inputs, Limits())
    bare = inputs._replace(encoders=None)
    with pytest.raises(ValueError, match="the models hold no vocabularies"):
        parse_json(body.encode(), bare, Limits())


def test_models_of_other_vocabularies_are_not_served_together(logs, model, tmp_path):
    other = tmp_path / "other.pt"
    shape = "--dim 8 --bottom 8 --top 8 --epochs 1"
    run("train", "--data", logs[1], "--representation", "table", *shape.split(), "--output", other)
    with pytest.raises(ValueError, match=r"takes other inputs|makes other IDs"):
        model_inputs([model, other])


def test_raw_values_need_no_vocabulary(tmp_path, capsys):
    """Of a deep hash embedding; rows for all values are refused."""
    file = save(tmp_path / "logs", 0)
    schema = {**SCHEMA, "features": {"user": {"raw": True}, "item": {"raw": True}}}
    (file.parent / "schema.json").write_text(json.dumps(schema))
    output = tmp_path / "dhe.pt"
    shape = "--dim 8 --bottom 8 --top 8 --epochs 1 --dhe-k 32 --dhe-hidden 16"
    arguments = ["--data", str(file), *shape.split(), "--output", str(output)]
    run("train", "--representation", "dhe", *arguments)
    later = save(file.parent, 1)
    (file.parent / "schema.json").write_text(json.dumps(schema))
    dataset = data.load(str(later), vocabularies=vocabularies_of(output))
    trained, _ = checkpoint.load(output)
    assert len(np.unique(predict(trained, dataset))) > 1000
    assert cli.main(["train", "--representation", "table", *arguments]) == 2
    assert "its raw values are its IDs, too many for rows (table)" in capsys.readouterr().err
    folder = tmp_path / "bundle"
    arguments = ["--data", str(file), "--output", str(folder), "--seconds", "0.1"]
    assert cli.main(["derive", str(output), *arguments]) == 0
    assert "too many for rows" in capsys.readouterr().err
    # Which precisions of the decoder survive depends on this CPU; rows for all values never do.
    assert {member.name.split("/")[0] for member in bundle.load(folder)[0]} == {"dhe"}


def test_a_table_is_trained_in_a_process_of_its_own(logs, tmp_path):
    """The command says what it reads."""
    command = [sys.executable, "-m", "mprec", "train", "--data", str(logs[0]), "--representation", "table"]
    command += ["--batch-size", "64", "--epochs", "2", "--output", str(tmp_path / "m.pt"), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert "reading the table" in done.stderr
    assert json.loads(done.stdout)["metrics"]["test"]["auc"] > 0.6
