"""The split of the cores among executors: how it is written, measured, chosen and kept."""

import threading
import time

import pytest
import torch
from dispatch_fakes import fake_profile
from process_paths import echo, threads

from mprec.bags import Bags
from mprec.data import Batch
from mprec.dispatch import ScoringPath
from mprec.serving import LocalExecutor, ProcessExecutor, splits
from mprec.serving.executors import Executor
from mprec.serving.splits import Split

PROFILE = fake_profile({"p": (1e-5, 1e-8)})


def batch(size):
    return Batch(
        torch.zeros(size, 1),
        Bags(torch.zeros(size, dtype=torch.int64), torch.arange(size + 1)),
        torch.zeros(size),
    )


def path(model=echo):
    return ScoringPath("p", "table", 0.5, model, "shape of p", inputs=(1, 1))


@pytest.mark.parametrize(
    ("text", "split"),
    [
        ("local:2", Split(0, 2)),
        ("local:3x2", Split(0, 2, 3)),
        ("process:3", Split(3, 1)),
        ("process:2x4", Split(2, 4)),
    ],
)
def test_splits_are_written(text, split):
    assert Split.parse(text) == split
    assert Split.parse(str(split)) == split


@pytest.mark.parametrize(
    "text",
    ["", "local", "local:0", "local:2x0", "local:0x1", "process:0", "process:2x0", "auto", "process:-1"],
)
def test_other_splits_are_refused(text):
    with pytest.raises(ValueError, match="expected"):
        Split.parse(text)


def test_candidates_fit_the_cores():
    assert splits.candidates(1) == [Split(0, 1)]
    two = {Split(0, 1), Split(0, 2), Split(0, 1, 2), Split(1, 1), Split(2, 1)}
    assert set(splits.candidates(2)) == two
    for cores in (2, 3, 4, 7, 64):
        found = splits.candidates(cores)
        assert len(set(found)) == len(found)
        assert all(max(split.processes, split.workers) * split.threads <= cores for split in found)
        assert {Split(0, 1), Split(0, 2), Split(cores, 1)} <= set(found)


def test_executors_of_a_split():
    [local] = splits.executors(Split(0, 2), [path()], PROFILE)
    assert type(local) is LocalExecutor
    some = splits.executors(Split(2, 3), [path()], PROFILE)
    assert [type(e) for e in some] == [ProcessExecutor] * 2
    assert [e.threads for e in some] == [3, 3]
    assert len({e.name for e in some}) == 2
    here = splits.executors(Split(0, 1, 3), [path()], PROFILE)
    assert [type(e) for e in here] == [LocalExecutor] * 3
    assert len({e.name for e in here}) == 3


def test_a_kept_executor_runs_where_its_own_does(monkeypatch):
    monkeypatch.setattr(echo, "program", lambda: "a program", raising=False)
    local, process = LocalExecutor("a", [path()], PROFILE), ProcessExecutor("b", [path()], PROFILE)
    assert splits._Kept(local).program("p") == "a program"
    assert splits._Kept(process).program("p") is None


class Slow(Executor):
    """Notes how many start at the same time."""

    meeting = None

    def start(self):
        self.meeting.wait(20)  # of all of them, or BrokenBarrierError
        self.started = True

    def close(self):
        self.closed = True


class Failing(Executor):
    def start(self):
        raise RuntimeError("not today")


def test_executors_start_side_by_side_and_all_are_closed_if_one_fails():
    Slow.meeting = threading.Barrier(3)
    some = [Slow(f"{i}", [path()], PROFILE) for i in range(3)]
    splits.start(some)
    assert all(e.started for e in some)
    Slow.meeting = threading.Barrier(2)
    some = [*(Slow(f"{i}", [path()], PROFILE) for i in range(2)), Failing("f", [path()], PROFILE)]
    with pytest.raises(RuntimeError, match="not today"):
        splits.start(some)
    assert all(e.closed for e in some[:2])


def queries(sizes=(1, 8)):
    return {size: [lambda size=size: batch(size)] for size in sizes}


def test_splits_are_measured_and_leave_nothing_behind():
    before, told = torch.get_num_threads(), []
    wanted = [Split(0, 1), Split(2, 1)]
    rates = splits.measure(
        wanted, [path()], PROFILE, queries(), seconds=0.02, progress=lambda what, share: told.append(what)
    )
    assert list(rates) == wanted
    assert all(set(of) == {1, 8} and min(of.values()) > 0 for of in rates.values())
    assert torch.get_num_threads() == before
    assert {"starting processes", "comparing executors"} <= set(told)
    assert not [t for t in threading.enumerate() if t.name.startswith("mprec-")]


def test_the_faster_of_two_is_found():
    """A model that sleeps, on queries that are not merged: two processes do twice as much as one."""
    rates = splits.measure(
        [Split(1, 1), Split(2, 1)], [path(sleeping)], PROFILE, queries((128,)), seconds=0.3
    )
    assert splits.best(rates) == Split(2, 1)


def sleeping(batch):
    time.sleep(0.02)
    return echo(batch)


def test_a_path_that_fails_is_told():
    with pytest.raises(RuntimeError, match="path 'p' failed"):
        splits.measure([Split(0, 1)], [path(lambda batch: 1 / 0)], PROFILE, queries(), seconds=0.01)


def test_the_best_is_so_over_all_sizes():
    rates = {
        Split(0, 1): {1: 100.0, 128: 10.0},
        Split(2, 1): {1: 90.0, 128: 20.0},
        Split(0, 2): {1: 10.0, 128: 30.0},
    }
    assert splits.best(rates) == Split(2, 1)


def test_what_was_measured_is_kept_for_these_paths_on_this_machine(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    rates = {Split(0, 1): {1: 100.5, 128: 10.0}, Split(2, 1): {1: 90.0, 128: 20.0}}
    assert splits.load([path()]) is None
    splits.save(rates, [path()])
    assert splits.load([path()]) == rates
    assert splits.load([ScoringPath("p", "table", 0.5, threads, "another shape")]) is None
    [file] = (tmp_path / "mprec").iterdir()
    for content in (b"", b"{}", b"[]", b'{"version": 1, "queries_per_s": {"local:0": {"1": 2}}}'):
        file.write_bytes(content)
        assert splits.load([path()]) is None
