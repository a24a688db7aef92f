"""Which paths of a bundle fit side by side: the choice, and ``mprec plan --bundle``."""

import argparse
import io
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from mprec import checkpoint, data
from mprec.cli import main
from mprec.cli._held import held_paths
from mprec.cli.derive import derived_table
from mprec.derive import derive
from mprec.errors import CheckpointError
from mprec.paths import bundle, paths_from_checkpoints
from mprec.paths.forms import embedding_bytes, embedding_weights
from mprec.planner import Candidate, Infeasible, front, paths_within
from mprec.training import TrainOptions, train_representations

pytestmark = pytest.mark.usefixtures("one_thread")
SPEC = "synthetic:rows=3000,features=3,vocabulary=300,seed=1,dense=2"


def candidate(name, quality, *ms):
    return Candidate(name, quality, 0, dict(zip((1, 128), ms, strict=True)))


PATHS = [
    candidate("table", 0.80, 1.0, 20.0),
    candidate("int8", 0.79, 1.0, 20.0),  # fewer bytes, no faster
    candidate("rank", 0.78, 0.9, 10.0),
    candidate("rank, dense int8", 0.77, 0.9, 4.0),  # of the same rows
    candidate("tiny", 0.70, 0.5, 2.0),
]
WEIGHTS = {
    "table": {"rows": 1000},
    "int8": {"codes": 300},
    "rank": {"low": 100},
    "rank, dense int8": {"low": 100},
    "tiny": {"least": 10},
}


@pytest.mark.parametrize(
    ("memory", "kept", "matched"),
    [
        (1110, ["table", "tiny", "rank", "rank, dense int8"], {"int8": "table"}),
        (1100, ["table", "tiny"], {"int8": "table"}),
        (1005, ["table"], {"int8": "table"}),
        (999, ["int8", "tiny", "rank", "rank, dense int8"], {}),
        (309, ["int8"], {}),
        (110, ["rank", "tiny", "rank, dense int8"], {}),
        (109, ["rank", "rank, dense int8"], {}),
        (99, ["tiny"], {}),
    ],
)
def test_what_fits_side_by_side(memory, kept, matched):
    held = paths_within(PATHS, WEIGHTS, memory)
    assert held.kept == kept
    assert held.matched == matched


def test_the_fastest_is_that_of_the_batch_size():
    paths = [
        candidate("good", 0.8, 9, 90),
        candidate("small batches", 0.7, 1, 80),
        candidate("large", 0.6, 8, 9),
    ]
    weights = {path.name: {path.name: 1} for path in paths}
    assert paths_within(paths, weights, 2, batch_size=1).kept == ["good", "small batches"]
    assert paths_within(paths, weights, 2, batch_size=128).kept == ["good", "large"]


@st.composite
def choices(draw):
    few = st.integers(1, 8)
    paths = [candidate(str(i), draw(few) / 8, draw(few), draw(few)) for i in range(draw(st.integers(1, 7)))]
    parts = st.dictionaries(st.integers(0, 9), st.just(0), min_size=1, max_size=3)
    sizes = [draw(few) for _ in range(10)]
    weights = {path.name: {part: sizes[part] for part in draw(parts)} for path in paths}
    return paths, weights, draw(st.integers(0, 40))


@settings(max_examples=300, deadline=None)
@given(choices())
def test_what_is_kept_is_the_best_and_complete(choice):
    paths, weights, memory = choice
    named = {path.name: path for path in paths}
    alone = [path for path in paths if sum(weights[path.name].values()) <= memory]
    if not alone:
        with pytest.raises(Infeasible):
            paths_within(paths, weights, memory)
        return
    held = paths_within(paths, weights, memory)
    together = {}
    for name in held.kept:
        together |= weights[name]
    assert sum(together.values()) <= memory
    assert named[held.kept[0]].quality == max(path.quality for path in alone)
    # Each that is kept has its use: it is on the front of them; the others have none, or do not fit.
    assert set(front([named[name] for name in held.kept]).values()) == {None}
    for path in paths:
        if path.name in held.matched:
            by = named[held.matched[path.name]]
            assert by.name in held.kept
            assert by.quality >= path.quality
            assert all(by.seconds[batch] <= 1.05 * path.seconds[batch] for batch in path.seconds)
        elif path.name not in held.kept:
            assert sum((together | weights[path.name]).values()) > memory


def test_paths_need_latencies():
    with pytest.raises(ValueError, match="'untimed': no latency"):
        paths_within([Candidate("untimed", 0.5, 1, {})], {"untimed": {}}, 10)
    with pytest.raises(ValueError, match=r"'b': expected latencies at batch sizes \[1, 128\]"):
        paths_within([PATHS[0], Candidate("b", 0.5, 1, {1: 1.0})], WEIGHTS | {"b": {}}, 10)


# ------------------------------------------------------------------------------------------------- command


@pytest.fixture(scope="module")
def found():
    dataset = data.load(SPEC)
    shape = {"dim": 8, "bottom": (8,), "top": (8,)}
    trained = train_representations(dataset, ["table"], TrainOptions(epochs=1, threads=1), **shape)["table"]
    recipes = ["table[int8]", "low_rank:2[int8]", "low_rank:2[int8]/int8"]
    derived = derive(trained.model, trained.metadata, dataset.split(), recipes=recipes, seconds=0.1)
    return {each.name: each.member() for each in derived}, trained.metadata, derived


@pytest.fixture
def made(found, tmp_path):
    """A bundle of the paths named, the first the best and slowest."""

    def make(*names, **facts):
        members = [
            bundle.Member(
                name,
                found[0][name].representation,
                found[0][name].model,
                {"valid": {"auc": 0.8 - position / 100, "accuracy": 0.7}},
                {"latency_ms": {"1": 1.0 / (1 + position), "128": 2.0 / (1 + position)}} | facts,
                found[0][name].dense,
            )
            for position, name in enumerate(names)
        ]
        return str(bundle.save(tmp_path / "bundle", members, found[1]))

    return make


def planned(capsys, *arguments):
    capsys.readouterr()
    assert main(["plan", "--json", *map(str, arguments)]) == 0
    out, said = capsys.readouterr()
    return json.loads(out), said


def test_a_plan_of_a_bundle_is_a_bundle(made, tmp_path, capsys):
    source = made("table", "table[int8]", "low_rank:2[int8]", "low_rank:2[int8]/int8")
    least = tmp_path / "least"
    result, said = planned(capsys, "--checkpoints", source, "--memory", 4000, "--bundle", least)
    kept = ["low_rank:2[int8]", "low_rank:2[int8]/int8"]
    assert [path.name for path in paths_from_checkpoints([least])] == kept
    assert f"2 paths in {least}" in said
    members, _ = bundle.load(least)
    # The two have the same rows.
    assert result["paths"]["bytes"] == embedding_bytes(members[0].model.embeddings) <= 4000
    assert set(result["paths"]["kept"]) == set(kept)
    assert result["paths"]["memory_bytes"] == 4000
    assert result["plans"] == {}  # tables do not fit
    assert "no representation for each feature" in said
    everything, _ = planned(
        capsys, "--checkpoints", source, "--memory", "1MiB", "--output", tmp_path / "p.json"
    )
    assert len(everything["paths"]["kept"]) == 4
    assert everything["plans"]["here"]
    assert json.loads((tmp_path / "p.json").read_text()) == everything
    assert main(["plan", "--checkpoints", source, "--memory", "20KB"]) == 0
    assert "of 4 paths side by side" in capsys.readouterr().out


def test_a_bundle_of_low_rank_alone_has_a_plan(made, tmp_path, capsys):
    """Where low rank matches all other paths, deriving leaves nothing else."""
    source = made("low_rank:2[int8]")
    common = ["--checkpoints", source, "--data", SPEC]
    result, said = planned(capsys, *common, "--memory", "1MiB", "--bundle", tmp_path / "b")
    assert result["paths"]["kept"] == ["low_rank:2[int8]"]
    assert result["plans"] == {}
    assert "none of its paths is of tables or decoders" in said
    assert main(["plan", *common, "--memory", "10"]) == 2
    assert "no path of" in capsys.readouterr().err


def test_a_bundle_that_was_not_measured(made, tmp_path, capsys):
    source = made("table", latency_ms={})
    result, said = planned(capsys, "--checkpoints", source, "--memory", "1MiB")
    assert "paths" not in result
    assert result["plans"]["here"]
    assert "path 'table': no latency is known of it" in said


def test_refusals(made, found, tmp_path, capsys):
    source = made("table")
    (tmp_path / "file").write_text("")
    checkpoint.save(tmp_path / "table.pt", found[0]["table"].model, found[1])
    for arguments, message in (
        (["--checkpoints", source, "--memory", "10", "--bundle", "b"], "no path fits: the smallest needs"),
        (["--checkpoints", source, "--memory", "1MiB", "--bundle", tmp_path / "file"], "is no folder"),
        (["--checkpoints", source, "--memory", "1MiB", "--bundle", f"{source}/../bundle"], "would be lost"),
        (["--checkpoints", source, source, "--memory", "1MiB", "--bundle", "b"], "--bundle goes with"),
        (["--checkpoints", tmp_path / "table.pt", "--memory", "1MiB", "--bundle", "b"], "--bundle goes with"),
    ):
        assert main(["plan", *map(str, arguments)]) == 2
        assert message in capsys.readouterr().err
    assert len(bundle.load(source)[0]) == 1
    with pytest.raises(CheckpointError, match="no validation log_loss"):
        bundle.load(source)[0][0].quality("log_loss")


def test_names_are_whole_in_narrow_tables(found, made):
    """A name is what ``--recipes`` and other commands take."""
    paths = Path(made("table", "low_rank:2[int8]", "low_rank:2[int8]/int8"))
    args = argparse.Namespace(memory=1 << 20, checkpoints=[paths], bundle=None, metric="auc", batch_size=128)
    narrow = Console(width=60, file=io.StringIO(), markup=False)
    for table in (derived_table(found[2], "title"), held_paths(args, {paths: bundle.load(paths)}).table()):
        narrow.print(table)
    assert "…" not in narrow.file.getvalue()


def test_weights_add_up_to_bytes_and_are_told_apart(found):
    members = found[0]
    for member in members.values():
        weights = embedding_weights(member.model.embeddings)
        assert sum(weights.values()) == embedding_bytes(member.model.embeddings)
    low, twin = (
        embedding_weights(members[f"low_rank:2[int8]{dense}"].model.embeddings) for dense in ("", "/int8")
    )
    assert low == twin
    assert not set(low) & set(embedding_weights(members["table"].model.embeddings))
