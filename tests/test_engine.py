import random
import threading
import time

import pytest
import torch
from dispatch_fakes import Clock, fake_profile
from hypothesis import given, settings
from hypothesis import strategies as st

from mprec.bags import Bags
from mprec.data import Batch
from mprec.dispatch import Dispatcher, ScoringPath
from mprec.serving import Engine, LocalExecutor, QueryRefusedError

COSTS = {"table": (50e-6, 1e-6), "hybrid": (260e-6, 10e-6)}
QUALITY = {"table": 0.78, "hybrid": 0.795}
POISON = 999_983


def batch(*ids):
    """One feature, one ID a sample, which is also the score it should get."""
    ids = torch.tensor(ids, dtype=torch.int64)
    return Batch(torch.zeros(len(ids), 0), Bags(ids, torch.arange(len(ids) + 1)), torch.zeros(len(ids)))


def query(size, start=0):
    return batch(*range(start, start + size))


def make(clock=None, slow=None, profile=None, **options):
    """An engine over two paths that take what their costs say; ``slow`` multiplies."""
    seen = []

    def scorer(name):
        def model(b):
            if (b.indices == POISON).any():
                raise IndexError(f"ID {POISON} is out of range")
            seen.append((name, len(b)))
            if clock is not None:
                fixed, per_sample = COSTS[name]
                clock.advance((fixed + per_sample * len(b)) * (slow or {}).get(name, 1.0))
            return b.indices.float()

        return model

    paths = [
        ScoringPath(name, name, QUALITY[name], scorer(name), f"shape of {name}", inputs=(1, 0))
        for name in COSTS
    ]
    engine = Engine(
        Dispatcher(paths, profile or fake_profile(COSTS)),
        **{"sla_s": 5e-3, **({"clock": clock} if clock else {}), **options},
    )
    return engine, seen


def drain(engine):
    while engine.step():
        pass


def test_one_query_gets_its_scores_by_the_best_path():
    clock = Clock()
    engine, seen = make(clock)
    future = engine.submit(query(100))
    clock.advance(1e-3)
    drain(engine)
    answer = future.result(0)
    assert answer.scores.tolist() == list(range(100))
    assert seen == [("hybrid", 100)]
    assert answer.paths == {"hybrid": 100}
    assert answer.latency_s == pytest.approx(1e-3 + 260e-6 + 100 * 10e-6)


def test_small_queries_are_merged_and_all_are_in_time():
    clock = Clock()
    engine, seen = make(clock)
    futures = [engine.submit(query(20, 1000 * i)) for i in range(30)]
    drain(engine)
    for i, future in enumerate(futures):
        assert future.result(0).scores.tolist() == list(range(1000 * i, 1000 * i + 20))
    assert len(seen) < 30
    assert sum(size for _, size in seen) == 600
    assert clock.now < 5e-3
    assert engine.statistics()["late"] == 0


def test_large_queries_are_split_and_joined_again():
    clock = Clock()
    engine, seen = make(clock, max_batch=64, sla_s=1.0)
    large, small = engine.submit(query(200)), engine.submit(query(3, 500))
    drain(engine)
    assert large.result(0).scores.tolist() == list(range(200))
    assert small.result(0).scores.tolist() == [500, 501, 502]
    assert max(size for _, size in seen) <= 64
    assert large.result(0).paths == {"hybrid": 200}


def test_a_queue_behind_makes_the_choice_faster():
    """Alone, each would be answered by hybrid; together only the fast path meets all deadlines."""
    clock = Clock()
    engine, seen = make(clock, max_batch=300, sla_s=5.8e-3)
    futures = [engine.submit(query(300)) for _ in range(6)]
    drain(engine)
    assert all(f.result(0).latency_s <= 5.8e-3 for f in futures)
    assert seen == [("table", 300)] * 6
    clock.advance(5e-3)  # so many in so short a time look like a rate, for about as long
    engine.submit(query(300))
    drain(engine)
    assert seen[-1] == ("hybrid", 300)


def test_admission_refuses_what_cannot_be_met():
    clock = Clock()
    engine, _ = make(clock)
    ok = [engine.submit(query(1000)) for _ in range(3)]
    refused = [engine.submit(query(1000)) for _ in range(5)]
    drain(engine)
    assert all(f.result(0).latency_s <= 5e-3 for f in ok)
    errors = [f.exception(0) for f in refused if f.exception(0)]
    assert errors
    assert {e.reason for e in errors} == {"overload"}
    assert engine.statistics()["refused"]["overload"] == len(errors)


def test_without_admission_late_answers_are_given_late():
    clock = Clock()
    engine, _ = make(clock, admission=False)
    futures = [engine.submit(query(1000)) for _ in range(8)]
    drain(engine)
    assert all(len(f.result(0).scores) == 1000 for f in futures)
    assert engine.statistics()["late"] > 0


def test_a_query_whose_deadline_passes_while_it_waits_is_refused():
    clock = Clock()
    engine, _ = make(clock)
    future = engine.submit(query(10))
    clock.advance(1.0)
    drain(engine)
    assert future.exception(0).reason == "expired"


def test_a_full_queue_refuses():
    engine, _ = make(Clock(), max_queue=100, sla_s=10.0)
    first, second = engine.submit(query(80)), engine.submit(query(30))
    assert second.exception(0).reason == "full"
    assert "80 samples wait" in str(second.exception(0))
    drain(engine)
    assert len(first.result(0).scores) == 80


def test_only_the_query_at_fault_fails():
    engine, _ = make(Clock(), max_batch=64, sla_s=1.0)
    good, bad, also_good = engine.submit(query(5)), engine.submit(batch(1, POISON)), engine.submit(query(6))
    split = engine.submit(batch(*[POISON] * 200))
    after = engine.submit(query(7))
    drain(engine)
    assert len(good.result(0).scores) == 5
    assert len(also_good.result(0).scores) == 6
    assert len(after.result(0).scores) == 7
    for future in (bad, split):
        assert isinstance(future.exception(0), IndexError)
    assert engine.statistics()["failed"] == 2
    assert engine.statistics()["waiting_samples"] == 0


def test_a_path_that_gives_the_wrong_number_of_scores_is_an_error_not_an_answer():
    path = ScoringPath("broken", "table", 0.5, lambda b: torch.zeros(1), "shape of broken")
    engine = Engine(Dispatcher([path], fake_profile({"broken": (1e-6, 1e-9)})), sla_s=1.0, clock=Clock())
    future = engine.submit(query(3))
    drain(engine)
    assert "gave (1,) scores for 3 samples" in str(future.exception(0))


def test_a_slow_path_is_left_after_a_while():
    clock = Clock()
    slow = {}
    engine, _ = make(clock, slow, sla_s=3e-3)
    for i in range(120):
        if i == 40:
            slow["hybrid"] = 5.0
        engine.submit(query(100))
        drain(engine)
    statistics = engine.statistics()
    assert statistics["corrections"]["hybrid"] > 1
    assert statistics["late"] < 12
    assert statistics["samples"]["table"] > 100 * 60


arrivals = st.lists(st.tuples(st.floats(0, 3e-3), st.integers(1, 400)), min_size=1, max_size=40)


@settings(deadline=None)
@given(arrivals, st.booleans(), st.integers(1, 300), st.integers(1, 2000), st.integers(1, 4))
def test_no_query_is_ever_lost(arrivals, admission, max_batch, max_queue, steps):
    clock = Clock()
    engine, seen = make(clock, admission=admission, max_batch=max_batch, max_queue=max_queue)
    futures = []
    for gap, size in arrivals:
        clock.advance(gap)
        futures.append((size, engine.submit(query(size))))
        for _ in range(steps - 1):
            engine.step()
    drain(engine)
    assert all(future.done() for _, future in futures)
    answered = [(size, f.result(0)) for size, f in futures if f.exception(0) is None]
    for size, answer in answered:
        assert answer.scores.tolist() == list(range(size))
        assert sum(answer.paths.values()) == size
    assert sum(size for _, size in seen) == sum(size for size, _ in answered)
    assert all(size <= max_batch for _, size in seen)
    counts = engine.statistics()
    assert counts["queries"] == len(arrivals) == counts["answered"] + sum(counts["refused"].values())
    assert counts["waiting_samples"] == 0


@pytest.mark.parametrize(
    ("bad", "match"),
    [
        (lambda: query(0), "at least one sample"),
        (lambda: Batch(torch.zeros(3, 1), *vars(query(2)).values()), None),
        (lambda: Batch(torch.zeros(2), Bags(torch.arange(2), torch.arange(3)), torch.zeros(2)), "dense"),
        (lambda: Batch(torch.zeros(2, 0), Bags(torch.arange(2), torch.arange(2)), torch.zeros(2)), "offsets"),
        (lambda: Batch(torch.zeros(2, 3), Bags(torch.arange(2), torch.arange(3)), torch.zeros(2)), "3 dense"),
        (
            lambda: Batch(
                torch.zeros(2, 0), Bags(torch.arange(4), torch.arange(5), num_features=2), torch.zeros(2)
            ),
            "2 features",
        ),
    ],
)
def test_queries_that_are_no_queries(bad, match):
    engine, _ = make(Clock())
    engine.submit(query(2))
    with pytest.raises((ValueError, TypeError), match=match):
        engine.submit(bad())


@pytest.mark.parametrize("option", ["sla_s", "max_batch", "max_queue"])
def test_bad_options(option):
    with pytest.raises(ValueError, match=option):
        make(**{option: 0})
    with pytest.raises(ValueError, match="late_share"):
        make(late_share=1.0)
    with pytest.raises(ValueError, match="sla_s"):
        make()[0].submit(query(1), sla_s=-1.0)


# -- with the worker's thread


def test_many_threads_and_a_close_that_drains():
    engine, _ = make(sla_s=60.0, max_queue=10**6)
    results, lock = [], threading.Lock()

    def client(number):
        rng = random.Random(number)
        for i in range(50):
            size = rng.randint(1, 50)
            future = engine.submit(query(size, 1000 * i))
            with lock:
                results.append((size, 1000 * i, future))

    with engine:
        threads = [threading.Thread(target=client, args=(n,)) for n in range(4)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    assert len(results) == 200
    for size, start, future in results:
        assert future.result(0).scores.tolist() == list(range(start, start + size))
    late = engine.submit(query(1))
    assert late.exception(0).reason == "closed"
    assert engine.close()
    with pytest.raises(RuntimeError, match="closed"):
        engine.start()


def test_close_without_draining_refuses_what_waits():
    gate = threading.Event()
    path = ScoringPath("p", "table", 0.5, lambda b: (gate.wait(10), b.indices.float())[1], "shape of p")
    engine = Engine(Dispatcher([path], fake_profile({"p": (1e-6, 1e-9)})), sla_s=60.0, max_batch=1).start()
    futures = [engine.submit(query(1)) for _ in range(5)]
    deadline = time.monotonic() + 10
    while engine.statistics()["waiting_samples"] == 5 and time.monotonic() < deadline:
        time.sleep(0.001)
    assert not engine.close(drain=False, timeout_s=0.01)  # the first is being scored
    gate.set()
    assert engine.close()
    errors = [f.exception(10) for f in futures]
    assert errors[0] is None
    assert [e.reason for e in errors[1:]] == ["closed"] * 4


def test_a_cancelled_query_and_a_raising_callback_do_no_harm(caplog):
    engine, _ = make(Clock(), sla_s=1.0)
    cancelled, loud, quiet = (engine.submit(query(2)) for _ in range(3))
    assert cancelled.cancel()
    loud.add_done_callback(lambda f: 1 / 0)
    drain(engine)
    assert loud.result(10)
    assert quiet.result(10)
    engine.close()
    with pytest.raises(QueryRefusedError, match="closed"):
        engine.submit(query(1)).result(0)


# -- what must not break it


def answers(name, quality, model, profile_costs, **options):
    path = ScoringPath(name, name, quality, model, f"shape of {name}", inputs=(1, 0))
    return path, Dispatcher([path], fake_profile(profile_costs), **options)


def test_a_malformed_first_query_does_not_decide_the_shape():
    engine, _ = make(Clock())
    with pytest.raises(ValueError, match="2 features and 0 dense numbers, the paths take 1 and 0"):
        engine.submit(
            Batch(torch.zeros(1, 0), Bags(torch.arange(2), torch.arange(3), num_features=2), torch.zeros(1))
        )
    future = engine.submit(query(3))
    drain(engine)
    assert len(future.result(0).scores) == 3


@pytest.mark.parametrize("arrived", [float("nan"), float("inf")])
def test_times_of_arrival_that_are_none_are_refused(arrived):
    engine, _ = make(Clock(), admission=False)
    with pytest.raises(ValueError, match="arrived_s"):
        engine.submit(query(1), arrived_s=arrived)
    with pytest.raises(ValueError, match="sla_s"):
        engine.submit(query(1), sla_s=float("inf"))


def test_a_path_that_raises_is_replaced_by_another_and_tried_again_later():
    clock, calls = Clock(), []

    def broken(batch):
        calls.append(clock.now)
        clock.advance(1e-4)
        if clock.now < 1.0:
            raise RuntimeError("weights are gone")
        return batch.indices.float()

    def works(batch):
        clock.advance(1e-4)
        return batch.indices.float()

    paths = [
        ScoringPath("table", "table", 0.7, works, "shape of table"),
        ScoringPath("hybrid", "hybrid", 0.8, broken, "shape of hybrid"),
    ]
    engine = Engine(Dispatcher(paths, fake_profile(COSTS)), sla_s=5e-3, clock=clock)
    names = []
    for _ in range(300):
        future = engine.submit(query(10))
        drain(engine)
        names += future.result(0).paths
        clock.advance(0.01)
    assert len(calls) < 300  # it rested
    assert names[0] == "table"
    assert names[-1] == "hybrid"
    assert engine.statistics()["path_errors"]["hybrid"] >= 2
    assert engine.statistics()["failed"] == 0


def test_scores_that_are_not_finite_are_another_path_s_or_an_error():
    def nan(batch):
        return torch.full((len(batch),), float("nan"))

    def works(batch):
        return batch.indices.float()

    bad = ScoringPath("hybrid", "hybrid", 0.8, nan, "shape of hybrid")
    good = ScoringPath("table", "table", 0.7, works, "shape of table")
    for paths, answered in (([bad, good], True), ([bad], False)):
        engine = Engine(Dispatcher(paths, fake_profile(COSTS)), sla_s=1.0, clock=Clock())
        future = engine.submit(query(3))
        drain(engine)
        if answered:
            assert future.result(0).paths == {"table": 3}
        else:
            assert "not finite" in str(future.exception(0))


def test_a_worker_survives_system_exit():
    def leaves(batch):
        if (batch.indices == POISON).any():
            raise SystemExit(3)
        return batch.indices.float()

    _, dispatcher = answers("p", 0.5, leaves, {"p": (1e-6, 1e-9)})
    with Engine(dispatcher, sla_s=30.0) as engine:
        assert isinstance(engine.submit(batch(POISON)).exception(30), SystemExit)
        assert len(engine.submit(query(3)).result(30).scores) == 3


def test_sizes_that_no_path_takes_are_never_made_by_merging():
    path = ScoringPath(
        "p", "p", 0.5, lambda b: b.indices.float(), "shape of p", supports=lambda size: size % 2 == 1
    )
    engine = Engine(Dispatcher([path], fake_profile({"p": (1e-6, 1e-9)})), sla_s=1.0, clock=Clock())
    futures = [engine.submit(query(3)) for _ in range(40)]
    even = engine.submit(query(4))
    drain(engine)
    assert all(len(future.result(0).scores) == 3 for future in futures)
    assert "no path takes a batch of 4" in str(even.exception(0))


def test_a_clock_that_is_set_back():
    clock = Clock()
    clock.advance(7200.0)
    engine, _ = make(clock)
    for _ in range(3):
        future = engine.submit(query(10))
        drain(engine)
        assert len(future.result(0).scores) == 10
        clock.advance(-3600.0)
    assert engine.statistics()["refused"] == {}


def test_a_cancelled_query_is_not_scored():
    engine, seen = make(Clock(), sla_s=1.0)
    futures = [engine.submit(query(20)) for _ in range(10)]
    assert all(future.cancel() for future in futures[:9])
    drain(engine)
    assert len(futures[9].result(0).scores) == 20
    assert sum(size for _, size in seen) == 20
    assert engine.statistics()["cancelled"] == 9


def test_a_slow_callback_does_not_keep_the_executor():
    _, dispatcher = answers("p", 0.5, lambda b: b.indices.float(), {"p": (1e-6, 1e-9)})
    gate = threading.Event()
    with Engine(dispatcher, sla_s=60.0, max_batch=1) as engine:
        engine.submit(query(1)).add_done_callback(lambda f: time.sleep(0.05))
        time.sleep(0.2)
        engine.submit(query(1)).add_done_callback(lambda f: gate.wait(60))
        end = time.monotonic() + 30
        while engine.statistics()["answered"] < 5 and time.monotonic() < end:
            engine.submit(query(1))
            time.sleep(0.01)
        assert engine.statistics()["answered"] >= 5  # while a client still waits in its callback
        gate.set()


def test_a_slow_callback_of_an_error_does_not_keep_the_executor_and_may_close_the_engine():
    engine, _ = make(sla_s=60.0, max_batch=1)
    gate, closed = threading.Event(), []
    with engine:
        engine.submit(batch(POISON)).add_done_callback(lambda f: gate.wait(60))
        for _ in range(5):
            assert len(engine.submit(query(3)).result(30).scores) == 3  # while that callback waits
        gate.set()
        last = engine.submit(batch(POISON))
        last.add_done_callback(lambda f: closed.append(engine.close(timeout_s=30)))
        assert isinstance(last.exception(30), IndexError)
    assert closed == [True]


@pytest.mark.parametrize("error", [RuntimeError, SystemExit])
def test_a_worker_survives_a_path_that_cannot_give_its_program(error):
    class Changed(LocalExecutor):
        def program(self, path):
            raise error("the model has changed")

    _, dispatcher = answers("p", 0.5, lambda b: b.indices.float(), {"p": (1e-6, 1e-9)})
    executors = [Changed("cpu", dispatcher.paths, dispatcher.profile)]
    with Engine(executors=executors, sla_s=60.0) as engine:
        for _ in range(3):
            assert engine.submit(query(3)).result(30).scores.tolist() == [0, 1, 2]
            assert engine.score(query(2)).scores.tolist() == [0, 1]


def test_a_worker_survives_a_path_that_cannot_say_which_sizes_it_takes():
    is_lost = False

    def supports(size):
        if is_lost:
            raise RuntimeError("lost")
        return True

    def broken(batch):
        raise IndexError("broken")

    paths = [
        ScoringPath("hybrid", "hybrid", 0.8, broken, "shape of hybrid", inputs=(1, 0)),
        ScoringPath("table", "table", 0.7, lambda b: b.indices.float(), "shape of table", supports=supports),
    ]
    with Engine(Dispatcher(paths, fake_profile(COSTS)), sla_s=60.0) as engine:
        is_lost = True
        assert str(engine.submit(query(3)).exception(30)) == "lost"
        is_lost = False
        assert engine.submit(query(3)).result(30).scores.tolist() == [0, 1, 2]


@pytest.mark.parametrize("ends", ["closed", "cancelled"])
def test_a_split_query_that_ends_while_a_part_of_it_raises_is_counted_once(ends):
    begun, gate = threading.Event(), threading.Event()

    def raises(batch):
        begun.set()
        gate.wait(30)
        raise RuntimeError("too late")

    _, dispatcher = answers("p", 0.5, raises, {"p": (1e-6, 1e-9)})
    engine = Engine(dispatcher, sla_s=60.0, max_batch=4).start()
    future = engine.submit(query(10))
    assert begun.wait(30)
    if ends == "cancelled":
        assert future.cancel()
    assert not engine.close(drain=False, timeout_s=0.01)
    gate.set()
    assert engine.close()
    if ends == "closed":
        assert future.exception(0).reason == "closed"
    counts = engine.statistics()
    ended = counts["cancelled"], counts["refused"].get("closed", 0), counts["failed"], counts["answered"]
    assert ended == ((1, 0, 0, 0) if ends == "cancelled" else (0, 1, 0, 0))
    assert counts["waiting_samples"] == 0


def test_paths_are_replaced_while_serving_and_no_query_is_lost():
    def model(shift):
        def score(b):
            time.sleep(1e-3)
            return b.indices.float() + shift

        return score

    costs = {"old": (1e-3, 1e-6), "new": (1e-3, 1e-6)}
    _, old = answers("old", 0.5, model(0.0), costs)
    _, new = answers("new", 0.5, model(0.25), costs)
    with Engine(old, sla_s=60.0, max_batch=8) as engine:
        futures = [engine.submit(query(4)) for _ in range(40)]
        engine.replace(new)
        futures += [engine.submit(query(4)) for _ in range(40)]
        found = [future.result(60) for future in futures]
        with pytest.raises(ValueError, match="expected 1, as before, got 2"):
            engine.replace(executors=[LocalExecutor(n, new.paths, new.profile) for n in "ab"])
    for answer in found:
        shift = 0.25 if "new" in answer.paths else 0.0
        assert answer.scores.tolist() == [shift, 1 + shift, 2 + shift, 3 + shift]
    assert found[-1].paths == {"new": 4}
    assert engine.statistics()["answered"] == 80


def two_executors(score_of_b):
    """Two executors with one path each, of the same name; ``b`` is as given."""
    made = []
    for name, score in (("a", lambda b: b.indices.float()), ("b", score_of_b)):

        def model(batch, score=score):
            time.sleep(2e-4)
            if (batch.indices == POISON).any():
                raise IndexError(f"ID {POISON} is out of range")
            return score(batch)

        path = ScoringPath("table", "table", 0.7, model, "shape of table", inputs=(1, 0))
        made.append(LocalExecutor(name, [path], fake_profile(COSTS)))
    return made


def test_an_executor_none_of_whose_paths_works_loses_no_query_and_rests():
    calls = []

    def lost(batch):
        calls.append(len(batch))
        raise RuntimeError("device lost")

    with Engine(executors=two_executors(lost), sla_s=60.0, max_batch=8) as engine:
        for _ in range(5):
            futures = [engine.submit(query(4)) for _ in range(40)]
            for future in futures:
                assert future.result(60).scores.tolist() == [0, 1, 2, 3]
    about = engine.statistics()
    assert about["failed"] == 0
    assert about["answered"] == 200
    assert about["executor_errors"]["b"] >= 1
    assert sum(calls) < 400  # it was left alone for a while


def test_a_bad_query_fails_once_and_stops_no_executor():
    with Engine(executors=two_executors(lambda b: b.indices.float()), sla_s=60.0, max_batch=8) as engine:
        for _ in range(20):
            bad = engine.submit(batch(POISON))
            good = [engine.submit(query(4)) for _ in range(10)]
            with pytest.raises(IndexError, match="out of range"):
                bad.result(60)
            for future in good:
                assert future.result(60).scores.tolist() == [0, 1, 2, 3]
    about = engine.statistics()
    assert about["failed"] == 20
    assert about["answered"] == 200
    assert not about["executor_errors"]
    assert all(executor["batches"] for executor in about["executors"].values())


@pytest.mark.parametrize("drain", [True, False])
def test_a_query_that_waits_for_another_executor_while_the_engine_closes_is_not_lost(drain):
    def lost(batch):
        raise RuntimeError("device lost")

    class ClosedMeanwhile:
        """The native engine, but the query goes back into the queue when the other worker has ended."""

        def __init__(self, native):
            self.native, self.closing = native, threading.Thread(target=engine.close, args=(drain,))

        def __getattr__(self, name):
            return getattr(self.native, name)

        def again(self, query):
            self.closing.start()
            for worker in engine._threads[: len(engine._executors)]:
                if worker is not threading.current_thread():
                    worker.join(30)
            self.native.again(query)

    engine = Engine(executors=two_executors(lost)[::-1], sla_s=60.0)
    engine._native = ClosedMeanwhile(engine._native)
    engine._native.rest(1, 0.05)  # the one that is lost is asked first
    with engine:
        future = engine.submit(query(3))
        assert future.result(30).scores.tolist() == [0, 1, 2]
    engine._native.closing.join(30)


def test_an_executor_is_closed_when_its_last_batch_is_done():
    ends = []

    class Watched(LocalExecutor):
        def close(self):
            ends.append("closed")

    def slow(b):
        time.sleep(0.2)
        ends.append("scored")
        return b.indices.float()

    _, old = answers("p", 0.5, slow, {"p": (0.2, 1e-6)})
    _, new = answers("p", 0.5, lambda b: b.indices.float(), {"p": (1e-6, 1e-6)})
    with Engine(executors=[Watched("cpu", old.paths, old.profile)], sla_s=60.0) as engine:
        future = engine.submit(query(4))
        time.sleep(0.05)
        engine.replace(new)
        assert future.result(60).scores.tolist() == [0, 1, 2, 3]
    assert ends == ["scored", "closed"]
