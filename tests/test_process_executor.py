"""Executors in processes of their own, against the same paths in this process."""

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import threading
import time

import process_paths
import pytest
import torch
from dispatch_fakes import fake_profile

from mprec.bags import Bags
from mprec.data import Batch
from mprec.dispatch import ScoringPath
from mprec.errors import IdOutOfRangeError
from mprec.models import DLRM, MultiPathDLRM
from mprec.nn import DheConfig, FeatureConfig, QuantizedEmbeddingBagCollection, with_representation
from mprec.ops import clear_decoders
from mprec.paths import Scorer
from mprec.serving import Engine, LocalExecutor, ProcessExecutor, QueryRefusedError

DHE = DheConfig(k=32, hidden=(24,))
FEATURES = [FeatureConfig(name, size, 8, dhe=DHE) for name, size in (("a", 50), ("b", 300))]
NUMBERS = 3
PLAIN = ("echo", "double", "raising", "mortal", "threads", "process")


def batch(size, seed=0, bag=3):
    """Two features, ``0..bag`` IDs a bag."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, bag + 1, (2 * size,), generator=generator)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    ids = torch.randint(0, 50, (int(offsets[-1]),), generator=generator)
    return Batch(
        torch.rand(size, NUMBERS, generator=generator), Bags(ids, offsets, num_features=2), torch.rand(size)
    )


def first(kind):
    """One sample, whose first ID is ``kind``."""
    return Batch(
        torch.zeros(1, NUMBERS),
        Bags(torch.tensor([kind, 0]), torch.arange(3), num_features=2),
        torch.zeros(1),
    )


def profile_of(names, seconds=1e-3):
    return fake_profile(dict.fromkeys(names, (seconds, 1e-6)))


def plain_paths(*names):
    return [
        ScoringPath(name, "table", 0.5, getattr(process_paths, name), name, inputs=(2, NUMBERS))
        for name in names
    ]


def model_paths():
    torch.manual_seed(0)
    models = {
        r: DLRM(with_representation(FEATURES, r), NUMBERS, 8, (16,), (16,))
        for r in ("table", "dhe", "hybrid")
    }
    several = MultiPathDLRM(FEATURES, NUMBERS, 8, (16,), (16,))
    models |= {f"multi/{name}": several.path(name) for name in ("table", "select", "hybrid")}
    quantised = DLRM(with_representation(FEATURES, "hybrid"), NUMBERS, 8, (16,), (16,))
    quantised.embeddings = QuantizedEmbeddingBagCollection(quantised.embeddings, "int8", "bfloat16")
    models["quantised"] = quantised
    return [ScoringPath(name, name, 0.5, Scorer(m), name, inputs=(2, NUMBERS)) for name, m in models.items()]


@pytest.fixture(scope="module")
def executor():
    """Every kind of path, in one worker with a small arena."""
    paths = model_paths() + plain_paths(*PLAIN)
    found = ProcessExecutor("one", paths, profile_of([p.name for p in paths]), arena_bytes=1 << 14)
    found.start()
    yield found
    found.close()


def same(executor, path, item):
    expected = LocalExecutor("local", executor.paths, executor.profile).run(path, item)
    torch.testing.assert_close(executor.run(path, item), expected.clone(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("path", [p.name for p in model_paths()])
def test_scores_are_those_of_this_process(executor, path):
    for size in (1, 64):
        same(executor, path, batch(size, seed=size))


def test_paths_run_in_another_process_with_its_threads(executor):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert executor.run("process", first(0)).item() == executor.pid != os.getpid()
        assert executor.run("threads", first(0)).item() == 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("size", [1, 200, 3000])  # 3000 do not fit the arena
def test_a_batch_arrives_whole_through_the_arena_and_past_it(executor, size):
    item = batch(size)
    assert torch.equal(executor.run("echo", item), process_paths.echo(item))
    assert torch.equal(executor.run("double", item), process_paths.double(item))


def test_views_other_dtypes_and_odd_strides_arrive_as_they_are(executor):
    item = batch(20)
    strided = Batch(
        item.dense.t().contiguous().t(), item.bags._replace(indices=item.indices.int()), item.labels
    )
    assert torch.equal(executor.run("echo", strided), process_paths.echo(item))
    strided = Batch(item.dense.t().contiguous().t(), item.bags, item.labels)
    assert torch.equal(executor.run("echo", strided), process_paths.echo(item))
    same(
        executor,
        "table",
        Batch(item.dense.requires_grad_(), item.bags, item.labels),
    )
    with pytest.raises(TypeError):
        executor.run(
            "table", Batch(item.dense, item.bags._replace(indices=item.indices.float()), item.labels)
        )


def test_results_do_not_share_memory_with_later_ones(executor):
    one = executor.run("echo", batch(10, 1))
    kept = one.clone()
    executor.run("echo", batch(10, 2))
    assert torch.equal(one, kept)


@pytest.mark.parametrize(
    ("kind", "expected", "text"),
    [
        (1, IdOutOfRangeError, "ID 1 is bad"),
        (2, KeyError, "'name'"),
        (3, RuntimeError, "Custom: of my own"),
        (4, RuntimeError, "SystemExit: 7"),
        (5, RuntimeError, "UnicodeDecodeError: 'utf-8' codec can't decode"),
    ],
)
def test_what_a_path_raises_comes_back(executor, kind, expected, text):
    with pytest.raises(expected) as caught:
        executor.run("raising", first(kind))
    assert type(caught.value) is expected
    assert str(caught.value).startswith(text)
    assert "process_paths.py" in caught.value.__notes__[0]
    assert executor.run("echo", first(3)).item() == 3


def test_an_id_out_of_range_is_named_as_here(executor):
    with pytest.raises(IdOutOfRangeError, match="'b'"):
        executor.run(
            "table",
            Batch(
                torch.zeros(1, 3),
                Bags(torch.tensor([0, 300]), torch.arange(3), num_features=2),
                torch.zeros(1),
            ),
        )


@pytest.mark.parametrize("name", ["table", "dhe", "multi/select"])
def test_weights_are_shared_and_their_changes_seen(executor, name):
    """Partial writes too: the sample of a packed decoder's weights would miss the element that is written."""
    model = next(p.model.model for p in executor.paths if p.name == name)
    for parameter in model.parameters():
        assert parameter.is_shared()
    item, pid = batch(16, 5), executor.pid
    for parameter in model.parameters():
        before = executor.run(name, item)
        with torch.no_grad():
            few = parameter[:, 5:9] if parameter.dim() == 2 and parameter.shape[1] > 10 else parameter
            few.mul_(-3).add_(0.01)
        same(executor, name, item)
        assert not torch.equal(executor.run(name, item), before)
    weight = next(iter(model.embeddings.dhe._modules.values())).decoder[0].weight if name == "dhe" else None
    if weight is not None:
        before = executor.run(name, item)
        weight.data[:, 5] += 10  # raises no counter and touches no sampled element
        clear_decoders()
        same(executor, name, item)
        assert not torch.equal(executor.run(name, item), before)
    assert executor.pid == pid


def test_two_executors_share_one_copy():
    paths = model_paths()[:1]
    one, two = (ProcessExecutor(name, paths, profile_of(["table"])) for name in ("one", "two"))
    weight = paths[0].model.model.embeddings.tables._modules["a"].weight
    handles = [{storage.data_ptr() for storage in executor._packed.storages} for executor in (one, two)]
    assert handles[0] == handles[1]
    assert weight.untyped_storage().data_ptr() in handles[0]


def test_before_start_and_after_close_the_caller_scores():
    made = ProcessExecutor("idle", plain_paths("process"), profile_of(["process"]))
    assert made.pid is None
    assert made.run("process", first(0)).item() == float(torch.tensor(float(os.getpid())))
    made.close()
    made.close()


@pytest.mark.parametrize("trouble", ["lambda", "gradients", "threads", "arena"])
def test_what_cannot_go_to_a_process_is_named(trouble):
    paths, options, name = plain_paths("echo"), {}, "path 'bad'"
    if trouble == "lambda":
        paths.append(ScoringPath("bad", "table", 0.5, lambda b: b.labels))
    elif trouble == "gradients":
        scorer = Scorer(torch.nn.Linear(2, 2))
        scorer.extra = torch.ones(2, requires_grad=True) * 2
        paths.append(ScoringPath("bad", "table", 0.5, scorer))
    elif trouble == "threads":
        options, name = {"threads": 0}, "threads: expected at least 1, got 0"
    else:
        options, name = {"arena_bytes": 0}, "arena_bytes: expected at least 8, got 0"
    with pytest.raises(ValueError, match=name):
        ProcessExecutor("bad", paths, profile_of([p.name for p in paths]), **options)


def test_a_worker_that_cannot_start_says_why():
    made = ProcessExecutor("broken", plain_paths("echo"), profile_of(["echo"]))
    made._packed.models[:] = [pickle.dumps(process_paths.echo)[:-1]]
    with pytest.raises(RuntimeError, match=r"(?s)'broken': its worker could not start:.*unpack"):
        made.start()


def test_a_dead_worker_is_an_error_and_the_next_call_has_another(executor):
    pid = executor.pid
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match=r"'one': its worker ended with exit code -9"):
        executor.run("echo", first(3))
    assert executor.run("echo", first(3)).item() == 3
    assert executor.pid != pid


def test_a_worker_that_dies_again_is_left_alone_for_a_while(executor):
    for _ in range(2):
        with pytest.raises(RuntimeError, match="exit code -9"):
            executor.run("mortal", first(666))
    with pytest.raises(RuntimeError, match=r"ended 2 times in a row, at last with exit code -9"):
        executor.run("echo", first(3))
    assert executor._rest_until <= time.monotonic() + 1
    executor._rest_until = 0.0
    assert executor.run("echo", first(3)).item() == 3
    assert executor._deaths == 0


def test_an_interrupted_call_leaves_no_scores_for_the_next(executor, monkeypatch):
    worker = executor._worker

    def interrupted(message):
        worker._pipe.send_bytes(message)
        raise KeyboardInterrupt

    monkeypatch.setattr(worker, "ask", interrupted)
    with pytest.raises(KeyboardInterrupt):
        executor.run("echo", first(9))
    assert executor.run("echo", first(4)).item() == 4
    assert executor.pid != worker.process.pid


def test_a_replaced_module_goes_to_a_new_worker(executor):
    model, item = executor.paths[0].model.model, batch(9)
    pid, before = executor.pid, executor.run("table", item)
    model.top = torch.nn.Sequential(*(torch.nn.Linear(n, m) for n, m in ((11, 4), (4, 1))))
    same(executor, "table", item)
    assert executor.pid != pid
    assert not torch.equal(executor.run("table", item), before)


def test_an_engine_over_two_processes_answers_each_query_once_and_survives_a_kill():
    paths, profile = plain_paths("slow"), profile_of(["slow"], 5e-3)
    executors = [ProcessExecutor(f"cpu{i}", paths, profile) for i in range(2)]
    generator = torch.Generator().manual_seed(1)
    sizes = torch.randint(1, 200, (500,), generator=generator).tolist()
    with Engine(sla_s=60.0, executors=executors, max_batch=512) as engine:
        queries = [batch(size, seed) for seed, size in enumerate(sizes)]
        futures = []
        for query in queries:
            futures.append(engine.submit(query))
            time.sleep(0.0005)
        for query, future in zip(queries, futures, strict=True):
            assert torch.equal(future.result(60).scores, process_paths.echo(query))
        counts = engine.statistics()
        assert counts["answered"] == counts["queries"] == 500
        assert all(counts["executors"][e.name]["batches"] > 0 for e in executors)

        # One worker dies in the middle: every query ends, and the answers are right.
        futures = []
        for number, query in enumerate(queries):
            futures.append(engine.submit(query))
            if number == 250:
                os.kill(executors[0].pid, signal.SIGKILL)
            time.sleep(0.0005)
        answered = 0
        for query, future in zip(queries, futures, strict=True):
            with contextlib.suppress(QueryRefusedError, RuntimeError):
                assert torch.equal(future.result(60).scores, process_paths.echo(query))
                answered += 1
        counts = engine.statistics()
        ended = counts["answered"] + counts["failed"] + sum(counts["refused"].values())
        assert ended == counts["queries"] == 1000
        assert answered >= 250
    assert all(executor.pid is None for executor in executors)


def test_close_waits_for_the_batch_under_way(executor):
    made = ProcessExecutor("closing", plain_paths("slow", "process"), profile_of(["slow", "process"]))
    made.start()
    pid, found = made.pid, []
    thread = threading.Thread(target=lambda: found.append(made.run("slow", first(3))))
    thread.start()
    while not made._lock.locked() and not found:
        time.sleep(0.0005)
    made.close()
    thread.join(10)
    assert [scores.item() for scores in found] == [3.0]
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert made.run("process", first(0)).item() == float(torch.tensor(float(os.getpid())))


def is_zombie(pid):
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return False


SCRIPT = """
import os, sys, time
sys.path.insert(0, {here!r})
import process_paths
from test_process_executor import plain_paths, profile_of, first
from mprec.serving import ProcessExecutor

if __name__ == "__main__":
    executor = ProcessExecutor("child", plain_paths("echo"), profile_of(["echo"]))
    executor.start()
    print(executor.pid, flush=True)
    {end}
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("end", "sent", "code"),
    [
        ("time.sleep(60)", signal.SIGKILL, -signal.SIGKILL),
        ("time.sleep(60)", signal.SIGTERM, -signal.SIGTERM),
        ("time.sleep(60)", signal.SIGINT, -signal.SIGINT),
        ("pass", None, 0),
    ],
)
def test_no_worker_outlives_its_parent(tmp_path, end, sent, code):
    file = tmp_path / "script.py"
    file.write_text(SCRIPT.format(here=os.path.dirname(__file__), end=end))
    parent = subprocess.Popen(
        [sys.executable, file], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    pid = int(parent.stdout.readline())
    if sent is not None:
        os.kill(pid, signal.SIGINT)  # as Ctrl-C and service managers send it to the whole group
        os.kill(pid, signal.SIGTERM)
        time.sleep(0.1)
        os.kill(pid, 0)  # it leaves these to its parent
        parent.send_signal(sent)
    assert parent.wait(30) == code
    end_s = time.monotonic() + 10
    while time.monotonic() < end_s:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            break
        # A container may have no process that reaps orphans.
        if is_zombie(pid):
            break
        time.sleep(0.02)
    else:
        pytest.fail(f"worker {pid} goes on")
