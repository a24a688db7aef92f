"""A discrete-event simulation of an engine: the scheduler's own code under a virtual clock.

Executors are profiles: a batch takes what its curve says, times a log-normal noise, times what the machine's
state makes of it. Everything else (queue, admission, choice, corrections) is
:class:`mprec.dispatch.scheduler.Scheduler`, the same object that serves real queries.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from mprec.dispatch.scheduler import Lane, Option, Scheduler

__all__ = ["Result", "SimulatedExecutor", "SimulatedPath", "simulate"]


@dataclass(frozen=True)
class SimulatedPath:
    """``curve[b]``: seconds of a batch of b samples, b = 0 ... max_batch; ``quality``: share of correct
    predictions. ``actual``, if given, is the curve that calls really follow, unknown to the scheduler."""

    name: str
    quality: float
    curve: Sequence[float]
    actual: Sequence[float] | None = None


@dataclass(frozen=True)
class SimulatedExecutor:
    name: str
    paths: Sequence[SimulatedPath]


@dataclass
class Result:
    """``correct_per_s``: expected correct predictions in time per second of load. Shares are of queries;
    ``answered_at`` and ``in_time_at``: times of arrival of answered queries and whether they were in time."""

    seconds: float
    queries: int
    correct_per_s: float = 0.0
    late: float = 0.0
    refused: float = 0.0
    p50_ms: float | None = None
    p99_ms: float | None = None
    samples: Counter = field(default_factory=Counter)  # by (path, executor)
    utilisation: dict[str, float] = field(default_factory=dict)
    arrivals: np.ndarray | None = None
    latencies: np.ndarray | None = None  # seconds; inf where refused

    @property
    def missed(self) -> float:
        return self.late + self.refused


class _Query:
    __slots__ = ("correct", "number", "size", "unfinished")

    def __init__(self, number: int, size: int) -> None:
        self.number, self.size, self.unfinished, self.correct = number, size, size, 0.0


def simulate(
    executors: Sequence[SimulatedExecutor],
    times: np.ndarray,
    sizes: np.ndarray,
    *,
    sla_s: float | np.ndarray,
    max_batch: int = 2048,
    max_queue: int = 1 << 30,
    noise: float = 0.05,
    slow: Callable[[float], float] | None = None,
    query_s: float = 0.0,
    seed: int = 0,
    **scheduler_options,
) -> Result:
    """Serve queries that arrive at ``times`` (rising seconds) with ``sizes`` samples each.

    ``noise``: deviation of the logarithm of a call's time, whose mean is kept at the curve's. ``slow(now)``:
    factor on all times of calls that start now. ``query_s``: time that each query of a batch costs beyond its
    path. The queue is bounded by admission alone unless ``max_queue`` (samples) says otherwise.
    ``scheduler_options`` go to the scheduler.
    """
    if len(times) != len(sizes) or not len(times):
        raise ValueError(
            f"times and sizes: expected equally many, at least one, got {len(times)} and {len(sizes)}"
        )
    rng = np.random.default_rng(seed)
    lanes = [Lane(e.name, [Option(p.name, p.quality, p.curve) for p in e.paths]) for e in executors]
    actual = [{p.name: p.curve if p.actual is None else p.actual for p in e.paths} for e in executors]
    quality = {p.name: p.quality for e in executors for p in e.paths}
    scheduler = Scheduler(lanes, max_batch=max_batch, max_queue=max_queue, **scheduler_options)
    scheduler.query_s = query_s
    slas = np.broadcast_to(sla_s, len(times)).tolist()
    due, counts = times.tolist(), sizes.tolist()
    latencies = np.full(len(due), np.inf)
    result = Result(float(due[-1] - due[0] + (due[-1] - due[0]) / max(len(due) - 1, 1)), len(due))
    busy = Counter()
    running: list[tuple[float, int, object]] = []
    serial = arrived = 0
    correct = 0.0

    def start(now: float) -> None:
        nonlocal serial
        scheduler.expire(now)
        while (job := scheduler.next(now)) is not None:
            seconds = actual[job.index][job.path][min(job.samples, max_batch)]
            seconds *= math.exp(rng.normal(-(noise**2) / 2, noise)) * (slow(now) if slow else 1.0)
            seconds += query_s * len(job.pieces)
            busy[job.lane.name] += seconds
            serial += 1
            heapq.heappush(running, (now + seconds, serial, job))

    while arrived < len(due) or running:
        if arrived < len(due) and (not running or due[arrived] <= running[0][0]):
            now, size = due[arrived], counts[arrived]
            query = _Query(arrived, size)
            scheduler.offer(now, size, now + slas[arrived], query)
            arrived += 1
        else:
            now, _, job = heapq.heappop(running)
            scheduler.done(job, now, now - job.started - query_s * len(job.pieces))
            result.samples[job.path, job.lane.name] += job.samples
            for ticket, begin, end in job.pieces:
                query = ticket.item
                query.unfinished -= end - begin
                query.correct += (end - begin) * quality[job.path]
                if not query.unfinished:
                    latencies[query.number] = now - due[query.number]
                    if now <= ticket.deadline:
                        correct += query.correct
        start(now)
    answered = np.isfinite(latencies)
    result.arrivals, result.latencies = np.asarray(due), latencies
    result.correct_per_s = correct / result.seconds if result.seconds else 0.0
    result.refused = float(1 - answered.mean())
    result.late = float((answered & (latencies > np.asarray(slas))).mean())
    if answered.any():
        result.p50_ms, result.p99_ms = (1e3 * float(np.percentile(latencies[answered], q)) for q in (50, 99))
    if result.seconds:
        result.utilisation = {lane.name: busy[lane.name] / result.seconds for lane in lanes}
    return result
