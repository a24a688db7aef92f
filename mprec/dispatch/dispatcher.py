"""The choice: per batch, the path of best quality whose predicted tail latency meets the latency target.

What a path is predicted to take, and how that follows what is observed, is in
:mod:`mprec.dispatch.prediction`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

from mprec.dispatch.paths import ScoringPath
from mprec.dispatch.prediction import Prediction
from mprec.dispatch.profile import Profile

__all__ = ["Candidate", "Dispatcher", "Explanation"]


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

    path: ScoringPath
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


class Dispatcher:
    """Chooses among ``paths`` by a ``profile`` that has measured them.

    ``statistic`` of a path's latency is what must meet the target: ``p95``, ``p99`` if the profile has enough
    calls per batch size (some hundreds) for it to be more than their maximum, or ``mean``, where nothing but
    the sum of many calls counts. Not thread-safe: one dispatcher per worker. ``KeyError`` if the profile
    lacks a path.
    """

    def __init__(
        self,
        paths: Sequence[ScoringPath],
        profile: Profile,
        *,
        statistic: str = "p95",
        condition: str = "warm",
    ) -> None:
        if not paths:
            raise ValueError("paths: expected at least one, got none")
        names = [path.name for path in paths]
        if len(set(names)) != len(names):
            raise ValueError(f"paths: expected distinct names, got {names}")
        up_to = max(profile.curve(name, statistic, condition).batch_sizes[-1] for name in names)
        self.profile, self.simulated = profile, profile.simulated
        self._limit = up_to
        self._states = [Prediction(path, profile, statistic, condition, up_to) for path in paths]
        self._by_name = {state.path.name: state for state in self._states}
        by_quality = sorted(self._states, key=lambda state: -state.path.quality)
        self._levels = [
            tuple(group) for _, group in groupby(by_quality, key=lambda state: state.path.quality)
        ]

    @property
    def paths(self) -> list[ScoringPath]:
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
        unique_share: float | Callable[[], float] | None = None,
        explain: bool = False,
    ) -> ScoringPath | Explanation:
        """The path for a batch of ``batch_size`` samples that has waited ``queued_s`` of its ``sla_s``.

        Times are in seconds. Of the paths predicted to answer in time, the one of highest quality, of
        several the fastest; if none is, the fastest of all. ``unique_share`` (distinct IDs over all, see
        ``unique_share()``) refines the prediction; a function is called for it only if the choice depends on
        it within the shares that were profiled, None takes them as they came.
        ``explain=True`` returns an :class:`Explanation`. ``ValueError`` for a batch size below 1, a NaN,
        or a negative waiting time.
        """
        if explain:
            unique_share = unique_share() if callable(unique_share) else unique_share
            return self._explain(batch_size, sla_s, queued_s, unique_share)
        left = sla_s - queued_s
        if batch_size < 1 or left != left or not queued_s >= 0:
            _check(batch_size, sla_s, queued_s)
        if unique_share is None:
            return self._pick(batch_size, left, None)
        if callable(unique_share):
            path = self._pick(batch_size, left, "lowest")
            if path is self._pick(batch_size, left, "highest"):
                return path
            unique_share = unique_share()
        _check_share(unique_share)
        return self._pick(batch_size, left, unique_share)

    def _pick(self, batch_size: int, left: float, share: float | str | None) -> ScoringPath:
        """Of the paths predicted to take at most ``left`` seconds the best; ``share`` may be a key of
        ``Prediction.known``."""
        size, scale = batch_size, 1.0
        if size > self._limit:
            size, scale = self._limit, batch_size / self._limit
        look_up = share is None or type(share) is str
        fallback, fallback_time = None, math.inf
        for level in self._levels:
            best, best_time = None, math.inf
            for state in level:  # Prediction.tail_at, written out: calls cost more than the rest
                if look_up:
                    predicted = state.known[share][size]
                else:
                    predicted = state.base[size] + share * state.slope[size]
                    if predicted < state.floor[size]:
                        predicted = state.floor[size]
                predicted *= scale * state.correction
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
        _check(batch_size)
        _check_share(unique_share)
        states = self._states if path is None else (self._by_name[path],)
        return min(state.tail_at(batch_size, unique_share) for state in states)

    def expect(self, batch_size: int, path: str | None = None, unique_share: float | None = None) -> float:
        """Predicted mean latency in seconds: of one path, or the least of all. Over many batches these add
        up, tails do not.
        """
        _check(batch_size)
        _check_share(unique_share)
        states = self._states if path is None else (self._by_name[path],)
        return min(state.typical_at(batch_size, unique_share) for state in states)

    def observe(self, path: str, batch_size: int, seconds: float, unique_share: float | None = None) -> None:
        """Tell how long a path took for a batch, so that its predictions follow what happens.

        ``unique_share`` as it was given to :meth:`choose`. ``KeyError`` for an unknown path. Times that are
        not positive and finite are ignored.
        """
        observed = self._by_name[path]
        if not 0.0 < seconds < math.inf:
            return
        for state in self._states:
            if state is observed:
                state.observe(batch_size, seconds, unique_share)
            else:
                state.passed_over()

    def _explain(self, batch_size, sla_s, queued_s, unique_share) -> Explanation:
        _check(batch_size, sla_s, queued_s)
        _check_share(unique_share)
        times = {s: s.tail_at(batch_size, unique_share) for level in self._levels for s in level}
        if min(times.values()) == math.inf:
            raise ValueError(f"batch_size: no path takes a batch of {batch_size}")
        left = sla_s - queued_s
        meeting = [s for s in times if times[s] <= left and times[s] < math.inf]
        # Levels come best first, and of equals `min` takes the first.
        best = meeting and [s for s in meeting if s.path.quality == meeting[0].path.quality]
        state = min(best or times, key=times.__getitem__)
        if not best:
            reason = "no path is predicted to meet the target: the fastest"
        elif len(best) > 1:
            reason = "fastest of the best paths predicted to meet the target"
        else:
            reason = "highest quality of the paths predicted to meet the target"
        candidates = tuple(
            Candidate(s.path.name, s.path.quality, seconds, seconds <= left) for s, seconds in times.items()
        )
        return Explanation(state.path, times[state], reason, batch_size, sla_s, queued_s, candidates)


def _check(batch_size: int, sla_s: float = 0.0, queued_s: float = 0.0) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
    if sla_s != sla_s:
        raise ValueError("sla_s is NaN")
    if not queued_s >= 0:
        raise ValueError(f"queued_s: expected a number not below 0, got {queued_s}")


def _check_share(unique_share: float | None) -> None:
    if unique_share is not None and not 0 <= unique_share <= 1:
        raise ValueError(f"unique_share: expected in [0, 1], got {unique_share}")
