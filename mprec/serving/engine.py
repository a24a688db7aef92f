"""One worker that answers queries in order of arrival, in batches of the size that serves them best.

Small queries are merged and large ones split, so a *batch* is what a path scores, and a *query* what a
client asked. Every query ends in exactly one way: an answer, a refusal with a reason, or the error that its
own input caused.

Which path answers a batch is the dispatcher's choice. The time it may take is what is left of the most
urgent deadline; that of the batch itself, and those of the queries behind it, which need at least the
fastest path's time for all samples ahead of them. A slow path is thus not taken at the expense of the
queue.

Not all of that time is spent: quality may take a share of it, the *headroom*, which follows what happens.
Each query that is late or refused lowers it, each in time raises it, by steps in the proportion in which a
share ``miss_rate`` of misses keeps it where it is (the stochastic approximation of a quantile). So
predictions that are too rosy, bursts and noisy neighbours cost quality first, and targets only when the
fastest path misses them too.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from mprec.data import Batch
from mprec.data.batching import concatenate, num_features, take
from mprec.dispatch import Dispatcher, unique_share

__all__ = ["Answer", "Engine", "QueryRefusedError", "Statistics"]


_LOOK_AHEAD = 32  # queries behind a batch whose deadlines bound its time
_STEP = 0.1  # by which a miss lowers the headroom
_LEAST_HEADROOM = 0.05


class QueryRefusedError(RuntimeError):
    """The engine did not score a query. ``reason``: ``full``, ``overload``, ``expired`` or ``closed``."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Answer:
    """``scores`` float [B] in the order of the query's samples; ``paths``: samples scored by each path.

    Times are the engine's clock in seconds: when the query came, when the last of it was scored.
    """

    scores: torch.Tensor
    paths: dict[str, int]
    arrived_s: float
    finished_s: float

    @property
    def latency_s(self) -> float:
        return self.finished_s - self.arrived_s


@dataclass
class Statistics:
    """Counts since the engine was made."""

    queries: int = 0
    answered: int = 0
    late: int = 0  # answered, after the deadline
    failed: int = 0  # the query's own input raised
    refused: Counter = field(default_factory=Counter)  # by reason
    batches: int = 0
    samples: Counter = field(default_factory=Counter)  # by path


class _Query:
    """A query and how far it is: samples taken for scoring, scores so far."""

    __slots__ = ("arrived", "batch", "deadline", "future", "paths", "scores", "taken")

    def __init__(self, batch: Batch, arrived: float, deadline: float) -> None:
        self.batch, self.arrived, self.deadline = batch, arrived, deadline
        self.future: Future[Answer] = Future()
        self.taken = 0
        self.scores: list[torch.Tensor] = []
        self.paths: Counter[str] = Counter()

    @property
    def waiting(self) -> int:
        return len(self.batch) - self.taken


class _Piece(NamedTuple):
    """Samples ``start`` to ``stop`` of a query, scored in one batch."""

    query: _Query
    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start


class Engine:
    """Scores queries (``Batch``) within ``sla_s`` seconds of their arrival.

    Batches have at most ``max_batch`` samples. ``max_queue`` bounds the samples waiting: a query that
    would exceed it is refused (``full``). With ``admission``, so is one that cannot be in time even if
    everything ahead of it takes the fastest path (``overload``), and one whose deadline passed while it
    waited (``expired``): their time goes to queries that can still be met. Without it late answers are
    given late. ``miss_rate`` is the share of queries not in time that may be risked for quality.

    ``submit`` may be called from any thread. The worker starts with ``start()`` or ``with``; a test can
    call ``step()`` instead, with a ``clock`` of its own.
    """

    def __init__(
        self,
        dispatcher: Dispatcher,
        *,
        sla_s: float,
        max_batch: int = 2048,
        max_queue: int = 65536,
        admission: bool = True,
        miss_rate: float = 0.01,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        for name, value in (("sla_s", sla_s), ("max_batch", max_batch), ("max_queue", max_queue)):
            if not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")
        if not 0 < miss_rate < 1:
            raise ValueError(f"miss_rate must be between 0 and 1, got {miss_rate}")
        self.dispatcher = dispatcher
        self.sla_s, self.max_batch, self.max_queue = sla_s, max_batch, max_queue
        self.admission, self.miss_rate = admission, miss_rate
        self._headroom = 1.0
        self._clock = clock
        self._queue: deque[_Query] = deque()
        self._waiting = 0  # samples in the queue not yet taken
        self._busy_until = 0.0  # when the batch being scored is predicted to be done
        self._shape: tuple[int, int] | None = None  # (features, dense numbers) of the first query
        self._closed = False
        self._condition = threading.Condition()
        self._worker: threading.Thread | None = None
        self._statistics = Statistics()

    # -- clients

    def submit(
        self, batch: Batch, sla_s: float | None = None, arrived_s: float | None = None
    ) -> Future[Answer]:
        """Queue a query. The future holds an :class:`Answer`, or raises ``QueryRefusedError`` or what the
        query's own input raised in the model. ``arrived_s`` (on the engine's clock) is for queries that
        came before this call: their target counts from then.

        ``ValueError`` at once for a query that has no samples, a bad SLA, or other features or dense
        numbers than the first query had.
        """
        sla_s = self.sla_s if sla_s is None else sla_s
        if not sla_s > 0:
            raise ValueError(f"sla_s must be positive, got {sla_s}")
        shape = self._check(batch)
        now = self._clock()
        arrived = now if arrived_s is None else arrived_s
        query = _Query(batch, arrived, arrived + sla_s)
        with self._condition:
            self._statistics.queries += 1
            if self._shape is None:
                self._shape = shape
            elif shape != self._shape:
                self._statistics.failed += 1
                raise ValueError(
                    f"batch has {shape[0]} features and {shape[1]} dense numbers, "
                    f"the first one had {self._shape[0]} and {self._shape[1]}"
                )
            refusal = self._refusal(query, now)
            if refusal is None:
                self._queue.append(query)
                self._waiting += len(batch)
                self._condition.notify()
        if refusal is not None:
            self._refuse(query, *refusal)
        return query.future

    def statistics(self) -> dict:
        """Counts so far, the samples waiting, and the dispatcher's corrections; JSON-able."""
        with self._condition:
            counts = dict(vars(self._statistics))
            return {
                **counts,
                "refused": dict(counts["refused"]),
                "samples": dict(counts["samples"]),
                "waiting_samples": self._waiting,
                "headroom": self._headroom,
                "corrections": self.dispatcher.corrections,
            }

    def start(self) -> Engine:
        """Start the worker. ``RuntimeError`` if it runs already or the engine is closed."""
        with self._condition:
            if self._worker is not None or self._closed:
                raise RuntimeError("the engine is closed" if self._closed else "the engine runs already")
            self._worker = threading.Thread(target=self._run, name="mprec-engine", daemon=True)
        self._worker.start()
        return self

    def close(self, drain: bool = True, timeout_s: float | None = None) -> bool:
        """Refuse new queries; answer those that wait (or, with ``drain=False``, refuse them too); stop.

        True once the worker has stopped; False if that took longer than ``timeout_s``. May be called again.
        """
        with self._condition:
            self._closed = True
            leftover = [] if drain and self._worker is not None else list(self._queue)
            if leftover:
                self._queue.clear()
                self._waiting = 0
            self._condition.notify_all()
        for query in leftover:
            self._refuse(query, "closed", "the engine was closed before the query's turn")
        if self._worker is not None:
            self._worker.join(timeout_s)
            return not self._worker.is_alive()
        return True

    def __enter__(self) -> Engine:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- worker

    def _run(self) -> None:
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self._queue or self._closed)
                if not self._queue:
                    return
            self.step()

    def step(self) -> bool:
        """Score one batch; False if nothing waits. For the worker's thread, or tests without one."""
        now = self._clock()
        with self._condition:
            expired = self._drop_expired(now)
            pieces, left = self._take_batch(now)
        for query in expired:
            self._refuse(query, "expired", "the deadline could no longer be met when the query's turn came")
        if pieces:
            self._score(pieces, left)
        return bool(pieces or expired)

    def _take_batch(self, now: float) -> tuple[list[_Piece], float]:
        """The next samples to score together, and the seconds they may take.

        A query larger than ``max_batch`` is split. Behind a whole one others join, whole, as long as that
        neither costs the batch its path's quality nor the deadline; one that is lost anyway takes along
        whatever fits, as throughput is all that can be saved then.
        """
        if not self._queue:
            return [], 0.0
        pieces = [self._take(self._queue[0], self.max_batch)]
        size, urgent = pieces[0].size, pieces[0].query
        left = self._time_left(now, urgent)
        while self._queue and not pieces[-1].query.waiting:
            nearest = self._queue[0]
            joined = size + nearest.waiting
            if joined > self.max_batch:
                break
            most_urgent = min(urgent, nearest, key=lambda query: query.deadline)
            joined_left = self._time_left(now, most_urgent, skip=1)
            path = self.dispatcher.choose(size, left)
            if self.dispatcher.predict(size, path.name) <= left:
                other = self.dispatcher.choose(joined, joined_left)
                in_time = self.dispatcher.predict(joined, other.name) <= joined_left
                if not in_time or other.quality < path.quality:
                    break
            elif (
                most_urgent.deadline - self._fastest(joined)
                < now
                <= most_urgent.deadline - self._fastest(size)
            ):
                break
            pieces.append(self._take(nearest, self.max_batch))
            size, urgent, left = joined, most_urgent, joined_left
        return pieces, left

    def _take(self, query: _Query, room: int) -> _Piece:
        piece = _Piece(query, query.taken, min(len(query.batch), query.taken + room))
        query.taken = piece.stop
        self._waiting -= piece.size
        if not query.waiting:
            self._queue.popleft()
        return piece

    def _time_left(self, now: float, urgent: _Query, skip: int = 0) -> float:
        """Seconds that a batch with this most urgent query may take, so that the queries behind it can be in
        time too (the nearest of them: those further back are looked at when their turn comes near).
        """
        left = self._planned(urgent) - now
        ahead = 0
        for query in itertools.islice(self._queue, skip, skip + _LOOK_AHEAD):
            ahead += query.waiting
            fastest = now + self._fastest(ahead)
            if fastest <= query.deadline:  # a query that is lost anyway does not hurry the rest
                left = min(left, max(self._planned(query) - fastest, 0.0))
        return left

    def _planned(self, query: _Query) -> float:
        """When a query should be done, so that what is uncertain does not make it late."""
        return query.arrived + self._headroom * (query.deadline - query.arrived)

    def _fastest(self, samples: int) -> float:
        """Seconds that the fastest path is expected to take for this many samples, in full batches."""
        full, rest = divmod(samples, self.max_batch)
        seconds = full * self.dispatcher.expect(self.max_batch) if full else 0.0
        return seconds + (self.dispatcher.expect(rest) if rest else 0.0)

    def _score(self, pieces: Sequence[_Piece], left: float) -> None:
        samples = sum(piece.size for piece in pieces)
        share = None  # of unique IDs

        def count_share() -> float:
            nonlocal share
            share = unique_share(batch)
            return share

        start = self._clock()
        try:
            batch = concatenate([take(p.query.batch, slice(p.start, p.stop)) for p in pieces])
            path = self.dispatcher.choose(samples, left, unique_share=count_share)
            self._busy_until = start + self.dispatcher.expect(samples, path.name, share)
            scores = torch.as_tensor(path.model(batch))
            if scores.shape != (samples,):
                raise RuntimeError(
                    f"path {path.name!r} gave {tuple(scores.shape)} scores for {samples} samples"
                )
        except Exception as error:
            self._isolate(pieces, left, error)
            return
        finally:
            self._busy_until = 0.0
        finished = self._clock()
        self.dispatcher.observe(path.name, samples, finished - start, share)
        with self._condition:
            self._statistics.batches += 1
            self._statistics.samples[path.name] += samples
        offset = 0
        for piece in pieces:
            query = piece.query
            query.scores.append(scores[offset : offset + piece.size])
            query.paths[path.name] += piece.size
            offset += piece.size
            if piece.stop == len(query.batch):
                self._answer(query, finished)

    def _isolate(self, pieces: Sequence[_Piece], left: float, error: Exception) -> None:
        """A batch failed: score its queries one by one, so that only those at fault fail."""
        if len(pieces) > 1:
            for piece in pieces:
                self._score([piece], left)
            return
        query = pieces[0].query
        with self._condition:
            self._statistics.failed += 1
            if query.waiting:  # the rest of a split query need not be tried
                self._queue.remove(query)
                self._waiting -= query.waiting
        _finish(query.future, error=error)

    def _answer(self, query: _Query, finished: float) -> None:
        with self._condition:
            self._statistics.answered += 1
            self._statistics.late += finished > query.deadline
            self._learn(in_time=finished <= query.deadline)
        scores = query.scores[0] if len(query.scores) == 1 else torch.cat(query.scores)
        _finish(query.future, Answer(scores, dict(query.paths), query.arrived, finished))

    # -- admission; the condition is held

    def _check(self, batch: Batch) -> tuple[int, int]:
        if not len(batch):
            raise ValueError("batch must have at least one sample")
        if batch.dense.dim() != 2 or len(batch.dense) != len(batch):
            raise ValueError(f"dense must be [{len(batch)}, numbers], got {list(batch.dense.shape)}")
        return num_features(batch), batch.dense.shape[1]

    def _refusal(self, query: _Query, now: float) -> tuple[str, str] | None:
        size = len(query.batch)
        if self._closed:
            return "closed", "the engine is closed"
        if self._waiting + size > self.max_queue:
            return "full", f"{self._waiting} samples wait already, {size} more would exceed {self.max_queue}"
        if self.admission:
            busy = max(self._busy_until - now, 0.0)
            needed = busy + self._fastest(self._waiting + size)
            if now + needed > query.deadline:
                left = query.deadline - now
                return "overload", f"would take {1e3 * needed:.3f} ms at best, {1e3 * left:.3f} ms are left"
        return None

    def _drop_expired(self, now: float) -> list[_Query]:
        """Queries at the head of the queue, not yet begun, that no path can answer in time any more."""
        expired = []
        while self.admission and self._queue:
            query = self._queue[0]
            if query.taken or now + self._fastest(query.waiting) <= query.deadline:
                break
            expired.append(self._queue.popleft())
            self._waiting -= query.waiting
        return expired

    def _learn(self, in_time: bool) -> None:
        """Move the headroom after a query; the condition is held."""
        step = self.miss_rate if in_time else self.miss_rate - 1
        self._headroom = min(1.0, max(_LEAST_HEADROOM, self._headroom + _STEP * step))

    def _refuse(self, query: _Query, reason: str, message: str) -> None:
        with self._condition:
            self._statistics.refused[reason] += 1
            if reason != "closed":
                self._learn(in_time=False)
        _finish(query.future, error=QueryRefusedError(reason, message))


def _finish(future: Future, answer: Answer | None = None, error: Exception | None = None) -> None:
    """Settle a future, unless its client has cancelled it. Never raises: callbacks' errors are logged."""
    if future.set_running_or_notify_cancel():
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(answer)
