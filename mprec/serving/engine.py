"""Answers queries by a scheduler's choice, on one executor or several side by side.

Small queries are merged and large ones split, so a *batch* is what an executor scores, and a *query* what a
client asked. Every query ends in exactly one way: an answer, a refusal with a reason, or the error that its
own input caused. What runs when, and what is refused, is decided by
:class:`mprec.dispatch.scheduler.Scheduler`; this module gives it threads, tensors and futures.
"""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future

import torch

from mprec.data import Batch
from mprec.data.batching import join, num_features
from mprec.dispatch import Dispatcher
from mprec.dispatch.scheduler import Job, Lane, Option, Piece, Refusal, Scheduler, Ticket
from mprec.serving.executors import Executor, LocalExecutor
from mprec.serving.finisher import Finisher
from mprec.serving.queries import Answer, Query, QueryRefusedError, Statistics

__all__ = ["Answer", "Engine", "QueryRefusedError", "Statistics"]

_OWN_WORK_S = 20e-6  # of the engine for a query, about
_OWN_WORK_GAIN = 0.05  # share of the way that one batch moves the time of the engine's own work
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

    ``submit`` may be called from any thread. The workers start with ``start()`` or ``with``; a test of one
    executor can call ``step()`` instead, with a ``clock`` of its own.
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
                raise ValueError(f"{name} must be positive, got {value}")
        self.sla_s, self.max_batch, self.clock = sla_s, max_batch, clock
        self._executors = _as_executors(dispatcher, executors)
        self._scheduler = Scheduler(
            self._lanes(self._executors),
            max_batch=max_batch,
            max_queue=max_queue,
            admission=admission,
            late_share=late_share,
        )
        self._offset, self._last = 0.0, -math.inf  # of a clock that was set back
        self._inputs = _inputs(self._executors)
        self._rests: dict[tuple[int, str | None], float] = {}  # of (executor, path or all of them)
        self._in_use: list[Executor | None] = [None] * len(self._executors)  # by the workers
        self._jobs: list[Job | None] = [None] * len(self._executors)  # started, not yet seen by the worker
        self._closed = False
        self._lock = threading.Lock()
        self._wakes = [threading.Condition(self._lock) for _ in self._executors]
        self._workers: list[threading.Thread] = []
        self._finisher = Finisher()
        self._statistics = Statistics()
        self._busy = [0.0] * len(self._executors)
        self._batches = [0] * len(self._executors)
        self._last_answer: float | None = None

    @property
    def paths(self) -> list[str]:
        """Names of the paths, of all executors."""
        return list(dict.fromkeys(path.name for executor in self._executors for path in executor.paths))

    @property
    def waiting(self) -> int:
        """Samples that wait."""
        return self._scheduler.waiting

    # -- clients

    def submit(
        self, batch: Batch, sla_s: float | None = None, arrived_s: float | None = None
    ) -> Future[Answer]:
        """Queue a query. The future holds an :class:`Answer`, or raises ``QueryRefusedError`` or what the
        query's own input raised in the models. ``arrived_s`` (on the engine's clock) is for queries that came
        before this call: their target counts from then. A future that is cancelled before its turn costs no
        work. Callbacks of the future run on an executor's thread and should be short.

        ``ValueError`` at once for a query that has no samples, a bad SLA or time of arrival, or other
        features or dense numbers than the paths take.
        """
        sla_s = self.sla_s if sla_s is None else sla_s
        if not 0 < sla_s < math.inf:
            raise ValueError(f"sla_s must be positive and finite, got {sla_s}")
        if arrived_s is not None and not math.isfinite(arrived_s):
            raise ValueError(f"arrived_s must be finite, got {arrived_s}")
        self._check(batch)
        with self._lock:
            now = self._now()
            arrived = now if arrived_s is None else arrived_s + self._offset
            query = Query(batch, arrived)
            self._statistics.queries += 1
            if self._closed:
                outcome = Refusal(("closed", "the engine is closed"))
            else:
                outcome = self._scheduler.offer(now, len(batch), arrived + sla_s, query)
            if isinstance(outcome, Refusal):
                if outcome.reason == "unsupported":
                    self._statistics.failed += 1
                else:
                    self._statistics.refused[outcome.reason] += 1
            elif self._workers and self._scheduler.idle:
                self._assign(now)
        if self._finisher.has_some:
            self._finisher.flush()
        if isinstance(outcome, Refusal):
            error = ValueError if outcome.reason == "unsupported" else None
            query.future.set_exception(error(outcome.message) if error else QueryRefusedError(*outcome))
        return query.future

    def statistics(self) -> dict:
        """Counts so far, what waits, and how the machine differs from its profile; JSON-able.

        ``corrections``: expected over profiled time by path (``path@executor`` where there are several);
        ``query_s``: seconds of the engine's own work for a query of a batch. ``last_answer_s``: seconds since
        the last answer, None before the first.
        """
        with self._lock:
            counts = dict(vars(self._statistics))
            now, lanes = self._now(), self._scheduler.lanes
            several = len(lanes) > 1
            return {
                **counts,
                **{key: dict(value) for key, value in counts.items() if isinstance(value, Counter)},
                "waiting_samples": self._scheduler.waiting,
                "waiting_queries": len(self._scheduler),
                "corrections": {
                    f"{path}@{lane.name}" if several else path: factor
                    for lane in lanes
                    for path, factor in lane.correction.factors.items()
                },
                "executors": {
                    executor.name: {"batches": batches, "busy_s": busy}
                    for executor, batches, busy in zip(
                        self._executors, self._batches, self._busy, strict=True
                    )
                },
                "query_s": self._scheduler.query_s,
                "last_answer_s": None if self._last_answer is None else now - self._last_answer,
            }

    def start(self) -> Engine:
        """Start the workers. ``RuntimeError`` if they run already or the engine is closed."""
        with self._lock:
            if self._workers or self._closed:
                raise RuntimeError("the engine is closed" if self._closed else "the engine runs already")
            self._workers = [
                threading.Thread(target=self._work, args=(i,), name=f"mprec-{executor.name}", daemon=True)
                for i, executor in enumerate(self._executors)
            ]
        for executor in self._executors:
            executor.start()
        self._finisher.start()
        with self._lock:
            self._assign(self._now())
        for worker in self._workers:
            worker.start()
        return self

    def close(self, drain: bool = True, timeout_s: float | None = None) -> bool:
        """Refuse new queries; answer those that wait (or, with ``drain=False``, refuse them too); stop.

        True once the workers have stopped; False if that took longer than ``timeout_s``. May be called again.
        """
        with self._lock:
            self._closed = True
            leftover = []
            if not drain or not self._workers:
                for ticket in self._scheduler.clear():
                    if ticket.item.missing:
                        ticket.item.missing = 0  # pieces under way find nothing to answer
                        leftover.append(ticket.item)
                        self._statistics.refused["closed"] += 1
            for wake in self._wakes:
                wake.notify_all()
        for query in leftover:
            error = QueryRefusedError("closed", "the engine was closed before the query's turn")
            self._finisher.settle(query.future, error=error)
        end = None if timeout_s is None else time.monotonic() + timeout_s
        for worker in self._workers:
            worker.join(None if end is None else max(end - time.monotonic(), 0.0))
        if any(worker.is_alive() for worker in self._workers):
            return False
        self._finisher.close()
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
        lanes = self._lanes(fresh)
        if self._workers:
            for executor in fresh:
                executor.start()
        with self._lock:
            old, self._executors = self._executors, fresh
            self._scheduler.replace(lanes)
            self._inputs = _inputs(fresh) or self._inputs
            self._rests.clear()
        for executor in old:
            while executor in self._in_use:  # a batch that began before
                time.sleep(_LOOK_AGAIN_S)
            executor.close()

    def __enter__(self) -> Engine:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- workers

    def step(self) -> bool:
        """Score one batch; False if nothing waits. For tests of one executor, without workers."""
        with self._lock:
            expired = self._assign(self._now())
            job, self._jobs[0] = self._jobs[0], None
        self._finisher.flush()
        if job is not None:
            self._run(0, job)
        return expired or job is not None

    def _work(self, index: int) -> None:
        wake = self._wakes[index]
        while True:
            with self._lock:
                self._assign(self._now())
                job, self._jobs[index] = self._jobs[index], None
                idle = job is None
                if idle and self._closed and not len(self._scheduler):
                    for other in self._wakes:
                        other.notify_all()
                    break
                if idle and not self._finisher.has_some:
                    # With queries left to a busy executor, look again now and then: it may be stuck.
                    wake.wait(_LOOK_AGAIN_S if len(self._scheduler) else None)
            self._finisher.flush()
            if job is not None:
                self._run(index, job)
        self._finisher.flush()

    def _assign(self, now: float) -> bool:
        """Refuse what is hopeless, hand jobs to free executors; the lock is held. True if something was
        refused."""
        expired = self._scheduler.expire(now)
        for ticket in expired:
            self._statistics.refused["expired"] += 1
            self._finisher.later(
                ticket.item.future,
                QueryRefusedError(
                    "expired", "the deadline could no longer be met when the query's turn came"
                ),
            )
        while (job := self._scheduler.next(now)) is not None:
            self._jobs[job.index] = job
            self._wakes[job.index].notify()
        return bool(expired)

    def _run(self, index: int, job: Job) -> None:
        """Score a job and settle the queries that it completes."""
        executor, settled = self._executors[index], []
        self._in_use[index] = executor
        pieces = [piece for piece in job.pieces if self._is_wanted(piece.ticket)]
        path_s, own = 0.0, len(pieces) == len(job.pieces)
        try:
            if pieces:
                path_s = self._score(executor, job.path, pieces, settled)
        except BaseException as error:  # of any kind: the worker goes on
            settled += [(piece, error) for piece in pieces]
        with self._lock:
            now = self._now()
            self._in_use[index] = None
            if path_s > 0 and own:
                self._rests.pop((index, job.path), None)
                self._rests.pop((index, None), None)
                self._scheduler.done(job, now, path_s)
            elif path_s < 0:  # the job's path raised where another did not
                self._scheduler.failed(job, now, self._longer_rest(index, job.path))
                self._statistics.path_errors[job.path] += 1
            else:
                self._scheduler.failed(job, now)
            if len(self._executors) > 1:
                settled = self._try_elsewhere(index, settled, now)
            self._statistics.batches += 1
            self._batches[index] += 1
            self._busy[index] += now - job.started
            ready = [self._count(piece, outcome, now) for piece, outcome in settled]
        for item in ready:
            if item is not None:
                self._finisher.settle(*item)
        self._finisher.flush()
        if path_s > 0:
            spent = max(self._now() - job.started - path_s, 0.0) / len(job.pieces)
            known = self._scheduler.query_s
            spent = min(
                spent, 2 * known + _OWN_WORK_S
            )  # one wait for the interpreter's lock counts for little
            self._scheduler.query_s += _OWN_WORK_GAIN * (spent - known)

    def _score(
        self, executor: Executor, path: str, pieces: Sequence[Piece], settled: list[tuple[Piece, object]]
    ) -> float:
        """Score pieces by ``path``, or by another if it raises; if all do, half the pieces at a time, so that
        only queries at fault fail. Adds (piece, (path, scores) or error) to ``settled``. Seconds of the path;
        -1 if another path answered; 0 if no path did.
        """
        batch = join(
            [ticket.item.batch for ticket, _, _ in pieces],
            [start for _, start, _ in pieces],
            [stop for _, _, stop in pieces],
        )
        first_error = None
        others = sorted((p for p in executor.paths if p.name != path), key=lambda p: -p.quality)
        for name in (path, *(p.name for p in others if p.supports is None or p.supports(len(batch)))):
            try:
                start = self._now()
                scores = executor.run(name, batch)
                end = self._now()
                if scores.shape != batch.labels.shape:
                    shape = tuple(scores.shape)
                    raise RuntimeError(f"path {name!r} gave {shape} scores for {len(batch)} samples")
                if not (math.isfinite(scores.sum().item()) or torch.isfinite(scores).all()):
                    raise ArithmeticError(f"path {name!r} gave scores that are not finite")
            except BaseException as error:
                first_error = first_error or error
                continue
            parts = scores.split([stop - start for _, start, stop in pieces])
            settled += [(piece, (name, part)) for piece, part in zip(pieces, parts, strict=True)]
            return max(end - start, 1e-9) if first_error is None else -1.0
        if len(pieces) == 1:
            settled.append((pieces[0], first_error))
            return 0.0
        middle = len(pieces) // 2
        parts = [self._score(executor, path, part, settled) for part in (pieces[:middle], pieces[middle:])]
        return min(min(parts), 0.0)

    # -- the lock is held

    def _longer_rest(self, index: int, path: str | None) -> float:
        """Seconds for which a path (None: all) of an executor is left alone; each time twice as long."""
        rest = min(2 * self._rests.get((index, path), _FIRST_REST_S / 2), _LONGEST_REST_S)
        self._rests[index, path] = rest
        return rest

    def _try_elsewhere(self, index: int, settled: list[tuple[Piece, object]], now: float) -> list:
        """Queries that no path of executor ``index`` could score wait for another executor, which is asked
        alone until it has shown whose fault that was; what is left is settled.
        """
        left = []
        for piece, outcome in settled:
            query, failed = piece.ticket.item, isinstance(outcome, BaseException)
            whole = piece.stop - piece.start == piece.ticket.size
            if failed and query.failed_on is None and whole and query.missing and not self._closed:
                query.failed_on = index
                self._scheduler.again(piece.ticket)
                self._scheduler.rest(index, now, _FIRST_REST_S)
                continue
            if query.failed_on is not None:
                culprit = query.failed_on
                self._scheduler.rest(culprit, now, 0.0 if failed else self._longer_rest(culprit, None))
                if not failed:
                    self._statistics.executor_errors[self._executors[culprit].name] += 1
            left.append((piece, outcome))
        return left

    def _now(self) -> float:
        """The clock's time. If it was set back, time stands still there and then goes on."""
        now = self.clock() + self._offset
        if now < self._last:
            self._offset += self._last - now
            now = self._last
        self._last = now
        return now

    def _is_wanted(self, ticket: Ticket) -> bool:
        query = ticket.item
        if query.future.cancelled():
            with self._lock:
                if query.missing:
                    query.missing = 0
                    self._statistics.cancelled += 1
                    self._scheduler.withdraw(ticket)
            return False
        return query.missing > 0

    def _count(self, piece: Piece, outcome, now: float):
        """Enter a piece's scores or error; (future, answer, error) if that settles its query."""
        query = piece.ticket.item
        if not query.missing:
            return None  # settled before, by another piece's error or by closing
        if isinstance(outcome, BaseException):
            query.missing = 0
            self._statistics.failed += 1
            self._scheduler.withdraw(piece.ticket)
            return query.future, None, outcome
        path, scores = outcome
        size = piece.stop - piece.start
        self._statistics.samples[path] += size
        query.paths[path] = query.paths.get(path, 0) + size
        query.scores[piece.start] = scores
        query.missing -= size
        if query.missing:
            return None
        self._statistics.answered += 1
        self._statistics.late += now > piece.ticket.deadline
        self._last_answer = now
        if len(query.scores) > 1:
            scores = torch.cat([query.scores[start] for start in sorted(query.scores)])
        return (
            query.future,
            Answer(scores, query.paths, query.arrived - self._offset, now - self._offset),
            None,
        )

    # -- what does not change

    def _lanes(self, executors: Sequence[Executor]) -> list[Lane]:
        return [Lane(e.name, [_option(path, e, self.max_batch) for path in e.paths]) for e in executors]

    def _check(self, batch: Batch) -> None:
        if not len(batch):
            raise ValueError("batch must have at least one sample")
        if batch.dense.dim() != 2 or len(batch.dense) != len(batch):
            raise ValueError(f"dense must be [{len(batch)}, numbers], got {list(batch.dense.shape)}")
        inputs = num_features(batch), batch.dense.shape[1]
        if self._inputs is not None and inputs != self._inputs:
            raise ValueError(
                f"batch has {inputs[0]} features and {inputs[1]} dense numbers, "
                f"the paths take {self._inputs[0]} and {self._inputs[1]}"
            )


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


def _option(path, executor: Executor, max_batch: int) -> Option:
    seconds = executor.profile.curve(path.name, "mean").table(max_batch)
    if path.supports is not None:
        seconds = [s if b and path.supports(b) else math.inf for b, s in enumerate(seconds)]
    return Option(path.name, path.quality, seconds)


def _inputs(executors: Sequence[Executor]) -> tuple[int, int] | None:
    """(features, dense numbers) that the paths take, where they say so."""
    return next((path.inputs for e in executors for path in e.paths if path.inputs is not None), None)
