"""Engines whose paths are native programs: queries are joined, scored and cut without the interpreter."""

import gc
import threading
import time
import weakref

import pytest
import torch
from dispatch_fakes import fake_profile
from hypothesis import given, settings
from hypothesis import strategies as st

from mprec.bags import Bags
from mprec.cache import CachedEmbeddingBagCollection
from mprec.data import Batch
from mprec.dispatch import Dispatcher, ScoringPath
from mprec.errors import IdOutOfRangeError
from mprec.models import DLRM
from mprec.nn import DheConfig, FeatureConfig, with_representation
from mprec.paths.checkpoints import Scorer
from mprec.serving import Engine, LocalExecutor, QueryRefusedError

SIZES = (11, 7)
DHE = DheConfig(k=8, hidden=(8,))
COSTS = {"table": (1e-6, 1e-7), "hybrid": (2e-6, 2e-7)}
QUALITY = {"table": 0.78, "hybrid": 0.795}


def model(representation, seed=0):
    torch.manual_seed(seed)
    features = with_representation(
        [FeatureConfig(f"f{i}", size, 8) for i, size in enumerate(SIZES)], representation, DHE
    )
    return DLRM(features, 3, 8, bottom=(8,), top=(8,)).eval()


@pytest.fixture(scope="module")
def models():
    return {name: model(name) for name in COSTS}


def paths(models):
    return [Scorer(models[name]).path(name, name, QUALITY[name], name) for name in COSTS]


def engine_of(models, executors=1, **options):
    found = [LocalExecutor(f"cpu{i}", paths(models), fake_profile(COSTS)) for i in range(executors)]
    return Engine(executors=found, **{"sla_s": 10.0, **options})


def query(samples, seed=0, ids=torch.int64, offsets=torch.int64, bags=True):
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 4 if bags else 2, (2, samples), generator=g)
    if not bags:
        lengths.fill_(1)
    indices = [
        torch.randint(0, size, (int(n.sum()),), generator=g) for size, n in zip(SIZES, lengths, strict=True)
    ]
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.flatten().cumsum(0)])
    dense = torch.randn(samples, 3, generator=g)
    return Batch(
        dense, Bags(torch.cat(indices).to(ids), starts.to(offsets), num_features=2), torch.zeros(samples)
    )


def expected(models, answer, batch):
    """Scores of the path that answered, by the model itself."""
    (path,) = answer.paths
    with torch.no_grad():
        return models[path](batch.dense, batch.indices.long(), batch.offsets.long()).sigmoid()


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=12),
    widths=st.lists(st.sampled_from([torch.int32, torch.int64]), min_size=2, max_size=2),
    mixed=st.booleans(),
    max_batch=st.sampled_from([1, 7, 64, 2048]),
    executors=st.integers(1, 2),
)
def test_scores_are_the_models(models, sizes, widths, mixed, max_batch, executors):
    """Whatever is joined and cut, each query gets its own scores."""
    queries = [
        query(size, i, widths[i % 2 if mixed else 0], widths[(i + 1) % 2 if mixed else 1])
        for i, size in enumerate(sizes)
    ]
    with engine_of(models, executors, max_batch=max_batch) as engine:
        answers = [future.result(30) for future in [engine.submit(q) for q in queries]]
    for answer, batch in zip(answers, queries, strict=True):
        assert sum(answer.paths.values()) == len(batch)
        if len(answer.paths) == 1:
            torch.testing.assert_close(answer.scores, expected(models, answer, batch), rtol=1e-4, atol=1e-6)
    counts = engine.statistics()
    assert counts["answered"] == len(sizes)
    assert sum(counts["samples"].values()) == sum(sizes)


def test_only_the_query_at_fault_fails(models):
    good, bad = query(5), query(4, seed=1, bags=False)
    bad.indices[0] = SIZES[0]
    with engine_of(models) as engine:
        futures = [engine.submit(q) for q in (good, bad, good)]
        with pytest.raises(IdOutOfRangeError):
            futures[1].result(30)
        for future in futures[::2]:
            answer = future.result(30)
            torch.testing.assert_close(answer.scores, expected(models, answer, good), rtol=1e-4, atol=1e-6)
    assert engine.statistics()["failed"] == 1


def test_forms_that_no_program_takes_are_answered_by_the_model(models):
    odd = query(6)
    odd = Batch(
        odd.dense.t().contiguous().t(),
        odd.bags._replace(indices=odd.indices.to(torch.int16)),
        odd.labels,
    )
    queries = [query(3, 1), odd, query(4, 2)]
    engine = engine_of(models)
    futures = [engine.submit(q) for q in queries]  # all in one batch, as nobody takes them yet
    with engine:
        for future, batch in zip(futures, queries, strict=True):
            answer = future.result(30)
            torch.testing.assert_close(answer.scores, expected(models, answer, batch), rtol=1e-4, atol=1e-6)


def test_a_query_that_goes_with_no_other_fails_alone(models):
    odd = query(6)
    odd = Batch(odd.dense, odd.bags._replace(indices=odd.indices.float()), odd.labels)
    engine = engine_of(models)
    futures = [engine.submit(q) for q in (query(3, 1), odd, query(4, 2))]
    with engine:
        assert isinstance(futures[1].exception(30), TypeError)
        for future, batch in zip(futures[::2], (query(3, 1), query(4, 2)), strict=True):
            answer = future.result(30)
            torch.testing.assert_close(answer.scores, expected(models, answer, batch), rtol=1e-4, atol=1e-6)


def test_scores_that_are_not_finite_are_errors():
    broken = model("table")
    with torch.no_grad():
        broken.top[0].bias.fill_(float("nan"))
    scorer = Scorer(broken)
    path = scorer.path("table", "table", 0.7, "x")
    with (
        Engine(Dispatcher([path], fake_profile({"table": COSTS["table"]})), sla_s=10.0) as engine,
        pytest.raises(ArithmeticError, match="not finite"),
    ):
        engine.submit(query(3)).result(30)


@pytest.mark.parametrize("how", ["in place", "replaced", "silently"])
def test_changed_weights_are_noticed(how):
    changing = model("table")
    path = Scorer(changing).path("table", "table", 0.7, "x")
    batch = query(9)
    with Engine(Dispatcher([path], fake_profile({"table": COSTS["table"]})), sla_s=10.0) as engine:
        before = engine.submit(batch).result(30).scores
        layer = changing.top[0]
        with torch.no_grad():
            if how == "in place":
                layer.weight.mul_(-3.0)
            elif how == "replaced":
                layer.weight = torch.nn.Parameter(-3.0 * layer.weight)
            else:
                layer.weight.data.numpy()[:] *= -3.0
        threading.Event().wait(0.01)
        after = [engine.submit(batch).result(30).scores for _ in range(3)]
        with torch.no_grad():
            want = changing(batch.dense, batch.indices, batch.offsets).sigmoid()
    assert not torch.allclose(before, want, atol=1e-3)
    for scores in after:
        torch.testing.assert_close(scores, want, rtol=1e-4, atol=1e-6)


def test_a_model_that_loses_its_native_form_while_it_serves_is_called():
    changing = {name: model(name) for name in COSTS}
    with engine_of(changing) as engine:
        assert engine.submit(query(3)).result(30)
        for each in changing.values():
            layer = next(m for m in each.top.modules() if isinstance(m, torch.nn.Linear))
            layer.register_forward_hook(lambda module, inputs, output: output + 1)
        settled = 0
        for seed in range(100):  # changes are noticed within a millisecond
            asked = query(4, seed)
            answer = engine.submit(asked).result(30)
            wanted = expected(changing, answer, asked)
            settled = settled + 1 if torch.allclose(answer.scores, wanted, atol=1e-5) else 0
            time.sleep(1e-3)
        assert settled > 50


def test_the_native_path_is_what_runs(models, monkeypatch):
    """Models are called for no query that programs take."""
    calls = []
    found = paths(models)
    for path in found:
        monkeypatch.setattr(path.model.compiled, "_by_model", lambda *a: calls.append(a))
    monkeypatch.setattr(LocalExecutor, "run", LocalExecutor.run)  # as it is
    with Engine(Dispatcher(found, fake_profile(COSTS)), sla_s=10.0) as engine:
        monkeypatch.setattr(Engine, "_run", lambda self, index, job: calls.append(job))
        for future in [engine.submit(query(3, i)) for i in range(20)]:
            future.result(30)
    assert not calls


def test_caches_and_hot_rows_are_served_natively(monkeypatch):
    """The cache learns and counts by the engine's threads; changed weights empty it."""
    cached = model("hybrid")
    cached.embeddings = CachedEmbeddingBagCollection(cached.embeddings, 1 << 14)
    for name, served in (("hybrid", cached), ("table", model("hot_dhe"))):
        path, asked = Scorer(served).path(name, name, QUALITY[name], name), []
        assert path.model.compiled is not None
        with Engine(Dispatcher([path], fake_profile({name: COSTS[name]})), sla_s=10.0) as engine:
            run = engine._run
            monkeypatch.setattr(engine, "_run", lambda *a, run=run, asked=asked: (asked.append(a), run(*a)))
            for change in (False, True):
                if change:
                    with torch.no_grad():
                        for p in served.embeddings.parameters():
                            p.mul_(1.5)
                    threading.Event().wait(0.01)
                batches = [query(n + 1, n) for n in range(20)]
                for batch, future in [(batch, engine.submit(batch)) for batch in batches]:
                    want = expected({name: served}, answer := future.result(30), batch)
                    torch.testing.assert_close(answer.scores, want, rtol=1e-4, atol=1e-6)
                assert change or not asked
    features = cached.embeddings.stats().features
    assert all(0 < feature.rows <= size for feature, size in zip(features.values(), SIZES, strict=True))
    assert all(feature.hits for feature in features.values())


def test_an_executor_that_runs_in_its_own_way_has_no_programs(models):
    class Own(LocalExecutor):
        def run(self, path, batch):
            return super().run(path, batch)

    assert Own("cpu", paths(models), fake_profile(COSTS)).program("table") is None
    assert LocalExecutor("cpu", paths(models), fake_profile(COSTS)).program("table") is not None
    plain = ScoringPath("plain", "table", 0.5, lambda batch: batch.labels)
    assert LocalExecutor("cpu", [plain], fake_profile({"plain": COSTS["table"]})).program("plain") is None


def test_paths_are_replaced_while_serving(models):
    other = {name: model(name, seed=1) for name in COSTS}
    batch = query(8)
    with engine_of(models) as engine:
        futures = []
        for turn in range(6):
            futures += [engine.submit(batch) for _ in range(50)]
            engine.replace(
                executors=[LocalExecutor("cpu0", paths((models, other)[turn % 2]), fake_profile(COSTS))]
            )
        answers = [future.result(30) for future in futures]
        last = engine.submit(batch).result(30)
    torch.testing.assert_close(last.scores, expected(other, last, batch), rtol=1e-4, atol=1e-6)
    for answer in answers:
        matches = [
            torch.allclose(answer.scores, expected(m, answer, batch), rtol=1e-4, atol=1e-6)
            for m in (models, other)
        ]
        assert any(matches)


def test_replayed_queries_keep_their_outcomes(models):
    queries = [query(5, i) for i in range(30)]
    queries[7].indices[:] = 99
    with engine_of(models, sla_s=5.0) as engine:
        found = engine.replay(queries, [1e-3 * i for i in range(30)])
        with pytest.raises(ValueError, match="at_s: expected 30 times"):
            engine.replay(queries, [0.0])
    assert [each.failed for each in found] == [i == 7 and len(queries[7].indices) > 0 for i in range(30)]
    for each, batch in zip(found, queries, strict=True):
        assert each.refused == ""
        assert each.late_s >= 0
        if not each.failed:
            assert each.finished_s > each.due_s
            torch.testing.assert_close(each.scores, expected(models, each, batch), rtol=1e-4, atol=1e-6)
    with pytest.raises(RuntimeError, match="started engine"):
        engine_of(models).replay(queries, [0.0] * 30)


def test_a_replay_of_a_closed_engine_refuses(models):
    engine = engine_of(models).start()
    engine.close()
    found = engine.replay([query(3)] * 2, [0.0, 0.0])
    assert [each.refused for each in found] == ["closed", "closed"]


def test_refused_and_cancelled_queries_are_let_go(models):
    """Futures are kept until they have their outcome, and no longer."""
    engine = engine_of(models, max_queue=10)
    kept = engine.submit(query(8))
    refused, cancelled = engine.submit(query(8)), engine.submit(query(2))
    assert refused.exception(0).reason == "full"
    assert cancelled.cancel()
    assert cancelled.cancelled()
    looked_at = [weakref.ref(future) for future in (kept, refused, cancelled)]
    del refused, cancelled
    gc.collect()
    assert [ref() is None for ref in looked_at] == [False, True, True]
    engine.close(drain=False)
    assert kept.exception(0).reason == "closed"
    del kept
    gc.collect()
    assert looked_at[0]() is None


def test_the_callers_own_thread_scores(models):
    """As ``submit`` does, but that no worker is woken for a short query."""
    queries = [query(size, size) for size in (1, 5, 40)]
    with engine_of(models) as engine:
        for batch in queries * 20:
            answer = engine.score(batch)
            torch.testing.assert_close(answer.scores, expected(models, answer, batch), rtol=1e-4, atol=1e-6)
            assert answer.paths == {"hybrid": len(batch)}
            assert 0 < answer.latency_s < 10
        counts = engine.statistics()
    assert counts["answered"] == counts["batches"] == 60
    with pytest.raises(QueryRefusedError, match="closed"):
        engine.score(queries[0])
    with pytest.raises(RuntimeError, match="started engine"):
        engine_of(models).score(queries[0])


def test_what_a_query_that_is_scored_raises(models):
    bad, wide = query(4, seed=1, bags=False), query(9)
    bad.indices[0] = SIZES[0]
    odd = Batch(
        wide.dense.t().contiguous().t(),
        wide.bags._replace(indices=wide.indices.to(torch.int16)),
        wide.labels,
    )
    with engine_of(models, max_queue=8) as engine:
        with pytest.raises(IdOutOfRangeError):
            engine.score(bad)
        with pytest.raises(QueryRefusedError) as refused:
            engine.score(wide)
        with pytest.raises(ValueError, match="features"):
            engine.score(
                Batch(wide.dense, wide.bags._replace(offsets=wide.offsets[:-9], num_features=1), wide.labels)
            )
        with pytest.raises(ValueError, match="sla_s"):
            engine.score(bad, sla_s=0.0)
        weights = torch.ones(len(wide.indices))
        weighted = Batch(wide.dense, wide.bags._replace(per_sample_weights=weights), wide.labels)
        for send in (engine.score, engine.submit, lambda batch: engine.replay([batch], [0.0])):
            with pytest.raises(ValueError, match="without per_sample_weights"):
                send(weighted)
        assert engine.score(query(8)).scores.shape == (8,)
    assert refused.value.reason == "full"
    with engine_of(models) as engine:  # no program takes it
        answer = engine.score(odd)
    torch.testing.assert_close(answer.scores, expected(models, answer, wide), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("executors", [1, 2])
def test_many_threads_score(models, executors):
    """Beside queries that are submitted, bad ones among them; each gets its own outcome."""
    wrong = []

    def client(seed):
        for turn in range(40):
            batch = query(1 + (seed + turn) % 9, seed * 100 + turn)
            if turn % 10 == 3 and len(batch.indices):
                batch.indices[0] = SIZES[0] + 50
                try:
                    engine.score(batch)
                    wrong.append("no error")
                except IdOutOfRangeError:
                    continue
            answer = engine.score(batch) if turn % 2 else engine.submit(batch).result(30)
            if not torch.allclose(answer.scores, expected(models, answer, batch), rtol=1e-4, atol=1e-6):
                wrong.append((seed, turn))

    with engine_of(models, executors) as engine:
        clients = [threading.Thread(target=client, args=(seed,)) for seed in range(6)]
        for thread in clients:
            thread.start()
        for thread in clients:
            thread.join()
    assert not wrong
    counts = engine.statistics()
    assert counts["queries"] == counts["answered"] + counts["failed"] == 240


def test_a_batch_outlives_the_program_that_reads_it():
    """A query that is cancelled while a program reads its tensors keeps them until the program has ended."""
    torch.manual_seed(0)
    features = with_representation([FeatureConfig(f"f{i}", 1000, 16) for i in range(2)], "dhe", DheConfig())
    slow = DLRM(features, 3, 16, bottom=(64,), top=(512, 512)).eval()
    path = Scorer(slow).path("dhe", "dhe", 0.7, "x")
    size = 60_000
    profile = fake_profile({"dhe": (1e-6, 1e-8)}, batch_sizes=tuple(2**i for i in range(17)))
    with Engine(Dispatcher([path], profile), sla_s=100.0, max_batch=size) as engine:
        batch = Batch(
            torch.randn(size, 3),
            Bags(torch.randint(0, 1000, (2 * size,)), torch.arange(2 * size + 1), num_features=2),
            torch.zeros(size),
        )
        kept = weakref.ref(batch.indices)
        future = engine.submit(batch)
        lane = engine._lanes[0]
        while not engine._native.uses(0, lane):
            threading.Event().wait(1e-3)
        assert future.cancel()
        del future, batch
        alive = kept() is not None
        if engine._native.uses(0, lane):  # still, so it did while we looked
            assert alive
        else:
            pytest.skip("this machine was too fast or too busy")
        while engine._native.uses(0, lane):
            threading.Event().wait(1e-3)
        for _ in range(1000):
            if kept() is None:
                break
            threading.Event().wait(1e-3)
        assert kept() is None
        # Nobody is told of the cancelled query, but the next one's client is.
        small = Bags(torch.tensor([1, 2, 3, 4]), torch.arange(5), num_features=2)
        answer = engine.submit(Batch(torch.randn(2, 3), small, torch.zeros(2))).result(timeout=30)
        assert len(answer.scores) == 2
    assert engine.statistics()["cancelled"] == 1
