"""Load tests: queries of real samples arriving at random, answered by an engine in real time.

Arrivals are a Poisson process, query sizes lognormal, as in DeepRecSys (Gupta et al., ISCA 2020) and MP-Rec.
Latency counts from the moment a query was due, not from when the generator got round to submitting it, so a
stall of the whole process is seen (no coordinated omission). Contestants take turns over pieces of the same
load, so that a noisy neighbour hits all of them alike, and the garbage collector is off, since one collection
would decide a contest.

The figure of merit is the *latency-bounded throughput of correct predictions*: samples whose query was
answered in time and whose predicted class is the label, per second of the load. Nothing is assumed: both are
counted. The divisor is the load's own duration, so that a contestant which uses the time it has is not
punished.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mprec.data import Batch, ClickDataset
from mprec.dispatch import Dispatcher, Path, Profile
from mprec.dispatch.microbenchmark import no_gc
from mprec.serving.engine import Engine, QueryRefusedError
from mprec.serving.executors import Executor
from mprec.serving.process_executor import ProcessExecutor

__all__ = [
    "LOADS",
    "Arrival",
    "Outcome",
    "QuerySizes",
    "capacity",
    "compare",
    "contestants",
    "engine_for",
    "find_max_qps",
    "generate",
    "ratio_to_best",
    "replay",
    "suggested_qps",
    "sweep",
]

#: Of the fastest path's capacity: from nearly idle to three times too much.
LOADS = (0.1, 0.3, 0.6, 0.9, 1.5, 3.0)


@dataclass(frozen=True)
class QuerySizes:
    """Lognormal number of samples per query: its ``mean`` before clipping to ``[1, largest]``, and
    ``sigma``, the standard deviation of its logarithm.
    """

    mean: float = 128.0
    sigma: float = 1.0
    largest: int = 1024

    def __post_init__(self) -> None:
        if not (self.mean > 0 and self.sigma >= 0 and self.largest >= 1):
            raise ValueError(f"query sizes need mean > 0, sigma >= 0 and largest >= 1, got {self}")

    def draw(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """int64 [count]."""
        mu = math.log(self.mean) - self.sigma**2 / 2
        return np.clip(np.rint(rng.lognormal(mu, self.sigma, count)), 1, self.largest).astype(np.int64)


@dataclass(frozen=True)
class Arrival:
    """A query that is due ``at_s`` seconds after the load's start."""

    at_s: float
    batch: Batch


def generate(
    dataset: ClickDataset, qps: float, queries: int, *, sizes: QuerySizes = QuerySizes(), seed: int = 0
) -> list[Arrival]:
    """A Poisson load: ``queries`` queries at ``qps`` per second on average, each of random rows of
    ``dataset``.
    """
    if not 0 < qps < math.inf:
        raise ValueError(f"qps must be positive and finite, got {qps}")
    if queries < 1:
        raise ValueError(f"queries must be at least 1, got {queries}")
    if not len(dataset):
        raise ValueError(f"{dataset.name}: no rows to ask about")
    rng = np.random.default_rng(seed)
    times = np.cumsum(rng.exponential(1 / qps, queries))
    return [
        Arrival(float(at), dataset.batch(rng.integers(len(dataset), size=size)))
        for at, size in zip(times, sizes.draw(queries, rng), strict=True)
    ]


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

    def row(self, name: str) -> dict[str, Any]:
        """JSON-able summary."""
        return {
            "path": name,
            **{f"p{q}_ms": self.percentile_ms(q) for q in (50, 95, 99)},
            "violations": self.violations,
            "refused": dict(self.refused),
            "failed": self.failed,
            "accuracy": self.correct / self.samples if self.samples else None,
            "samples_per_s": self.samples_in_time / self.seconds if self.seconds else 0.0,
            "correct_per_s": self.correct_in_time / self.seconds if self.seconds else 0.0,
            "pieces": self.piece_rates,
            "chosen": {path: count / self.samples for path, count in sorted(self.paths.items())},
        }

    def _add(self, due: float, batch: Batch, future) -> None:
        """Count one query."""
        try:
            answer = future.result()
        except QueryRefusedError as error:
            self.refused[error.reason] += 1
            return
        except Exception:
            self.failed += 1
            return
        latency = answer.finished_s - due
        correct = int(((answer.scores >= 0.5) == (batch.labels >= 0.5)).sum())
        in_time = latency <= self.sla_s
        self.latencies_s.append(latency)
        self.samples += len(batch)
        self.correct += correct
        self.in_time += in_time
        self.samples_in_time += len(batch) * in_time
        self.correct_in_time += correct * in_time
        self.paths.update(answer.paths)
        self.last_finish_s = max(self.last_finish_s, answer.finished_s)


def replay(
    engine: Engine,
    load: Sequence[Arrival],
    outcome: Outcome | None = None,
    *,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> Outcome:
    """Submit a load's queries when they are due to a started engine, wait for all, and count.

    Its clock must be the engine's. Adds to ``outcome`` if given. The load's duration is added to its seconds:
    the time from the first to the last query's due time, and one mean gap.
    """
    outcome = Outcome(engine.sla_s) if outcome is None else outcome
    origin = load[0].at_s
    start = clock()
    futures = []
    for arrival in load:
        due = start + arrival.at_s - origin
        if (wait := due - clock()) > 0:
            sleep(wait)
        futures.append((due, engine.submit(arrival.batch, arrived_s=due)))
    before = outcome.correct_in_time
    for arrival, (due, future) in zip(load, futures, strict=True):
        outcome._add(due, arrival.batch, future)
    span = load[-1].at_s - origin
    seconds = span * len(load) / max(len(load) - 1, 1)
    outcome.seconds += seconds
    if seconds:
        outcome.piece_rates.append((outcome.correct_in_time - before) / seconds)
    return outcome


def contestants(
    paths: Sequence[Path], profile: Profile, *, dispatcher: str = "dispatcher", processes: int = 0
) -> dict[str, Contestant]:
    """Every path alone, and the dispatcher among all of them, last. Each is served in this process, or by so
    many ``processes`` of one thread each, for which the profile should be of one thread too."""

    def serve(some: Sequence[Path]) -> Contestant:
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
    progress: Callable[[str, float], object] | None = None,
    **engine_options: Any,
) -> dict[str, Outcome]:
    """Let each contestant serve the same load; in turns, a piece of the load each, ``rounds`` pieces.

    Each serves with an engine of its own (``engine_options``: ``sla_s``, ``max_batch``, ...), empty at
    the start of every piece. ``progress`` gets who is next and the share done.
    """
    if not 1 <= rounds <= len(load):
        raise ValueError(f"rounds must be between 1 and the number of queries, {len(load)}, got {rounds}")
    engines = {name: engine_for(d, **engine_options).start() for name, d in dispatchers.items()}
    outcomes = {name: Outcome(engine.sla_s) for name, engine in engines.items()}
    edges = np.linspace(0, len(load), rounds + 1).astype(int)
    names = list(engines)
    order = np.random.default_rng(len(load))
    try:
        for r in range(rounds):
            piece = load[edges[r] : edges[r + 1]]
            for i, name in enumerate(order.permutation(names).tolist()):
                if progress is not None:
                    progress(name, (r * len(names) + i) / (rounds * len(names)))
                with no_gc():
                    replay(engines[name], piece, outcomes[name])
    finally:
        for engine in engines.values():
            engine.close()
    return outcomes


def ratio_to_best(outcomes: Mapping[str, Outcome], name: str = "dispatcher") -> tuple[float, float, str]:
    """(correct predictions per second of ``name`` over those of the best other contestant, the standard error
    of that ratio over the pieces, the best one's name). NaN errors with one piece; NaN ratios where nobody
    answered.
    """
    others = {other: outcome for other, outcome in outcomes.items() if other != name}
    best = max(others, key=lambda other: others[other].correct_in_time)
    mine, theirs = np.array(outcomes[name].piece_rates), np.array(others[best].piece_rates)
    if not theirs.sum():
        return math.nan, math.nan, best
    ratio = float(mine.sum() / theirs.sum())
    if len(mine) < 2:
        return ratio, math.nan, best
    # Of a ratio of means, by its first-order expansion (Cochran, Sampling Techniques, section 2.11).
    error = np.std(mine - ratio * theirs, ddof=1) / math.sqrt(len(mine)) / theirs.mean()
    return ratio, float(error), best


def sweep(
    dispatchers: Mapping[str, Contestant],
    dataset: ClickDataset,
    *,
    loads: Sequence[float] = LOADS,
    seconds: float = 2.0,
    rounds: int = 3,
    sizes: QuerySizes = QuerySizes(),
    seed: int = 0,
    progress: Callable[[str, float], object] | None = None,
    **engine_options: Any,
) -> tuple[float, list[dict[str, Any]]]:
    """The contestants at each of ``loads``, in shares of the greatest measured :func:`capacity` of a
    contestant.

    ``seconds`` of load for each contestant and load, cut in ``rounds`` turns. Returns (that capacity in
    queries per second, a JSON-able entry for each load: ``load``, ``qps``, ``rows``, ``ratio``,
    ``ratio_error``, ``best``).
    """
    batches = [a.batch for a in generate(dataset, 1.0, 300, sizes=sizes, seed=seed)]
    limits = [
        statistics.median(capacity(dispatcher, batches, **engine_options) for _ in range(3))
        for dispatcher in dispatchers.values()
    ]
    limit, entries = max(limits), []
    for i, share in enumerate(loads):
        qps = share * limit
        load = generate(dataset, qps, max(int(qps * seconds), 10 * rounds), sizes=sizes, seed=seed + i)

        def report(name: str, done: float, share=share, i=i) -> None:
            if progress is not None:
                progress(f"load {share:g}", (i + done) / len(loads))

        outcomes = compare(dispatchers, load, rounds=rounds, progress=report, **engine_options)
        ratio, error, best = ratio_to_best(outcomes, list(dispatchers)[-1])
        rows = [outcome.row(name) for name, outcome in outcomes.items()]
        entries.append(
            {"load": share, "qps": qps, "rows": rows, "ratio": ratio, "ratio_error": error, "best": best}
        )
    return limit, entries


def capacity(dispatcher: Contestant, queries: Sequence[Batch], **engine_options: Any) -> float:
    """Queries per second that an engine gets through when all of them wait from the start.

    ``engine_options`` as for ``compare``; the SLA does not matter here.
    """
    options = {**engine_options, "sla_s": 3600.0, "admission": False}
    options["max_queue"] = max(sum(map(len, queries)), 1)
    with engine_for(dispatcher, **options) as engine, no_gc():
        start = engine.clock()
        outcome = replay(engine, [Arrival(0.0, batch) for batch in queries])
    return len(queries) / (outcome.last_finish_s - start)


def suggested_qps(
    dispatchers: Mapping[str, Contestant],
    dataset: ClickDataset,
    *,
    sizes: QuerySizes = QuerySizes(),
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
        raise ValueError(f"start must be positive and finite, got {start}")
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
