"""profile, plan, loadtest and serve, run as commands on small untrained models."""

import argparse
import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import pytest
import torch
from dispatch_fakes import fake_profile

from mprec import checkpoint, data
from mprec.cli import _executors
from mprec.dispatch import ScoringPath
from mprec.dispatch.profile import default_file
from mprec.nn import DheConfig
from mprec.paths import paths_from_checkpoints, with_cache
from mprec.planner import Infeasible
from mprec.serving import splits
from mprec.serving.loadgen import LoadGenResult
from mprec.training import build_model

DATA = "synthetic:rows=600,seed=1"
REPRESENTATIONS = ("table", "dhe", "hybrid")
QUALITY = {"table": 0.70, "dhe": 0.69, "hybrid": 0.72, "multi-path": 0.71}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    dataset = data.load(DATA)
    for name in (*REPRESENTATIONS, "multi-path"):
        model = build_model(dataset, name, dim=4, dhe=DheConfig(k=16, hidden=(8,)), bottom=(8,), top=(8,))
        quality = {"auc": QUALITY[name], "accuracy": 0.5}
        metadata = {"representation": name, "metrics": {"valid": quality}, "split": "time"}
        if name == "multi-path":
            metadata["paths"] = {path: {"valid": quality} for path in ("table", "dhe", "hybrid")}
        checkpoint.save(folder / f"{name}.pt", model, metadata)
    return folder


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    # Emptying real caches takes too long for what is tested here.
    monkeypatch.setattr("mprec.dispatch.profile.Evict", lambda: lambda: None)


def parse(command, *arguments):
    module = importlib.import_module(f"mprec.cli.{command}")
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", action="store_true")
    module.add_arguments(parser)
    return module, parser.parse_args([str(a) for a in arguments])


def call(command, *arguments):
    module, args = parse(command, *arguments)
    return module.run(args)


def call_json(capsys, command, *arguments):
    capsys.readouterr()
    assert call(command, "--json", *arguments) == 0
    return json.loads(capsys.readouterr().out)


def files(folder, names=REPRESENTATIONS):
    return [folder / f"{name}.pt" for name in names]


def common(folder):
    return ["--checkpoints", *files(folder), "--data", DATA, "--threads", 1]


QUICK = ["--batch-sizes", "1,8,64", "--seconds", "0.2"]


def test_profile_writes_shows_and_draws(checkpoints, tmp_path, capsys):
    file = tmp_path / "profile.json"
    assert call("profile", *common(checkpoints), *QUICK, "--output", file) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in REPRESENTATIONS)
    picture = tmp_path / "curves.png"
    assert call("profile", "--show", file, "--png", picture) == 0
    text = capsys.readouterr().out
    assert "crossover points" in text
    assert "samples" in text
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    content = call_json(capsys, "profile", "--show", file, "--png", picture)
    measured = set(content["cells"]["dhe"]["warm"]["batch_sizes"])
    assert {1, 8, 64} <= measured
    # The error is told between grid points, unless latency was found crooked there and measured.
    checked = set(content["prediction_error"]["batch_sizes"]) if content["prediction_error"] else set()
    assert checked | (measured & {4, 32}) == {4, 32}
    assert not checked & measured


def test_profile_goes_to_the_cache_folder_by_default(checkpoints, capsys):
    content = call_json(capsys, "profile", *common(checkpoints), *QUICK)
    assert content["file"].startswith(os.environ["XDG_CACHE_HOME"])
    assert os.path.exists(content["file"])


def test_a_multi_path_checkpoint_is_several_paths(checkpoints, capsys):
    arguments = ["--checkpoints", checkpoints / "multi-path.pt", "--data", DATA, *QUICK]
    content = call_json(capsys, "profile", *arguments)
    assert set(content["paths"]) == {"table", "dhe", "hybrid"}
    both = ["--checkpoints", *files(checkpoints, ("table", "multi-path")), "--data", DATA, *QUICK]
    assert set(call_json(capsys, "profile", *both)["paths"]) == {"table", "multi-path/table", "dhe", "hybrid"}


def test_caches_are_offered_as_further_paths(checkpoints, capsys):
    content = call_json(capsys, "profile", *common(checkpoints), "--cache", "8KiB", *QUICK)
    assert list(content["paths"]) == [*REPRESENTATIONS, "dhe+cache", "hybrid+cache"]
    table = ["--checkpoints", checkpoints / "table.pt", "--data", DATA]
    with pytest.raises(ValueError, match="--cache"):
        call("profile", *table, "--cache", "8KiB", *QUICK)


def test_a_cached_path_scores_the_same(checkpoints):
    plain, *_ = paths_from_checkpoints([checkpoints / "hybrid.pt"])
    dataset = data.load(DATA)
    counts = {name: dataset.counts(name) for name, _ in dataset.features}
    cached = with_cache(plain, 4096, counts)
    assert cached.model.program() is not None
    batch = dataset.batch(slice(0, 100))
    torch.testing.assert_close(cached.model(batch), plain.model(batch), rtol=1e-5, atol=1e-6)
    assert (cached.name, cached.quality) == ("hybrid+cache", plain.quality)
    assert cached.shape != plain.shape


def test_loadtest_reports_every_path_and_the_dispatcher(checkpoints, tmp_path, capsys):
    load = ["--queries", 40, "--qps", 400, "--size-mean", 16, "--sla-ms", 1000, "--rounds", 2]
    profile = ["--profile", tmp_path / "p.json", "--profile-seconds", 0.2]
    result = call_json(capsys, "loadtest", *common(checkpoints), *profile, *load)
    assert [row["path"] for row in result["rows"]] == [*REPRESENTATIONS, "dispatcher"]
    for row in result["rows"]:
        assert row["violations"] == 0
        assert 0 <= row["accuracy"] <= 1
        assert row["correct_per_s"] == pytest.approx(row["accuracy"] * row["samples_per_s"])
        assert sum(row["chosen"].values()) == pytest.approx(1)
    call("loadtest", *common(checkpoints), *profile, *load)  # and again, by the same profile, as a table
    captured = capsys.readouterr()
    assert "dispatcher" in captured.out
    assert "warm" not in captured.err


def test_loadtest_sweeps_draws_and_writes(checkpoints, tmp_path, capsys):
    load = [
        "--loads",
        "0.05,0.2",
        "--slas-ms",
        "500,2000",
        "--seconds",
        0.3,
        "--rounds",
        2,
        "--size-mean",
        16,
    ]
    profile = ["--profile", tmp_path / "p.json", "--profile-seconds", 0.2]
    arguments = [*common(checkpoints), *profile, *load, "--arrivals", "bursty"]
    result = call_json(capsys, "loadtest", *arguments, "--output", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "result.json").read_text()) == result
    assert (tmp_path / "out" / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert len(result["rows"]) == 2 * 2 * (len(REPRESENTATIONS) + 1)
    assert result["capacity_of"] in REPRESENTATIONS
    assert result["dispatcher"] == "dispatcher"
    assert call("loadtest", *arguments) == 0
    captured = capsys.readouterr()
    assert max(map(len, captured.out.splitlines())) <= 80
    assert "SLA 500 ms, bursty arrivals" in captured.out
    assert captured.out.count("dispatcher") == 4
    assert "warning: load 0.05, SLA 500 ms: a turn lasts 0.15 s, less than 8 SLAs" in captured.err


def test_loadtest_of_which_nothing_is_answered_has_a_status_of_its_own(checkpoints, tmp_path, capsys):
    """A target that no path can meet: every query is refused."""
    profile = ["--profile", tmp_path / "p.json", "--profile-seconds", 0.2]
    load = ["--qps", 200, "--queries", 20, "--sla-ms", 1e-6, "--rounds", 2]
    assert call("loadtest", *common(checkpoints), *profile, *load) == 3
    assert "refused or failed" in capsys.readouterr().err


@pytest.mark.parametrize("answered", [True, False])
def test_loadgens_verdicts_have_their_reasons(checkpoints, tmp_path, capsys, monkeypatch, answered):
    def judge(engine, queries, *, qps, seconds):
        assert engine.submit(queries[0]).result(60).scores.shape == (len(queries[0]),)
        reason, refused = ("LoadGen: Early stopping satisfied", 3) if answered else ("all refused", 40)
        return LoadGenResult(False, reason, qps, 40, refused, 0, {"99.00 percentile latency (ns)": "2500000"})

    monkeypatch.setattr("mprec.cli.loadtest.run_loadgen", judge)
    load = ["--queries", 40, "--qps", 400, "--sla-ms", 10000, "--driver", "loadgen"]
    profile = ["--profile", tmp_path / "p.json", "--profile-seconds", 0.2]
    arguments = [*common(checkpoints), *profile, *load]
    assert call("loadtest", *arguments) == (0 if answered else 3)
    lines = capsys.readouterr().out.splitlines()
    for name in (*REPRESENTATIONS, "dispatcher"):
        (row,) = (line.split() for line in lines if line.split()[:1] == [name])
        assert row[1:5] == ["INVALID", "2.50", "3" if answered else "40", "0"]
    assert ("satisfied" if answered else "refused") in " ".join(lines)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--sla-ms", "nan"), "--sla-ms"),
        (("--qps", "0"), "--qps"),
        (("--rounds", "0"), "--rounds"),
        (("--arrivals", "often"), "arrivals"),
        (("--qps", "9", "--slas-ms", "5,10"), "--slas-ms"),
        (("--driver", "loadgen", "--arrivals", "bursty"), "--arrivals"),
    ],
)
def test_loadtest_refuses(checkpoints, arguments, message):
    with pytest.raises(ValueError, match=message):
        call("loadtest", *common(checkpoints), *arguments)


def test_plan_from_checkpoints(checkpoints, tmp_path, capsys):
    plans = tmp_path / "plan.json"
    arguments = ["--checkpoints", *files(checkpoints), "--batch-size", 8]
    result = call_json(capsys, "plan", "--memory", "1MiB", *arguments, "--output", plans)
    best = result["plans"]["here"][0]
    assert best["bytes"] <= 1 << 20
    assert not result["simulated"]
    assert json.loads(plans.read_text()) == result
    names = [name for name, _ in data.load(DATA).features]
    assert [row["feature"] for row in best["rows"]] == names
    tight = call_json(capsys, "plan", "--memory", best["bytes"] - 1, *arguments)["plans"]["here"][0]
    assert tight["bytes"] < best["bytes"]
    assert tight["quality"] <= best["quality"]
    multi = call_json(capsys, "plan", "--memory", "1MiB", "--checkpoints", checkpoints / "multi-path.pt")
    assert len(multi["measurements"]) == 3
    with pytest.raises(Infeasible, match=f"no option of feature '{names[0]}' fits"):
        call("plan", "--memory", "10", *arguments)


def test_plan_for_simulated_devices_says_so(tmp_path, capsys):
    device = tmp_path / "gpu.json"
    device.write_text(
        json.dumps({"name": "G", "memory_bytes": 1e9, "flops_per_s": 1e13, "bytes_per_s": 1e12})
    )
    arguments = ["--device", device, "--features", "kaggle", "--quality", "table=0.78,dhe=0.79,hybrid=0.8"]
    assert call("plan", *arguments) == 0
    text = capsys.readouterr().out
    assert text.count("SIMULATED") == text.count("path ") >= 2
    assert call_json(capsys, "plan", *arguments)["simulated"] is True
    spread = call_json(capsys, "plan", *arguments, "--device", device, "--spread")
    assert len(spread["plans"]) == 1
    assert spread["plans"]["G+G"][0]["simulated"] is True


def test_plan_takes_precisions_and_shapes_by_vocabulary(tmp_path, capsys):
    device = tmp_path / "small.json"
    device.write_text(
        json.dumps({"name": "S", "memory_bytes": 4e8, "flops_per_s": 1e13, "bytes_per_s": 1e12})
    )
    quality = "table=0.79,table[int4]=0.789,dhe:sized=0.78"
    result = call_json(capsys, "plan", "--device", device, "--features", "kaggle", "--quality", quality)
    best = result["plans"]["S"][0]
    assert best["bytes"] <= 4e8
    assert {row["choice"] for row in best["rows"]} == {"table", "table[int4]", "dhe:sized"}
    assert {row["precision"] for row in best["rows"]} == {"float32", "int4"}


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["--features", "kaggle", "--quality", "table=0.7"], "--memory"),
        (["--memory", "1GB", "--features", "kaggle"], "--quality"),
        (["--memory", "1GB", "--quality", "table=0.7"], "--features"),
        (["--memory", "1GB", "--features", "kaggle", "--quality", "table=0.7", "--data", DATA], "--data"),
    ],
)
def test_plan_says_what_is_missing(arguments, match):
    with pytest.raises(ValueError, match=match):
        call("plan", *arguments)


@pytest.mark.parametrize(
    ("text", "expected"), [("64MiB", 64 << 20), ("2GB", 2 * 10**9), ("1.5 KiB", 1536), ("12", 12), ("3b", 3)]
)
def test_memory_sizes(text, expected):
    assert parse("plan", "--memory", text)[1].memory == expected


@pytest.mark.parametrize("text", ["", "lots", "-1GB", "5XB", "1.2.3MB"])
def test_bad_memory_sizes(text):
    with pytest.raises(SystemExit):
        parse("plan", f"--memory={text}")


def test_data_of_another_shape_and_a_damaged_checkpoint_are_refused(checkpoints, tmp_path):
    other = ["--checkpoints", *files(checkpoints), "--data", "synthetic:rows=600,vocabulary=10+20"]
    with pytest.raises(ValueError, match="other features"):
        call("profile", *other, *QUICK)
    cut = tmp_path / "cut.pt"
    cut.write_bytes((checkpoints / "table.pt").read_bytes()[:1000])
    with pytest.raises(ValueError, match="damaged"):
        call("profile", "--checkpoints", cut, "--data", DATA, *QUICK)
    with pytest.raises(ValueError, match="table"):
        call("profile", "--checkpoints", *[checkpoints / "table.pt"] * 2, "--data", DATA, *QUICK)
    with pytest.raises(ValueError, match="--checkpoints"):
        call("profile", "--data", DATA)


PROGRAM = (
    "import argparse, sys; from mprec.cli import serve; p = argparse.ArgumentParser();"
    "p.add_argument('--json', action='store_true'); serve.add_arguments(p);"
    "sys.exit(serve.run(p.parse_args(sys.argv[1:])))"
)


@contextlib.contextmanager
def serve_process(*arguments):
    """(process, what it said first)."""
    server = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, "--json", "--port", "0", "--sla-ms", "10000", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    watchdog = threading.Timer(120, server.kill)
    watchdog.start()
    try:
        first = server.stdout.readline()
        assert first, server.communicate()[1]
        yield server, json.loads(first)
    finally:
        watchdog.cancel()
        server.kill()
        server.wait()


def ask(url, content=None):
    """(status, answer)."""
    data = None if content is None else json.dumps(content).encode()
    try:
        with urllib.request.urlopen(url, data, timeout=60) as reply:
            return reply.status, json.loads(reply.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def wait_until_ready(url):
    while (answer := ask(f"{url}/readyz"))[0] != 200:
        assert answer[1]["status"] == "starting"
        time.sleep(0.05)


def test_serve_needs_no_log_reloads_and_drains_on_sigterm(checkpoints, tmp_path):
    kept = tmp_path / "table.pt"
    kept.write_bytes((checkpoints / "table.pt").read_bytes())
    arguments = ["--checkpoints", kept, "--threads", 1, "--profile-seconds", 0.2]
    with serve_process(*arguments) as (server, said):
        assert ask(f"{said['url']}/healthz")[0] == 200  # before it is ready
        wait_until_ready(said["url"])
        row = {"ids": [[0] * len(said["features"])] * 3, "dense": [[0.0] * said["num_dense"]] * 3}
        status, answer = ask(f"{said['url']}/score", row)
        assert (status, answer["paths"]) == (200, {"table": 3})
        assert all(0 < score < 1 for score in answer["scores"])
        kept.write_bytes((checkpoints / "hybrid.pt").read_bytes())
        server.send_signal(signal.SIGHUP)
        while (again := ask(f"{said['url']}/score", row))[1]["paths"] != {"hybrid": 3}:
            assert again[0] == 200
            time.sleep(0.05)
        kept.write_bytes(b"damaged")
        status, content = ask(f"{said['url']}/reload", {})
        assert (status, content["reason"]) == (500, "reload")
        assert ask(f"{said['url']}/score", row)[1]["paths"] == {"hybrid": 3}
        server.send_signal(signal.SIGTERM)
        out, errors = server.communicate(timeout=60)
        assert server.returncode == 0, errors
        counts = json.loads(out)
        assert counts["answered"] == counts["queries"] >= 3
        assert "drained" in errors
        assert "Traceback" not in errors


def test_serve_can_be_stopped_before_it_is_ready(checkpoints):
    with serve_process("--checkpoints", checkpoints / "dhe.pt", "--profile-seconds", 100) as (server, said):
        assert ask(f"{said['url']}/readyz")[1]["status"] == "starting"
        server.send_signal(signal.SIGTERM)
        _, errors = server.communicate(timeout=60)
        assert server.returncode == 0, errors


def test_serve_on_processes_reloads_and_drains(checkpoints, tmp_path):
    kept = tmp_path / "table.pt"
    kept.write_bytes((checkpoints / "table.pt").read_bytes())
    arguments = ["--checkpoints", kept, "--executors", "process:2", "--profile-seconds", 0.2]
    with serve_process(*arguments) as (server, said):
        wait_until_ready(said["url"])
        assert set(ask(f"{said['url']}/stats")[1]["executors"]) == {"cpu 0", "cpu 1"}
        row = {"ids": [[0] * len(said["features"])] * 3, "dense": [[0.0] * said["num_dense"]] * 3}
        assert ask(f"{said['url']}/score", row)[1]["paths"] == {"table": 3}
        kept.write_bytes((checkpoints / "hybrid.pt").read_bytes())
        assert ask(f"{said['url']}/reload", {})[0] == 200
        assert ask(f"{said['url']}/score", row)[1]["paths"] == {"hybrid": 3}
        server.send_signal(signal.SIGTERM)
        out, errors = server.communicate(timeout=60)
        assert server.returncode == 0, errors
        counts = json.loads(out)
        assert counts["answered"] == counts["queries"] == 2
        assert "Traceback" not in errors


@pytest.mark.slow
def test_serve_measures_the_split_of_the_cores_once_and_says_what_it_found(checkpoints):
    arguments = ["--checkpoints", checkpoints / "table.pt", "--profile-seconds", 0.2]
    with serve_process(*arguments) as (server, said):
        wait_until_ready(said["url"])
        server.send_signal(signal.SIGTERM)
        _, errors = server.communicate(timeout=60)
        assert server.returncode == 0, errors
    lines = [line for line in errors.splitlines() if line.startswith("executors ")]
    assert len(lines) == len(splits.candidates(len(os.sched_getaffinity(0))))
    [chosen] = [line for line in lines if line.endswith("(chosen)")]
    name = chosen.split(":")[0].removeprefix("executors ") + ":" + chosen.split(":")[1]
    assert f"on {name}" in errors
    with serve_process(*arguments) as (server, said):
        wait_until_ready(said["url"])
        server.send_signal(signal.SIGTERM)
        _, again = server.communicate(timeout=60)
    assert "comparing executors" in errors
    assert "comparing executors" not in again
    assert f"on {name}" in again


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["--executors", "threads:2"], "--executors"),
        (["--executors", "process:0"], "--executors"),
        (["--executors", "auto", "--threads", "2"], "--threads"),
        (["--executors", "local:1", "--threads", "2"], "--threads"),
        (["--sla-ms", "inf"], "--sla-ms"),
        (["--port", "70000"], "--port"),
        (["--max-ids", "0"], "max_ids"),
        (["--notice-seconds", "-1"], "--notice-seconds"),
    ],
)
def test_serve_names_what_is_out_of_bounds(checkpoints, arguments, match):
    with pytest.raises(ValueError, match=match):
        call("serve", "--checkpoints", checkpoints / "table.pt", *arguments)


def test_a_quick_profile_does_not_pass_for_a_whole_one(tmp_path, monkeypatch):
    """``mprec serve`` measures for seconds, perhaps on random IDs: other commands must not take that."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    paths = [ScoringPath("p", "table", 0.5, len, "shape of p")]
    args = argparse.Namespace(profile=None, data=None)
    whole = default_file(paths)
    quick = _executors.profile_file(args, paths)
    assert quick != whole
    assert quick.parent == whole.parent
    on_data = argparse.Namespace(profile=None, data="movielens")
    assert _executors.profile_file(on_data, paths) not in (quick, whole)
    fake_profile({"p": (1e-6, 1e-9)}).save(whole)
    assert _executors.profile_file(args, paths) == whole
    whole.write_text("damaged")
    assert _executors.profile_file(args, paths) == quick
    assert _executors.profile_file(argparse.Namespace(profile="x.json", data=None), paths).name == "x.json"
