"""Answers queries by a scheduler's choice, on one executor or several side by side.

Small queries are merged and large ones split, so a *batch* is what an executor scores, and a *query* what a
client asked. Every query ends in exactly one way: an answer, a refusal with a reason, or the error that its
own input caused. What runs when, and what is refused, is decided by
:class:`mprec.dispatch.scheduler.Scheduler`. Queries wait, are merged and are scored in native code
(``csrc/serving/engine.h``); this module runs the paths that are not native programs, looks after those that
fail, and settles the futures.
"""

from __future__ import annotations

import math
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future

import torch

from mprec import _native
from mprec._native import EngineJob, PathProgram
from mprec.data import Batch
from mprec.dispatch import Dispatcher
from mprec.dispatch.scheduler import Lane, Option
from mprec.serving.attempts import Piece, score_pieces
from mprec.serving.executors import Executor, LocalExecutor
from mprec.serving.queries import (
    Answer,
    QueryFuture,
    QueryRefusedError,
    Replayed,
    check,
    check_plain,
    refusal,
    settle,
    settle_outcomes,
)

__all__ = ["Answer", "Engine", "QueryRefusedError"]

_LOOK_AGAIN_S = 0.005
_FIRST_REST_S, _LONGEST_REST_S = 0.25, 30.0  # of a path that raised, or an executor all of whose paths did


class Engine:
    """Scores queries (``Batch``) within ``sla_s`` seconds of their arrival.

    ``dispatcher`` names the paths of one executor in this process; ``executors`` (instead) lists several,
    each with paths and a profile of its own. Batches have at most ``max_batch`` samples. ``max_queue`` bounds
    the samples waiting: a query that would exceed it is refused (``full``). With ``admission``, so is one
    that is not likely to be in time even if everything ahead of it takes the fastest path (``overload``), and
    one whose deadline can no longer be met when its turn comes (``expired``): their time goes to queries that
    can still be met. Without it late answers are given late. At most a share ``late_share`` of the queries
    taken should be late under load.

    Paths that are native programs (see :meth:`mprec.serving.Executor.program`) are run by threads that never
    wait for Python's interpreter lock. Weights that are changed meanwhile are noticed within a millisecond.

    ``submit`` and ``score`` may be called from any thread. The workers start with ``start()`` or ``with``; a
    test of one executor can call ``step()`` instead, with a ``clock`` of its own.
    """

    def __init__(
        self,
        dispatcher: Dispatcher | None = None,
        *,
        sla_s: float,
        executors: Sequence[Executor] | None = None,
        max_batch: int = 2048,
        max_queue: int = 1 << 20,
        admission: bool = True,
        late_share: float = 0.01,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        for name, value in (("sla_s", sla_s), ("max_batch", max_batch), ("max_queue", max_queue)):
            if not value > 0:
                raise ValueError(f"{name}: expected a positive number, got {value}")
        self.sla_s, self.max_batch, self.clock = sla_s, max_batch, clock
        self._executors = _as_executors(dispatcher, executors)
        self._lanes = self._lanes_of(self._executors)
        features, num_dense = _inputs(self._executors)
        self._native = _native.Engine(
            self._lanes,
            max_batch=max_batch,
            max_queue=max_queue,
            admission=admission,
            late_share=late_share,
            clock=None if clock is time.perf_counter else clock,
            features=features,
            num_dense=num_dense,
            check=check,
        )
        self._closed = False
        self._changing = threading.Lock()
        self._threads: list[threading.Thread] = []  # the executors' workers, then the two that tell clients
        self._errors: queue.SimpleQueue[tuple[QueryFuture, BaseException] | None] = queue.SimpleQueue()
        self._rests: dict[
            tuple[int, str | None], tuple[float, int]
        ] = {}  # of (executor, path or all of them)
        self._path_errors: Counter[str] = Counter()  # batches that another path had to answer
        self._executor_errors: Counter[str] = Counter()  # the same of queries and executors

    @property
    def paths(self) -> list[str]:
        """Names of the paths, of all executors."""
        return list(dict.fromkeys(path.name for executor in self._executors for path in executor.paths))

    @property
    def waiting(self) -> int:
        """Samples that wait."""
        return self._native.statistics()["waiting_samples"]

    # -- clients

    def submit(
        self, batch: Batch, sla_s: float | None = None, arrived_s: float | None = None
    ) -> Future[Answer]:
        """Queue a query. The future holds an :class:`Answer`, or raises ``QueryRefusedError`` or what the
        query's own input raised in the models. ``arrived_s`` (on the engine's clock) is for queries that came
        before this call: their target counts from then. A future that is cancelled before its turn costs no
        work. Callbacks of the future run on a thread of the engine that all answers share, or that all
        errors do.

        ``ValueError`` at once for a query that has no samples, a bad SLA or time of arrival, or other
        features or dense numbers than the paths take.
        """
        future = QueryFuture(batch)
        outcome = self._native.submit(future, batch, self._checked(batch, sla_s, arrived_s), arrived_s)
        if type(outcome) is tuple:
            future.set_exception(refusal(*outcome))
        else:
            future.taken(self._native, outcome)
        return future

    def score(self, batch: Batch, sla_s: float | None = None, arrived_s: float | None = None) -> Answer:
        """As ``submit(...).result()``, for clients that have a thread to wait with.

        If an executor is free and its job would be over before another thread could have been woken, the
        caller's own thread runs it, by one core and without the interpreter's lock. Raises what ``submit``
        and its future raise; ``RuntimeError`` if the engine is not started.
        """
        if not self._threads:
            raise RuntimeError("expected a started engine")
        future = QueryFuture(batch)
        told = Replayed(*self._native.answer(future, self._checked(batch, sla_s, arrived_s), arrived_s))
        if told.failed:
            future.result()  # raises, perhaps once the worker has told it
        if told.refused:
            raise refusal(told.refused, told.message)
        return Answer(told.scores, told.paths, told.due_s, told.finished_s)

    def _checked(self, batch: Batch, sla_s: float | None, arrived_s: float | None) -> float:
        check_plain(batch)
        sla_s = self.sla_s if sla_s is None else sla_s
        if not 0 < sla_s < math.inf:
            raise ValueError(f"sla_s: expected a positive finite number, got {sla_s}")
        if arrived_s is not None and not math.isfinite(arrived_s):
            raise ValueError(f"arrived_s: expected a finite number, got {arrived_s}")
        return sla_s

    def replay(self, batches: Sequence[Batch], at_s: Sequence[float]) -> list[Replayed]:
        """Submit queries ``at_s`` seconds from now, rising, and wait for the outcomes of all.

        By a thread that does nothing else and needs no interpreter: for load tests, whose clients should not
        take the time of those that they test. ``RuntimeError`` unless the engine runs by
        ``time.perf_counter``.
        """
        if not self._threads or self.clock is not time.perf_counter:
            raise RuntimeError("expected a started engine with the clock time.perf_counter")
        if len(batches) != len(at_s):
            raise ValueError(f"at_s: expected {len(batches)} times, as batches, got {len(at_s)}")
        for batch in batches:
            check_plain(batch)
        futures = [QueryFuture(batch) for batch in batches]
        return [Replayed(*each) for each in self._native.replay(futures, list(at_s), self.sla_s)]

    def statistics(self) -> dict:
        """Counts so far, what waits, and how the machine differs from its profile; JSON-able.

        ``samples`` are counted by path, ``refused`` by reason. ``failed``: queries whose own input raised, on
        every path; ``path_errors``: batches that another path had to answer, ``executor_errors``: queries
        that another executor had to. ``corrections``: expected over profiled time by path
        (``path@executor`` where there are several); ``query_s``: seconds of the engine's own work for a query
        of a batch. ``last_answer_s``: seconds since the last answer, None before the first.
        """
        counts = self._native.statistics()
        executors = counts.pop("executors")
        several = len(executors) > 1
        counts["corrections"] = {
            f"{path}@{executor.name}" if several else path: factor
            for executor, each in zip(self._executors, executors, strict=True)
            for path, factor in each["corrections"].items()
        }
        counts["executors"] = {
            executor.name: {key: each[key] for key in ("batches", "busy_s")}
            for executor, each in zip(self._executors, executors, strict=True)
        }
        return {
            **counts,
            "path_errors": dict(self._path_errors),
            "executor_errors": dict(self._executor_errors),
        }

    def start(self) -> Engine:
        """Start the workers. ``RuntimeError`` if they run already or the engine is closed."""
        with self._changing:
            if self._threads or self._closed:
                raise RuntimeError("the engine is closed" if self._closed else "the engine runs already")
            self._threads = [
                threading.Thread(target=self._work, args=(i,), name=f"mprec-{executor.name}", daemon=True)
                for i, executor in enumerate(self._executors)
            ]
            for tell, what in ((self._settle_answers, "answers"), (self._settle_errors, "errors")):
                self._threads.append(threading.Thread(target=tell, name=f"mprec-{what}", daemon=True))
        for executor in self._executors:
            executor.start()
        self._take_programs()
        self._native.start()
        for thread in self._threads:
            thread.start()
        return self

    def close(self, drain: bool = True, timeout_s: float | None = None) -> bool:
        """Refuse new queries; answer those that wait (or, with ``drain=False``, refuse them too); stop.

        True once the workers have stopped; False if that took longer than ``timeout_s``. May be called again.
        """
        with self._changing:
            self._closed = True
        self._native.close()
        if not drain or not self._threads:
            for future in self._native.clear():
                settle(future, error=refusal("closed", "the engine was closed before the query's turn"))
        end = None if timeout_s is None else time.monotonic() + timeout_s
        workers, tellers = self._threads[:-2], self._threads[-2:]
        for worker in workers:
            worker.join(None if end is None else max(end - time.monotonic(), 0.0))
        if any(worker.is_alive() for worker in workers):
            return False
        self._finish()
        self._native.stop()
        self._errors.put(None)
        for thread in tellers:
            if thread is not threading.current_thread():  # a callback may close its engine
                thread.join()
        for executor in self._executors:
            executor.close()
        return True

    def replace(
        self, dispatcher: Dispatcher | None = None, *, executors: Sequence[Executor] | None = None
    ) -> None:
        """Serve by other paths from the next batch on. Queries that wait or are being scored are not lost.

        As many executors as before, in the same order: ``ValueError`` otherwise.
        """
        fresh = _as_executors(dispatcher, executors)
        if len(fresh) != len(self._executors):
            raise ValueError(f"executors: expected {len(self._executors)}, as before, got {len(fresh)}")
        lanes = self._lanes_of(fresh)
        if self._threads:
            for executor in fresh:
                executor.start()
        with self._changing:
            old, self._executors = list(zip(self._executors, self._lanes, strict=True)), fresh
            self._lanes = lanes
            self._native.replace(lanes, *_inputs(fresh))
            self._rests.clear()
            if self._threads:
                self._take_programs()
        for index, (executor, lane) in enumerate(old):
            while self._native.uses(index, lane):  # a batch that began before
                time.sleep(_LOOK_AGAIN_S)
            executor.close()

    def __enter__(self) -> Engine:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- workers

    def step(self) -> bool:
        """Score one batch; False if nothing waits. For tests of one executor, without workers."""
        job, expired = self._native.poll(0)
        if job is not None:
            self._run(0, job)
        settle_outcomes(self._native.outcomes(wait=False))
        while not self._errors.empty():
            future, error = self._errors.get()
            settle(future, error=error)
        return expired or job is not None

    def _work(self, index: int) -> None:
        while (job := self._native.take(index, torch.get_num_threads())) is not None:
            self._run(index, job)

    def _settle_answers(self) -> None:
        while (outcomes := self._native.outcomes(wait=True)) is not None:
            settle_outcomes(outcomes)

    def _settle_errors(self) -> None:
        for future, error in iter(self._errors.get, None):
            settle(future, error=error)

    def _finish(self) -> None:
        """Score what is left when the workers have gone: queries that one executor could not score and that
        went back into the queue when the others' workers had ended."""
        found = True
        while found:
            found = False
            for index in range(len(self._executors)):
                job, expired = self._native.poll(index)
                if job is not None:
                    self._run(index, job)
                found = found or expired or job is not None

    def _run(self, index: int, job: EngineJob) -> None:
        """Score a job that the native engine has left, and tell it."""
        executor, outcomes = self._executors[index], []
        pieces: list[Piece] = self._native.wanted(job)
        own = len(pieces) == job.pieces
        seconds = 0.0
        try:
            if pieces:
                seconds = score_pieces(executor, job.path, pieces, outcomes, self.clock)
        except BaseException as error:  # of any kind: the worker goes on
            outcomes += [(piece, error) for piece in pieces]
        if len(self._executors) > 1:
            outcomes = self._try_elsewhere(index, outcomes)
        if seconds < 0:  # the job's path raised where another did not
            self._path_errors[job.path] += 1
            self._native.done(job, 0.0, self._longer_rest(index, job.path))
        else:
            self._native.done(job, seconds if own else 0.0)
        for (future, query, start, stop), outcome in outcomes:
            if isinstance(outcome, BaseException):
                if self._native.fail(query):
                    self._errors.put((future, outcome))
            else:
                self._native.score(query, start, stop, *outcome)
        if seconds > 0 and executor is self._executors[index]:
            self._native.set_program(index, job.path, _program_of(executor, job.path))

    def _longer_rest(self, index: int, path: str | None) -> float:
        """Seconds for which a path (None: all) of an executor is left alone; each time twice as long, until
        it has served."""
        served = self._native.statistics()["executors"][index]["served"]
        served = sum(served.values()) if path is None else served.get(path, 0)
        rest, before = self._rests.get((index, path), (0.0, served))
        rest = min(2 * rest, _LONGEST_REST_S) if rest and before == served else _FIRST_REST_S
        self._rests[index, path] = rest, served
        return rest

    def _try_elsewhere(self, index: int, outcomes: list[tuple[Piece, object]]) -> list:
        """Queries that no path of executor ``index`` could score wait for another executor, which is asked
        alone until it has shown whose fault that was; what is left is settled.
        """
        left = []
        for piece, outcome in outcomes:
            future, query, start, stop = piece
            failed, whole = isinstance(outcome, BaseException), stop - start == query.size
            if failed and future.failed_on is None and whole and not self._closed:
                future.failed_on = index
                self._native.again(query)
                self._native.rest(index, _FIRST_REST_S)
                continue
            if future.failed_on is not None:
                culprit = future.failed_on
                self._native.rest(culprit, 0.0 if failed else self._longer_rest(culprit, None))
                if not failed:
                    self._executor_errors[self._executors[culprit].name] += 1
            left.append((piece, outcome))
        return left

    def _take_programs(self) -> None:
        for index, executor in enumerate(self._executors):
            for path in executor.paths:
                self._native.set_program(index, path.name, _program_of(executor, path.name))

    def _lanes_of(self, executors: Sequence[Executor]) -> list[Lane]:
        return [Lane(e.name, [_option(path, e, self.max_batch) for path in e.paths]) for e in executors]


def _as_executors(dispatcher: Dispatcher | None, executors: Sequence[Executor] | None) -> list[Executor]:
    if (dispatcher is None) == (executors is None):
        raise ValueError("expected a dispatcher or executors, and not both")
    found = (
        [LocalExecutor("cpu", dispatcher.paths, dispatcher.profile)] if executors is None else list(executors)
    )
    if not found:
        raise ValueError("executors: expected at least one")
    if len({e.name for e in found}) != len(found):
        raise ValueError(f"executors: expected distinct names, got {[e.name for e in found]}")
    return found


def _program_of(executor: Executor, path: str) -> PathProgram | None:
    """None also where the path has no native form any more, or cannot say: it is then called, and what is
    wrong with it is told to the queries that it was called for."""
    try:
        return executor.program(path)
    except BaseException:  # of any kind: the worker goes on
        return None


def _option(path, executor: Executor, max_batch: int) -> Option:
    seconds = executor.profile.curve(path.name, "mean").table(max_batch)
    if path.supports is not None:
        seconds = [s if b and path.supports(b) else math.inf for b, s in enumerate(seconds)]
    return Option(path.name, path.quality, seconds)


def _inputs(executors: Sequence[Executor]) -> tuple[int, int]:
    """(features, dense numbers) that the paths take, where they say so; else -1."""
    paths = (path for executor in executors for path in executor.paths)
    return next((path.inputs for path in paths if path.inputs is not None), (-1, -1))
