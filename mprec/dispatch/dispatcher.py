"""The choice: per batch, the path of best quality whose predicted tail latency meets the latency target.

Prediction = profiled tail at this batch size (and share of unique IDs) x the path's correction, which is the
observed over the profiled median of its recent calls. The rules that make it steady:

- *Robust*: a correction follows the median of the last five calls, so one hiccup moves nothing.
- *Hysteresis*: a correction in use changes only when the followed one has moved by more than 10 %; between
  such steps a choice is a pure function of its arguments.
- *Forgiving*: a path that is not chosen is not observed, so its correction drifts back to 1 and the path is
  tried again; each try that finds it as slow as before doubles the patience until the next.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from mprec.dispatch.paths import Path
from mprec.dispatch.profile import Profile

__all__ = ["Candidate", "Dispatcher", "Explanation"]

_WINDOW = 5  # calls whose median is followed
_GAIN = 0.4  # share of the way to that median that one call moves the followed correction
_DEAD_BAND = math.log(1.1)
_LIMIT = math.log(1000.0)  # no observation counts for more than this
_PATIENCE = 16  # calls of other paths in which an unobserved path's excess shrinks by 1/e
_MAX_PATIENCE = 128
_STALE = 8  # calls of other paths after which old observations of a path are forgotten


@dataclass(frozen=True)
class Candidate:
    """One path's part in a choice; seconds, ``inf`` if the path does not take this batch size."""

    path: str
    quality: float
    predicted_s: float
    meets: bool


@dataclass(frozen=True)
class Explanation:
    """Why a path was chosen."""

    path: Path
    predicted_s: float
    reason: str
    batch_size: int
    sla_s: float
    queued_s: float
    candidates: tuple[Candidate, ...]

    def __str__(self) -> str:
        lines = [
            f"batch of {self.batch_size}, SLA {self.sla_s * 1e3:g} ms, queued {self.queued_s * 1e3:.3f} ms: "
            f"{self.path.name} ({self.reason})"
        ]
        for c in self.candidates:
            verdict = "meets" if c.meets else "misses"
            lines.append(
                f"  {c.path:12} quality {c.quality:.4f}  predicted {c.predicted_s * 1e3:9.3f} ms  {verdict}"
            )
        return "\n".join(lines)


class _State:
    """What the dispatcher knows of one path."""

    def __init__(self, path: Path, profile: Profile, quantile: str, condition: str, up_to: int) -> None:
        self.path = path
        self.tail = _table(path, profile, quantile, condition, up_to)
        self.typical = _table(path, profile, "p50", condition, up_to)
        # Seconds per unit of unique share at each batch size, where profiled at two shares.
        self.unique_share, self.slope = _unique_share_slopes(profile, path.name, quantile, up_to)
        self.correction = 1.0  # in use
        self.log_correction = 0.0  # followed
        self.recent: deque[float] = deque(maxlen=_WINDOW)
        self.idle = 0
        self.patience = _PATIENCE

    def tail_at(self, batch_size: int, unique_share: float | None) -> float:
        """Uncorrected prediction."""
        last = len(self.tail) - 1
        index = min(batch_size, last)
        value = self.tail[index]
        if unique_share is not None and self.slope is not None:
            shift = (unique_share - self.unique_share[index]) * self.slope[index]
            value = max(value + shift, 0.1 * value)
        return value * max(1.0, batch_size / last)

    def typical_at(self, batch_size: int) -> float:
        """Uncorrected median."""
        last = len(self.typical) - 1
        return self.typical[min(batch_size, last)] * max(1.0, batch_size / last)

    def observed(self, log_ratio: float) -> None:
        retried = self.idle > _STALE
        if retried:
            self.recent.clear()
            if log_ratio > self.log_correction + _DEAD_BAND:
                self.patience = min(2 * self.patience, _MAX_PATIENCE)
        self.idle = 0
        self.recent.append(log_ratio)
        median = sorted(self.recent)[len(self.recent) // 2]
        self.log_correction += _GAIN * (median - self.log_correction)
        if abs(self.log_correction) < _DEAD_BAND / 2:
            self.patience = _PATIENCE
        self.settle()

    def passed_over(self) -> None:
        self.idle += 1
        if self.log_correction > 0.0:
            self.log_correction -= self.log_correction / self.patience
            if self.log_correction < _DEAD_BAND / 2:  # the dead band must not keep the last bit
                self.log_correction, self.correction = 0.0, 1.0
            self.settle()

    def settle(self) -> None:
        if abs(self.log_correction - math.log(self.correction)) > _DEAD_BAND:
            self.correction = math.exp(self.log_correction)


class Dispatcher:
    """Chooses among ``paths`` by a ``profile`` that has measured them.

    ``quantile`` is the tail that must meet the target: ``p95`` unless the profile has enough calls per
    batch size (some hundreds) for ``p99`` to be more than their maximum. Not thread-safe: one dispatcher
    per worker. ``KeyError`` if the profile lacks a path.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        profile: Profile,
        *,
        quantile: str = "p95",
        condition: str = "warm",
    ) -> None:
        if not paths:
            raise ValueError("paths must not be empty")
        names = [path.name for path in paths]
        if len(set(names)) != len(names):
            raise ValueError(f"paths must have distinct names, got {names}")
        up_to = max(profile.curve(name, quantile, condition).batch_sizes[-1] for name in names)
        self.simulated = profile.simulated
        self._limit = up_to
        self._states = [_State(path, profile, quantile, condition, up_to) for path in paths]
        self._by_name = {state.path.name: state for state in self._states}
        by_quality = sorted(self._states, key=lambda state: -state.path.quality)
        self._levels = [
            tuple(group) for _, group in groupby(by_quality, key=lambda state: state.path.quality)
        ]

    @property
    def paths(self) -> list[Path]:
        return [state.path for state in self._states]

    @property
    def corrections(self) -> dict[str, float]:
        """Observed over profiled latency, per path, as in use now."""
        return {state.path.name: state.correction for state in self._states}

    def choose(
        self,
        batch_size: int,
        sla_s: float,
        queued_s: float = 0.0,
        unique_share: float | None = None,
        explain: bool = False,
    ) -> Path | Explanation:
        """The path for a batch of ``batch_size`` samples that has waited ``queued_s`` of its ``sla_s``.

        Times are in seconds. Of the paths predicted to answer in time, the one of highest quality, of
        several the fastest; if none is, the fastest of all. ``unique_share`` (distinct IDs over all, see
        ``unique_share()``) refines the prediction; None takes that of the profile's inputs.
        ``explain=True`` returns an :class:`Explanation`. ``ValueError`` for a batch size below 1, a NaN,
        or a negative waiting time.
        """
        if explain:
            return self._explain(batch_size, sla_s, queued_s, unique_share)
        if not 1 <= batch_size <= self._limit or unique_share is not None:
            return self._choose_slowly(batch_size, sla_s, queued_s, unique_share)[0].path
        left = sla_s - queued_s
        if left != left or queued_s < 0:
            _check(batch_size, sla_s, queued_s)
        fallback, fallback_time = None, math.inf
        for level in self._levels:
            best, best_time = None, math.inf
            for state in level:
                predicted = state.tail[batch_size] * state.correction
                if predicted < best_time:
                    best, best_time = state, predicted
            if best_time <= left and best is not None:
                return best.path
            if best_time < fallback_time:
                fallback, fallback_time = best, best_time
        if fallback is None:
            raise ValueError(f"batch_size: no path takes a batch of {batch_size}")
        return fallback.path

    def predict(self, batch_size: int, path: str | None = None, unique_share: float | None = None) -> float:
        """Predicted tail latency in seconds: of one path, or the least of all."""
        _check(batch_size, 0.0, 0.0)
        if path is not None:
            state = self._by_name[path]
            return state.tail_at(batch_size, unique_share) * state.correction
        return min(s.tail_at(batch_size, unique_share) * s.correction for s in self._states)

    def expect(self, batch_size: int, path: str | None = None) -> float:
        """Predicted median latency in seconds: of one path, or the least of all. Over many batches these add
        up, tails do not.
        """
        _check(batch_size, 0.0, 0.0)
        if path is not None:
            state = self._by_name[path]
            return state.typical_at(batch_size) * state.correction
        return min(s.typical_at(batch_size) * s.correction for s in self._states)

    def observe(self, path: str, batch_size: int, seconds: float) -> None:
        """Tell how long a path took for a batch, so that its predictions follow what happens.

        ``KeyError`` for an unknown path. Times that are not positive and finite are ignored.
        """
        observed = self._by_name[path]
        expected = observed.typical_at(batch_size)
        if not (0.0 < seconds < math.inf and 0.0 < expected < math.inf):
            return
        for state in self._states:
            if state is observed:
                state.observed(max(-_LIMIT, min(_LIMIT, math.log(seconds) - math.log(expected))))
            else:
                state.passed_over()

    def _choose_slowly(self, batch_size, sla_s, queued_s, unique_share):
        """(state, predicted seconds of all paths, whether it meets); any batch size and unique share."""
        _check(batch_size, sla_s, queued_s)
        times = {s: s.tail_at(batch_size, unique_share) * s.correction for s in self._states}
        if min(times.values()) == math.inf:
            raise ValueError(f"batch_size: no path takes a batch of {batch_size}")
        left = sla_s - queued_s
        for level in self._levels:
            best = min(level, key=times.__getitem__)
            if times[best] <= left and times[best] < math.inf:
                return best, times, True
        # Of equally fast ones the best, as `choose` has it: levels come best first.
        return min((s for level in self._levels for s in level), key=times.__getitem__), times, False

    def _explain(self, batch_size, sla_s, queued_s, unique_share) -> Explanation:
        state, times, meets = self._choose_slowly(batch_size, sla_s, queued_s, unique_share)
        left = sla_s - queued_s
        rivals = [s for s in self._states if times[s] <= left and s.path.quality == state.path.quality]
        if not meets:
            reason = "no path is predicted to meet the target: the fastest"
        elif len(rivals) > 1:
            reason = "fastest of the best paths predicted to meet the target"
        else:
            reason = "highest quality of the paths predicted to meet the target"
        candidates = tuple(
            Candidate(s.path.name, s.path.quality, times[s], times[s] <= left)
            for level in self._levels
            for s in level
        )
        return Explanation(state.path, times[state], reason, batch_size, sla_s, queued_s, candidates)


def _check(batch_size: int, sla_s: float, queued_s: float) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if sla_s != sla_s:
        raise ValueError("sla_s is NaN")
    if not queued_s >= 0:
        raise ValueError(f"queued_s must not be negative or NaN, got {queued_s}")


def _table(path: Path, profile: Profile, quantile: str, condition: str, up_to: int) -> list[float]:
    table = profile.curve(path.name, quantile, condition).table(up_to)
    if path.supports is not None:
        table = [t if b and path.supports(b) else math.inf for b, t in enumerate(table)]
    return table


def _unique_share_slopes(profile: Profile, name: str, quantile: str, up_to: int):
    """(unique share the profile saw, seconds per unit of share) at each batch size, or (None, None)."""
    if "repeated" not in profile.cells[name]:
        return None, None
    sizes = np.arange(up_to + 1)
    seen = np.interp(sizes, *profile.unique_shares(name))
    low = np.interp(sizes, *profile.unique_shares(name, "repeated"))
    gap = profile.curve(name, quantile).at(sizes) - profile.curve(name, quantile, "repeated").at(sizes)
    apart = seen - low > 0.05
    # More unique IDs never cost less: a negative slope is noise.
    slope = np.where(apart, np.maximum(gap, 0.0) / np.where(apart, seen - low, 1.0), 0.0)
    return seen.tolist(), slope.tolist()
