"""Which queries are served next, by which path, on which executor; and which are refused at the door.

The aim is the most correct predictions in time: the sum of quality x samples over queries answered by their
deadlines. The queue is kept in order of deadlines. When an executor is free, each batch it could take (a path
and a number of queries from the front) is worth

    gain = q * (samples expected in time) - v * samples - lambda * T - damage

- ``q`` is the path's quality and T its expected time. A sample is *expected in time* with the chance that a
  log-normal time around T ends before its deadline.
- ``v`` and ``lambda`` are the values of a waiting sample and of a second, from the linear program of
  :mod:`mprec.dispatch.price` at the rate at which samples must be served: the rate at which they arrive, or
  what the deadlines of the queue demand, whichever is greater.
- ``damage`` is what the queries left behind, and the next one to arrive, lose because they have to wait for
  T:
  the time by which the fastest paths would then miss their deadlines, times the greatest goodput.

The best batch is served, unless it loses and another executor will do better in time. With an idle queue time
has no price, so that the path of best quality is taken; above the capacity of all paths a sample has no
value, so that batches go for throughput alone. ``docs/scheduling.md`` derives this.

A query is refused at once if it could not be in time even if everything before it took the fastest path; the
predictions' spread is allowed for, so that at most a share ``late_share`` of what is taken should be late.
After a silence, one query is always let through: predictions may be wrong, and only an answer can tell.

Nothing here knows threads, devices or tensors. Times are seconds on the caller's clock, which may be virtual.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np

from mprec.dispatch.congestion import Latest, Overflow
from mprec.dispatch.correction import Correction
from mprec.dispatch.price import FluidPrice
from mprec.dispatch.traffic import Traffic

__all__ = ["Job", "Lane", "Option", "Piece", "Refusal", "Scheduler", "Ticket"]

_PROBE_S = 0.1  # silence after which a query is let through; at least the SLA
_STALE = 0.05  # relative change of a factor or of the SLA after which prices are computed again
_STALE_ARRIVALS = 64  # queries after which they are, too
_LEAST_PART = 32  # samples of a query that is shared among executors
_STRETCH_GAIN = 0.1  # see Scheduler._stretch
_SURE = 0.999  # chance to be in time that smaller batches need not improve
_SIZES_LOOKED_AT = 16


class Option(NamedTuple):
    """A path on an executor. ``seconds[b]``: profiled mean time of a batch of b samples, b = 0 ... max_batch;
    ``inf`` where the path does not take the size."""

    path: str
    quality: float
    seconds: Sequence[float]


class Lane:
    """An executor as the scheduler sees it: what it can run, how fast it is now, until when it is busy."""

    def __init__(self, name: str, options: Sequence[Option], correction: Correction | None = None) -> None:
        if not options:
            raise ValueError(f"options of {name}: expected at least one")
        self.name, self.options = name, list(options)
        self.correction = correction or Correction(option.path for option in options)
        self.job: Job | None = None
        self.least = np.min([option.seconds for option in options], axis=0).tolist()
        self.until = -math.inf  # when the job under way should be done
        self.broken: dict[str, float] = {}  # paths that raised: not taken before this time
        self.unit: list[float] = []  # seconds per sample of each option in a batch that fits the SLA
        self.fast = 0  # the option of greatest goodput

    def resting(self, option: int, now: float) -> bool:
        """Whether a path has raised a short while ago."""
        return bool(self.broken) and self.broken.get(self.options[option].path, now) > now


class Ticket:
    """A query in the queue. ``item`` is the caller's; ``taken`` samples have been handed out."""

    __slots__ = ("deadline", "item", "size", "taken")

    def __init__(self, size: int, deadline: float, item: Any = None) -> None:
        self.size, self.deadline, self.item = size, deadline, item
        self.taken = 0


class Piece(NamedTuple):
    """Samples ``start`` to ``stop`` of a query."""

    ticket: Ticket
    start: int
    stop: int


@dataclass(eq=False)
class Job:
    """A batch for one executor. ``predicted_s`` is its expected time, ``profiled_s`` what the profile
    says."""

    index: int  # of the executor
    lane: Lane
    path: str
    pieces: list[Piece]
    samples: int
    predicted_s: float
    profiled_s: float
    started: float


class Refusal(NamedTuple):
    """Why a query is not taken: ``full``, ``overload`` or ``unsupported``, with a sentence."""

    reason: str
    message: str


class _State(NamedTuple):
    """What all batches of one choice have in common."""

    now: float
    value: float  # of a waiting sample
    rate: float  # samples per second
    lost: Callable[[float, float], float]  # see Overflow
    backlog: float  # seconds


class Scheduler:
    """The queue of one engine and the choice of what to run. Not thread-safe: the caller holds a lock.

    ``offer`` a query; ask for ``next`` until it gives None; tell when a job is ``done`` (or ``failed``), then
    ask again. ``max_batch`` bounds the samples of a job, ``max_queue`` the samples waiting.
    """

    def __init__(
        self,
        lanes: Sequence[Lane],
        *,
        max_batch: int = 2048,
        max_queue: int = 1 << 20,
        admission: bool = True,
        late_share: float = 0.01,
    ) -> None:
        if not lanes:
            raise ValueError("lanes: expected at least one")
        if not 0 < late_share < 1:
            raise ValueError(f"late_share must be between 0 and 1, got {late_share}")
        self.lanes = list(lanes)
        self.max_batch, self.max_queue, self.admission = max_batch, max_queue, admission
        self.query_s = 0.0  # expected time of the caller's own work for each query of a batch
        self.late_share = late_share
        self._queue: list[Ticket] = []
        self._deadlines: list[float] = []
        self._ends: list[int] = []  # samples waiting up to and with each query, plus a constant
        self._gone = 0  # that constant: samples that left the queue
        self._traffic = Traffic()
        self._last_news = -math.inf  # when a job last started or ended
        self._priced: list[float] = []  # what prices were computed for
        self._priced_until = 0
        self.price: FluidPrice | None = None
        self._latest: Latest | None = None
        self._stretch = 1.0  # time per sample of the batches that a full queue makes, over that of good ones
        lowest = min(option.quality for lane in lanes for option in lane.options)
        self._shift = 1 - lowest if lowest <= 0 else 0.0  # qualities count from here: they must be positive

    # -- the queue

    def __len__(self) -> int:
        return len(self._queue)

    @property
    def waiting(self) -> int:
        """Samples in the queue that no job has."""
        return self._ends[-1] - self._gone if self._queue else 0

    def offer(self, now: float, size: int, deadline: float, item: Any = None) -> Ticket | Refusal:
        """Queue a query of ``size`` samples, or say why not."""
        self._traffic.count(now, size, deadline - now)
        if self._shortest(size) == math.inf:
            return Refusal("unsupported", f"no path takes a batch of {size}")
        if self.waiting + size > self.max_queue:
            return Refusal(
                "full", f"{self.waiting} samples wait already, {size} more would exceed {self.max_queue}"
            )
        place = bisect_right(self._deadlines, deadline)
        if self.admission and not self._is_probe(now):
            ahead = self._ends[place - 1] - self._gone if place else 0
            needed = self._time_for(now, ahead + size, self._certainty(now))
            if now + needed > deadline:
                return Refusal(
                    "overload",
                    f"takes {1e3 * needed:.3f} ms at best, {1e3 * (deadline - now):.3f} ms are left",
                )
        ticket = Ticket(size, deadline, item)
        self._queue.insert(place, ticket)
        self._deadlines.insert(place, deadline)
        if place == len(self._ends):
            self._ends.append((self._ends[-1] if place else self._gone) + size)
        else:
            before = self._ends[place - 1] if place else self._gone
            rest = (t.size - t.taken for t in self._queue[place:])
            self._ends[place:] = list(accumulate(rest, initial=before))[1:]
        return ticket

    def withdraw(self, ticket: Ticket) -> bool:
        """Take a query out of the queue; False if no sample of it waits there any more."""
        try:
            place = self._queue.index(ticket)
        except ValueError:
            return False
        self._remove(place, place + 1)
        return True

    def clear(self) -> list[Ticket]:
        """Empty the queue."""
        tickets = self._queue[:]
        if tickets:
            self._remove(0, len(tickets))
        return tickets

    def expire(self, now: float) -> list[Ticket]:
        """Take out the queries at the front that no executor can answer in time any more, not yet begun."""
        expired = []
        while self.admission and self._queue:
            head = self._queue[0]
            met = now + self._shortest(-(-head.size // len(self.lanes))) <= head.deadline
            if head.taken or met or (now < head.deadline and self._is_probe(now)):
                break
            expired.append(head)
            self._remove(0, 1)
        return expired

    # -- jobs

    def next(self, now: float) -> Job | None:
        """A job for an executor that is free, marked as started; None if there is nothing to start now."""
        if not self._queue:
            return None
        free = [i for i, lane in enumerate(self.lanes) if lane.job is None]
        if not free:
            return None
        self._refresh()
        traffic, price = self._traffic, self.price
        rate = traffic.rate(now)
        value = price.sample(self._demand(now, rate))
        bound = max(traffic.sla - traffic.burst_size / price.capacity, 0.1 * traffic.sla)
        overflow = Overflow(rate / price.capacity, traffic.dispersion / price.capacity, bound)
        state = _State(now, value, rate, overflow.lost, self.waiting / price.capacity)
        batches = self._batches(len(free))
        best = max(filter(None, (self._best(state, i, batches) for i in free)), default=None)
        if best is None or (len(free) < len(self.lanes) and self._better_elsewhere(state, best)):
            return None
        return self._start(now, best)

    def done(self, job: Job, now: float, seconds: float) -> None:
        """A job has ended: its executor is free. Its path took ``seconds``, which is learnt from."""
        lane = self._free(job, now)
        if lane is job.lane:
            lane.broken.pop(job.path, None)
            if job.profiled_s > 0:
                lane.correction.observe(job.path, seconds / job.profiled_s, now)

    def failed(self, job: Job, now: float, rest_s: float = 0.0) -> None:
        """A job gave nothing: its executor is free, its path is left alone for ``rest_s`` seconds."""
        lane = self._free(job, now)
        if lane is job.lane and rest_s > 0:
            lane.broken[job.path] = now + rest_s

    def replace(self, lanes: Sequence[Lane]) -> None:
        """Other paths for the same executors, from the next job on."""
        if len(lanes) != len(self.lanes):
            raise ValueError(f"lanes: expected {len(self.lanes)}, as before, got {len(lanes)}")
        for old, new in zip(self.lanes, lanes, strict=True):
            new.job, new.until = old.job, old.until
        self.lanes, self._priced = list(lanes), ()

    def _free(self, job: Job, now: float) -> Lane:
        lane = self.lanes[job.index]
        lane.job, lane.until = None, now
        self._last_news = now
        return lane

    # -- what is expected

    def _is_probe(self, now: float) -> bool:
        """Nothing waits, nothing has started or ended for a while, and an executor is free."""
        if now - self._last_news < max(_PROBE_S, self._traffic.sla) or len(self._queue) > 1:
            return False
        return any(lane.job is None for lane in self.lanes)

    def _refresh(self) -> None:
        """Prices, if corrections, queries or the SLA have moved since they were computed."""
        traffic = self._traffic
        key = [f for lane in self.lanes for f in lane.correction.factors.values()]
        key.append(traffic.sla)
        if self._priced and traffic.arrivals < self._priced_until:
            for new, old in zip(key, self._priced, strict=True):
                if abs(new - old) > _STALE * old:
                    break
            else:
                return
        self._priced, self._priced_until = key, traffic.arrivals + _STALE_ARRIVALS
        columns = []
        for lane in self.lanes:
            lane.unit = []
            for option in lane.options:
                factor = lane.correction.factors[option.path]
                own = self.query_s / traffic.query_size
                size = self._fitting(option.seconds, 0.5 * traffic.sla / factor)
                each = option.seconds[size] / size
                if each == math.inf:  # a path that takes some sizes only
                    each = min(s / b for b, s in enumerate(option.seconds) if b)
                lane.unit.append(each * factor + own)
            columns.append(
                [(o.quality + self._shift, unit) for o, unit in zip(lane.options, lane.unit, strict=True)]
            )
            goodput = [quality / unit for quality, unit in columns[-1]]
            lane.fast = max(range(len(goodput)), key=goodput.__getitem__)
        self.price = FluidPrice(columns)
        lane = min(self.lanes, key=lambda lane: lane.unit[lane.fast])
        sizes = sorted(traffic.sizes)
        sizes = sizes[:: 1 + len(sizes) // _SIZES_LOOKED_AT]
        seconds = [self._seconds(lane, lane.fast, size) for size in sizes]
        self._latest = Latest(seconds, sizes, traffic.sla, math.sqrt(lane.correction.noise))

    def _fitting(self, seconds: Sequence[float], limit: float) -> int:
        """The largest batch that takes at most ``limit`` seconds, at least 1. A query that has just missed a
        batch waits for it and is in the next, so that half the SLA is what a batch may take."""
        low, high = 1, min(self.max_batch, len(seconds) - 1)
        while low < high:
            middle = (low + high + 1) // 2
            if seconds[middle] <= limit:
                low = middle
            else:
                high = middle - 1
        return low

    def _seconds(self, lane: Lane, option: int, samples: int, queries: float = 1.0) -> float:
        """Expected time of a batch."""
        o = lane.options[option]
        last = len(o.seconds) - 1
        profiled = o.seconds[samples] if samples <= last else o.seconds[last] * samples / last
        return profiled * lane.correction.factors[o.path] + self.query_s * queries

    def _fast(self, lane: Lane, samples: float) -> float:
        """Expected time of so many samples in good batches by the executor's path of greatest goodput."""
        unit = lane.unit[lane.fast]
        size = min(samples, self.max_batch)
        one = self._seconds(lane, lane.fast, max(1, int(size)), samples / self._traffic.query_size)
        good = samples * unit * self._stretch
        return good if one == math.inf else max(one, good)

    def _certainty(self, now: float) -> float:
        """Standard deviations by which a query must be expected in time. Taking it costs time that is worth
        (q - v) / q of what it brings: nothing while there is time for all, everything where there is not."""
        self._refresh()
        worth = self.price.sample(self._demand(now, self._traffic.rate(now))) / self.price.best
        return NormalDist().inv_cdf(min(max(1 - worth, 0.5), 1 - self.late_share))

    def _time_for(self, now: float, samples: int, margin: float) -> float:
        """Seconds until all executors together have answered so many samples by their fastest paths, and
        ``margin`` standard deviations."""
        ready = sorted((max(lane.until, now) if lane.job else now, i) for i, lane in enumerate(self.lanes))
        rate, done, at = 0.0, 0.0, 0.0
        end = math.inf
        for k, (free, i) in enumerate(ready):
            rate += samples / self._fast(self.lanes[i], samples)
            done += (free - now) * samples / self._fast(self.lanes[i], samples)
            at = (samples + done) / rate
            if k + 1 == len(ready) or now + at <= ready[k + 1][0]:
                end = at
                break
        batches = max(1.0, 2 * end / self._traffic.sla)
        return end * math.exp(margin * max(lane.correction.spread(now, batches) for lane in self.lanes))

    def _shortest(self, samples: int) -> float:
        """About the least expected time of a batch on any executor."""
        return min(
            lane.least[min(samples, len(lane.least) - 1)] * min(lane.correction.factors.values())
            for lane in self.lanes
        )

    def _demand(self, now: float, rate: float) -> float:
        """Samples per second that must be served: what arrives, or what the queue's deadlines ask for."""
        place, last = 0, len(self._queue) - 1
        while last >= 0:
            needed = (self._ends[place] - self._gone) / max(self._deadlines[place] - now, 1e-4)
            if needed > rate:
                rate = needed
            if place == last:
                break
            place = min(2 * place + 1, last)
        return rate

    def _batches(self, free: int) -> list[tuple[int, int]]:
        """(queries, samples) of the batches to consider: 1, 2, 4, ... queries from the front and as many as
        fit; or a part of the first query, if it is too large for one batch or several executors could share
        it."""
        head = self._queue[0].size - self._queue[0].taken
        if head > self.max_batch:
            return [(1, self.max_batch)]
        batches = []
        if free > 1 and head >= free * _LEAST_PART:
            batches.append((1, -(-head // free)))
        most = bisect_right(self._ends, self._gone + self.max_batch)
        count = 1
        while count < most:
            batches.append((count, self._ends[count - 1] - self._gone))
            count *= 2
        batches.append((most, self._ends[most - 1] - self._gone))
        return batches

    def _best(self, state: _State, index: int, batches: list[tuple[int, int]]) -> tuple | None:
        """The batch of greatest gain for one executor: (gain, samples, lane, option, queries, seconds)."""
        lane, best = self.lanes[index], None
        now, value, rate, lost, backlog = state
        second = self.price.second(index, value)
        scale = 1 / (math.sqrt(2.0) * lane.correction.spread(now))
        deadlines, ends, last = self._deadlines, self._ends, len(self._queue) - 1
        missed, goodput = self._latest.missed, self.price.goodput
        unit, all_units = lane.unit[lane.fast], 1 / self.price.capacity
        share = min(all_units / unit, 1.0)  # of the executors' capacity that this one has
        usable = [o for o in range(len(lane.options)) if not lane.resting(o, now)]
        falling = dict.fromkeys(usable or range(len(lane.options)), -math.inf)
        for count, samples in reversed(batches):
            front = self._gone + samples
            behind = count if ends[count - 1] == front else 0
            slacks = (deadlines[0] - now, deadlines[count // 2] - now, deadlines[count - 1] - now)
            left = (ends[-1] - front) * all_units
            waiting = -math.inf
            if behind <= last:
                waiting = max(
                    (ends[k] - front) * all_units - (deadlines[k] - now)
                    for k in (behind, (behind + last) // 2, last)
                )
            for o, before in list(falling.items()):
                option = lane.options[o]
                seconds = self._seconds(lane, o, samples, count)
                if seconds == math.inf:
                    continue
                log = math.log(seconds)
                chance = _chance(slacks[0], log, scale)
                if count > 1:
                    chance = (chance + _chance(slacks[1], log, scale) + _chance(slacks[2], log, scale)) / 3
                quality = option.quality + self._shift
                gain = samples * (quality * chance - value) - second * seconds
                gain -= missed(share * seconds + left) * rate * quality
                more = share * (seconds - samples * unit)
                gain -= goodput * (lost(backlog, more) + max(share * seconds + waiting, 0.0))
                if best is None or gain > best[0] or (gain == best[0] and samples > best[1]):
                    best = (gain, samples, index, o, count, seconds)
                if gain < before or chance > _SURE:
                    del falling[o]  # smaller batches of this path would be worse still
                else:
                    falling[o] = gain
            if not falling:
                break
        return best

    def _better_elsewhere(self, state: _State, best: tuple) -> bool:
        """Would an executor that is busy now gain more by the first query, once it is free, than the best
        batch that is possible now? Only if that batch loses. Its executor would idle meanwhile, which costs
        the price of its time.
        """
        head = self._queue[0]
        samples = head.size - head.taken
        gain, size, own = best[:3]
        if gain >= 0 or samples > self.max_batch:
            return False
        idle = self.price.second(own, state.value)
        for index, lane in enumerate(self.lanes):
            if lane.job is None:
                continue
            second = self.price.second(index, state.value)
            scale = 1 / (math.sqrt(2.0) * lane.correction.spread(state.now))
            free = max(lane.until, state.now)
            for o, option in enumerate(lane.options):
                seconds = self._seconds(lane, o, samples)
                if seconds == math.inf or lane.resting(o, state.now):
                    continue
                chance = _chance(head.deadline - free, math.log(seconds), scale)
                there = samples * ((option.quality + self._shift) * chance - state.value) - second * seconds
                if there - idle * (free - state.now) > gain * samples / size:
                    return True
        return False

    def _start(self, now: float, chosen: tuple) -> Job:
        _, samples, index, o, count, seconds = chosen
        lane, option = self.lanes[index], self.lanes[index].options[o]
        pieces, left = [], samples
        for ticket in self._queue[:count]:
            part = min(left, ticket.size - ticket.taken)
            pieces.append(Piece(ticket, ticket.taken, ticket.taken + part))
            ticket.taken += part
            left -= part
        self._gone += samples
        whole = count if pieces[-1].stop == pieces[-1].ticket.size else count - 1
        del self._queue[:whole], self._deadlines[:whole], self._ends[:whole]
        last = len(option.seconds) - 1
        profiled = option.seconds[samples] if samples <= last else option.seconds[last] * samples / last
        lane.job = Job(index, lane, option.path, pieces, samples, seconds, profiled, now)
        lane.until = now + seconds
        self._last_news = now
        stretch = max(1.0, seconds / (samples * lane.unit[o])) if self._queue else 1.0
        self._stretch += _STRETCH_GAIN * (stretch - self._stretch)
        return lane.job

    def _remove(self, start: int, stop: int) -> None:
        """Queries that leave without being served."""
        before = self._ends[start - 1] if start else self._gone
        samples = self._ends[stop - 1] - before
        if start == 0:
            self._gone += samples
        else:
            self._ends[stop:] = [end - samples for end in self._ends[stop:]]
        del self._queue[start:stop], self._deadlines[start:stop], self._ends[start:stop]


def _chance(left: float, log_seconds: float, scale: float) -> float:
    """That a log-normal time is at most ``left``; ``scale`` is 1 / (sqrt(2) x its logarithm's deviation)."""
    if left <= 0.0:
        return 0.0
    return 0.5 * math.erfc((log_seconds - math.log(left)) * scale)
