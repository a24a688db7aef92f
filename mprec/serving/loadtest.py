"""Load tests: queries of real samples arriving at random, answered by an engine in real time.

Arrivals and query sizes are those of :mod:`mprec.arrivals`: by default a Poisson process and lognormal
sizes, as in DeepRecSys (Gupta et al., ISCA 2020) and MP-Rec. Latency counts from the moment a query was due,
not from when the generator got round to submitting it, so a stall of the whole process is seen (no
coordinated omission). How late the generator was is told too: where that is much, the run was disturbed.
Contestants take turns over pieces of the same load, so that a noisy neighbour hits all of them alike, and the
garbage collector is off, since one collection would decide a contest.

The figure of merit is the *latency-bounded throughput of correct predictions*: samples whose query was
answered in time and whose predicted class is the label, per second of the load. Nothing is assumed: both are
counted. The divisor is the load's own duration, so that a contestant which uses the time it has is not
punished.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mprec.arrivals import LOGNORMAL_SIZES, QuerySizes, Sizes
from mprec.data import Batch, ClickDataset
from mprec.dispatch import Dispatcher, Profile, ScoringPath
from mprec.dispatch.microbenchmark import no_collection
from mprec.serving.engine import Answer, Engine, QueryRefusedError
from mprec.serving.executors import Executor
from mprec.serving.loads import Arrival, generate, generate_from
from mprec.serving.process_executor import ProcessExecutor
from mprec.serving.queries import Replayed

__all__ = [
    "Arrival",
    "Outcome",
    "QuerySizes",
    "UnansweredError",
    "capacity",
    "compare",
    "contestants",
    "engine_for",
    "find_max_qps",
    "generate",
    "generate_from",
    "ratio_to_best",
    "replay",
    "suggested_qps",
]


class UnansweredError(RuntimeError):
    """Queries were refused or failed where all had to be answered."""


@dataclass
class Outcome:
    """What became of the queries of one contestant."""

    sla_s: float
    latencies_s: list[float] = field(default_factory=list)  # of answered queries
    in_time: int = 0
    refused: Counter = field(default_factory=Counter)  # by reason
    failed: int = 0
    samples: int = 0  # answered
    correct: int = 0  # of those
    correct_in_time: int = 0
    samples_in_time: int = 0
    seconds: float = 0.0  # of the load
    piece_rates: list[float] = field(default_factory=list)  # correct in time per second, piece by piece
    last_finish_s: float = -math.inf  # on the engine's clock
    paths: Counter = field(default_factory=Counter)  # answered samples by path
    generator_late_s: list[float] = field(default_factory=list)  # of every query, until it was submitted
    corrections: list[dict[str, float]] = field(default_factory=list)  # the engine's, after each piece

    @property
    def queries(self) -> int:
        return len(self.latencies_s) + sum(self.refused.values()) + self.failed

    @property
    def violations(self) -> float:
        """Share of the queries not answered within the target: late, refused or failed."""
        return 1 - self.in_time / self.queries if self.queries else 0.0

    def percentile_ms(self, q: float) -> float | None:
        """Latency of the answered queries; None if there are none."""
        return float(np.percentile(self.latencies_s, q)) * 1e3 if self.latencies_s else None

    @property
    def rate_error(self) -> float | None:
        """Standard error of the correct predictions per second, over the pieces; None with one piece."""
        if len(self.piece_rates) < 2:
            return None
        return statistics.stdev(self.piece_rates) / math.sqrt(len(self.piece_rates))

    def slowness(self) -> dict[str, float]:
        """Observed over profiled time of each path that answered: the median over the pieces."""
        return {
            path: statistics.median(after[path] for after in self.corrections if path in after)
            for path in sorted(self.paths)
            if any(path in after for after in self.corrections)
        }

    def row(self, name: str) -> dict[str, Any]:
        """JSON-able summary. ``violations`` (late, refused or failed) and ``late`` are shares of the
        queries; ``refused`` and ``failed`` are counts; ``correct_per_s_error`` is a standard error.
        """
        late = len(self.latencies_s) - self.in_time
        return {
            "path": name,
            **{f"p{q}_ms": self.percentile_ms(q) for q in (50, 95, 99)},
            "queries": self.queries,
            "violations": self.violations,
            "late": late / self.queries if self.queries else 0.0,
            "refused": dict(self.refused),
            "failed": self.failed,
            "accuracy": self.correct / self.samples if self.samples else None,
            "samples_per_s": self.samples_in_time / self.seconds if self.seconds else 0.0,
            "correct_per_s": self.correct_in_time / self.seconds if self.seconds else 0.0,
            "correct_per_s_error": self.rate_error,
            "pieces": self.piece_rates,
            "chosen": {path: count / self.samples for path, count in sorted(self.paths.items())},
            "slowness": self.slowness(),
            "generator_late_ms": float(np.percentile(self.generator_late_s, 99)) * 1e3
            if self.generator_late_s
            else None,
        }

    def _add(self, batch: Batch, query: Replayed) -> None:
        """Count one query."""
        self.generator_late_s.append(query.late_s)
        if query.refused:
            self.refused[query.refused] += 1
            return
        if query.failed:
            self.failed += 1
            return
        latency = query.finished_s - query.due_s
        correct = int(((query.scores >= 0.5) == (batch.labels >= 0.5)).sum())
        in_time = latency <= self.sla_s
        self.latencies_s.append(latency)
        self.samples += len(batch)
        self.correct += correct
        self.in_time += in_time
        self.samples_in_time += len(batch) * in_time
        self.correct_in_time += correct * in_time
        self.paths.update(query.paths)
        self.last_finish_s = max(self.last_finish_s, query.finished_s)


def replay(
    engine: Engine,
    load: Sequence[Arrival],
    outcome: Outcome | None = None,
    *,
    starts_s: float | None = None,
    seconds: float | None = None,
    sleep: Callable[[float], None] | None = None,
) -> Outcome:
    """Submit a load's queries when they are due to a started engine, wait for all, and count.

    ``starts_s``: when in the load's time this piece of it starts (None: at its first query). ``seconds``: how
    long the piece lasts (None: from the first to the last query's due time, and one mean gap); added to the
    outcome's seconds. Adds to ``outcome`` if given. ``sleep``: for an engine whose clock is not real; None:
    queries come by :meth:`Engine.replay`.
    """
    outcome = Outcome(engine.sla_s) if outcome is None else outcome
    if seconds is None:
        seconds = (load[-1].at_s - load[0].at_s) * len(load) / max(len(load) - 1, 1) if load else 0.0
    if load and starts_s is None:
        starts_s = load[0].at_s
    batches, at_s = [arrival.batch for arrival in load], [arrival.at_s - starts_s for arrival in load]
    found = engine.replay(batches, at_s) if sleep is None else _submit_all(engine, batches, at_s, sleep)
    before = outcome.correct_in_time
    for batch, query in zip(batches, found, strict=True):
        outcome._add(batch, query)
    outcome.corrections.append(dict(engine.statistics()["corrections"]))
    outcome.seconds += seconds
    if seconds:
        outcome.piece_rates.append((outcome.correct_in_time - before) / seconds)
    return outcome


def _submit_all(
    engine: Engine, batches: Sequence[Batch], at_s: Sequence[float], sleep: Callable[[float], None]
) -> list[Replayed]:
    """As :meth:`Engine.replay`, on the engine's own clock."""
    clock, waiting = engine.clock, []
    start = clock()
    for batch, at in zip(batches, at_s, strict=True):
        due = start + at
        if (wait := due - clock()) > 0:
            sleep(wait)
        late = clock() - due
        waiting.append((late, due, engine.submit(batch, arrived_s=due)))
    return [_outcome_of(*each) for each in waiting]


def _outcome_of(late: float, due: float, future: Future[Answer]) -> Replayed:
    try:
        answer = future.result()
    except QueryRefusedError as error:
        return Replayed(late, due, 0.0, error.reason, False, None, {})
    except Exception:
        return Replayed(late, due, 0.0, "", True, None, {})
    return Replayed(late, due, answer.finished_s, "", False, answer.scores, answer.paths)


def contestants(
    paths: Sequence[ScoringPath], profile: Profile, *, dispatcher: str = "dispatcher", processes: int = 0
) -> dict[str, Contestant]:
    """Every path alone, and the dispatcher among all of them, last. Each is served in this process, or by so
    many ``processes`` of one thread each, for which the profile should be of one thread too."""

    def serve(some: Sequence[ScoringPath]) -> Contestant:
        if not processes:
            return Dispatcher(some, profile)
        return [ProcessExecutor(f"cpu {i}", some, profile) for i in range(processes)]

    if dispatcher in {path.name for path in paths}:
        raise ValueError(f"a path is called {dispatcher!r} already")
    return {**{path.name: serve([path]) for path in paths}, dispatcher: serve(paths)}


#: What serves: a dispatcher in this process, or the executors of an engine.
Contestant = Dispatcher | Sequence[Executor]


def engine_for(contestant: Contestant, **options: Any) -> Engine:
    """An engine, not yet started."""
    if isinstance(contestant, Dispatcher):
        return Engine(contestant, **options)
    return Engine(executors=contestant, **options)


def compare(
    dispatchers: Mapping[str, Contestant],
    load: Sequence[Arrival],
    *,
    rounds: int = 4,
    repeats: int = 1,
    seconds: float | None = None,
    seed: int = 0,
    progress: Callable[[str, float], object] | None = None,
    **engine_options: Any,
) -> dict[str, Outcome]:
    """Let each contestant serve the same load; in turns, a piece of the load each, ``rounds`` pieces.

    The whole load is served ``repeats`` times. The order of the turns is drawn anew for every piece. With
    ``seconds``, the load's nominal duration, pieces last equally long; without, they have equally many
    queries. Each contestant serves with an engine of its own (``engine_options``: ``sla_s``, ``max_batch``,
    ...), empty at the start of every piece.
    ``progress`` gets who is next and the share done.
    """
    if not 1 <= rounds <= len(load):
        raise ValueError(f"rounds: expected between 1 and the number of queries, {len(load)}, got {rounds}")
    if seconds is None:
        edges, starts, lasts = np.linspace(0, len(load), rounds + 1).astype(int), [None] * rounds, None
    else:
        if not load[-1].at_s < seconds < math.inf:
            raise ValueError(f"seconds: expected more than the last query's {load[-1].at_s:g}, got {seconds}")
        cuts = np.linspace(0.0, seconds, rounds + 1)
        edges, starts = np.searchsorted([a.at_s for a in load], cuts), cuts[:-1].tolist()
        lasts = seconds / rounds
    engines = {name: engine_for(d, **engine_options).start() for name, d in dispatchers.items()}
    outcomes = {name: Outcome(engine.sla_s) for name, engine in engines.items()}
    names = list(engines)
    order = np.random.default_rng(seed)
    try:
        with no_collection():
            for turn in range(repeats * rounds):
                r = turn % rounds
                piece = load[edges[r] : edges[r + 1]]
                for i, name in enumerate(order.permutation(names).tolist()):
                    if progress is not None:
                        progress(name, (turn * len(names) + i) / (repeats * rounds * len(names)))
                    replay(engines[name], piece, outcomes[name], starts_s=starts[r], seconds=lasts)
    finally:
        for engine in engines.values():
            engine.close()
    return outcomes


def ratio_to_best(
    outcomes: Mapping[str, Outcome], name: str = "dispatcher", static: Sequence[str] | None = None
) -> tuple[float, float, str]:
    """(correct predictions per second of ``name`` over those of the best of ``static``, the standard error of
    that ratio over the pieces, the best one's name). ``static``: None for all but ``name``.

    The greatest of several noisy figures is too great: of ten equal contestants the luckiest is ahead of the
    mean by 1.5 standard errors. So each piece is compared with the path that is best *in the other pieces*
    (cross-validation; Stone 1974, "Cross-Validatory Choice and Assessment of Statistical Predictions"), as a
    user would choose a path: by what it did before. With one piece, that piece chooses.

    NaN errors with one piece; NaN ratios where nobody answered.
    """
    static = [other for other in outcomes if other != name] if static is None else list(static)
    rates = np.array([outcomes[other].piece_rates for other in static])  # [contestants, pieces]
    best = static[int(np.argmax(rates.sum(axis=1)))]
    mine = np.array(outcomes[name].piece_rates)
    pieces = len(mine)
    elsewhere = rates.sum(axis=1, keepdims=True) - rates if pieces > 1 else rates
    theirs = rates[np.argmax(elsewhere, axis=0), np.arange(pieces)]
    if not theirs.sum():
        return math.nan, math.nan, best
    ratio = float(mine.sum() / theirs.sum())
    if pieces < 2:
        return ratio, math.nan, best
    # Of a ratio of means, by its first-order expansion (Cochran, Sampling Techniques, section 2.11).
    error = np.std(mine - ratio * theirs, ddof=1) / math.sqrt(pieces) / theirs.mean()
    return ratio, float(error), best


def capacity(
    dispatcher: Contestant, queries: Sequence[Batch], *, repeats: int = 1, **engine_options: Any
) -> float:
    """Queries per second that an engine gets through when all of them wait from the start.

    The median of ``repeats`` runs. ``engine_options`` as for ``compare``; the SLA does not matter here.
    ``UnansweredError`` if a query was refused or failed: what is left would be no capacity.
    """
    options = {**engine_options, "sla_s": 3600.0, "admission": False}
    options["max_queue"] = max(sum(map(len, queries)), 1)
    rates = []
    for _ in range(repeats):
        with engine_for(dispatcher, **options) as engine, no_collection():
            start = engine.clock()
            outcome = replay(engine, [Arrival(0.0, batch) for batch in queries])
        if answered := len(outcome.latencies_s):
            rates.append(answered / (outcome.last_finish_s - start))
        if answered < len(queries):
            raise UnansweredError(
                f"capacity: {len(queries) - answered} of {len(queries)} queries were not answered "
                f"({outcome.failed} failed, refused: {dict(outcome.refused)})"
            )
    return statistics.median(rates)


def suggested_qps(
    dispatchers: Mapping[str, Contestant],
    dataset: ClickDataset,
    *,
    sizes: Sizes = LOGNORMAL_SIZES,
    queries: int = 200,
    seed: int = 0,
    **engine_options: Any,
) -> float:
    """A load that strains without drowning: 0.4 times the geometric mean of the least and the greatest
    measured :func:`capacity` of the contestants. (Queries that wait fill large batches; arrivals one by one
    cannot, so an engine is full well below its capacity.)
    """
    batches = [arrival.batch for arrival in generate(dataset, 1.0, queries, sizes=sizes, seed=seed)]
    for dispatcher in dispatchers.values():
        capacity(dispatcher, batches[: max(1, queries // 4)], **engine_options)  # first calls are slow
    limits = [capacity(dispatcher, batches, **engine_options) for dispatcher in dispatchers.values()]
    return 0.4 * math.sqrt(min(limits) * max(limits))


def find_max_qps(
    try_qps: Callable[[float], float],
    start: float,
    *,
    most: float = 0.01,
    precision: float = 0.05,
) -> float:
    """The highest load at which ``try_qps(qps)``, the share of violations, is at most ``most``; by bisection.

    Within ``precision`` (relative). 0 if no load above a thousandth of ``start`` is carried.
    """
    if not 0 < start < math.inf:
        raise ValueError(f"start: expected a positive finite number, got {start}")
    low, high = 0.0, start
    while try_qps(high) <= most:
        low, high = high, 2 * high
        if high > 1e3 * start:
            return low
    while high - low > precision * high:
        if high < 1e-3 * start:
            return 0.0
        middle = (low + high) / 2
        if try_qps(middle) <= most:
            low = middle
        else:
            high = middle
    return low
