"""When queries arrive, and how large they are: for load tests and for simulations. Needs NumPy only.

A process is asked for ``times(seconds, rng)``: float64 [n], rising, in seconds within ``[0, seconds)``. Its
``rate`` is the mean number of queries per second. Query sizes are asked for ``draw(count, rng)``:
int64 [count], in samples.
"""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

__all__ = [
    "LOGNORMAL_SIZES",
    "Arrivals",
    "Bursty",
    "Diurnal",
    "NormalSizes",
    "Poisson",
    "QuerySizes",
    "Sizes",
    "Steps",
    "Trace",
    "arrivals_from",
]


class Arrivals(Protocol):
    """A process of arrivals."""

    rate: float

    def times(self, seconds: float, rng: np.random.Generator) -> np.ndarray: ...


class Sizes(Protocol):
    """A distribution of samples per query."""

    def draw(self, count: int, rng: np.random.Generator) -> np.ndarray: ...


def _positive(**values: float) -> None:
    for name, value in values.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name}: expected a finite number above 0, got {value!r}")


def _piecewise(edges: np.ndarray, rates: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Poisson arrivals at ``rates[i]`` between ``edges[i]`` and ``edges[i + 1]``."""
    lengths = np.diff(edges)
    counts = rng.poisson(rates * lengths)
    starts, lengths = np.repeat(edges[:-1], counts), np.repeat(lengths, counts)
    times = np.sort(starts + lengths * rng.random(len(starts)))
    # A product may round up to the very end.
    return times[times < edges[-1]]


@dataclass(frozen=True)
class Poisson:
    """Independent arrivals at a constant rate."""

    rate: float

    def __post_init__(self) -> None:
        _positive(rate=self.rate)

    def times(self, seconds: float, rng: np.random.Generator) -> np.ndarray:
        _positive(seconds=seconds)
        return _piecewise(np.array([0.0, seconds]), np.array([self.rate]), rng)


@dataclass(frozen=True)
class Bursty:
    """A Markov-modulated Poisson process of two states: bursts at ``peak`` times the mean rate that last
    ``burst_s`` on average, and calm times that last ``calm_s`` on average, at what rate is left.
    """

    rate: float
    peak: float = 2.0
    burst_s: float = 0.1
    calm_s: float = 0.2

    def __post_init__(self) -> None:
        _positive(rate=self.rate, burst_s=self.burst_s, calm_s=self.calm_s)
        most = 1 + self.calm_s / self.burst_s
        if not 1 <= self.peak <= most:
            raise ValueError(
                f"peak: expected 1 to {most:g}, above which calm rates are negative, got {self.peak!r}"
            )

    def times(self, seconds: float, rng: np.random.Generator) -> np.ndarray:
        _positive(seconds=seconds)
        calm = 1 - (self.peak - 1) * self.burst_s / self.calm_s
        # The first state is drawn from the stationary distribution: the mean rate holds from the start.
        bursts = rng.random() < self.burst_s / (self.burst_s + self.calm_s)
        edges, rates = [0.0], []
        while edges[-1] < seconds:
            rates.append(self.rate * (self.peak if bursts else calm))
            edges.append(edges[-1] + rng.exponential(self.burst_s if bursts else self.calm_s))
            bursts = not bursts
        edges[-1] = seconds
        return _piecewise(np.array(edges), np.array(rates), rng)


@dataclass(frozen=True)
class Diurnal:
    """A rate that swings as a sine by ``swing`` of its mean, from the trough at the start and back within
    ``period_s`` (None: the whole duration).
    """

    rate: float
    swing: float = 0.8
    period_s: float | None = None

    def __post_init__(self) -> None:
        _positive(rate=self.rate)
        if not 0 <= self.swing <= 1:
            raise ValueError(f"swing: expected 0 to 1, got {self.swing!r}")
        if self.period_s is not None:
            _positive(period_s=self.period_s)

    def times(self, seconds: float, rng: np.random.Generator) -> np.ndarray:
        # Thinning (Lewis and Shedler, 1979).
        times = Poisson(self.rate * (1 + self.swing)).times(seconds, rng)
        phase = 2 * np.pi * times / (self.period_s or seconds)
        return times[rng.random(len(times)) * (1 + self.swing) < 1 - self.swing * np.cos(phase)]


@dataclass(frozen=True)
class Steps:
    """Poisson arrivals at each of ``rates`` for ``step_s`` in turn, again and again."""

    rates: Sequence[float]
    step_s: float

    def __post_init__(self) -> None:
        _positive(step_s=self.step_s)
        if not self.rates:
            raise ValueError("rates: expected at least one rate, got none")
        for rate in self.rates:
            _positive(rates=rate)

    @property
    def rate(self) -> float:
        return sum(self.rates) / len(self.rates)

    def times(self, seconds: float, rng: np.random.Generator) -> np.ndarray:
        _positive(seconds=seconds)
        edges = np.append(np.arange(0.0, seconds, self.step_s), seconds)
        return _piecewise(edges, np.resize(np.asarray(self.rates, float), len(edges) - 1), rng)


@dataclass(frozen=True)
class Trace:
    """Arrivals as recorded in ``file``: the first column of each line is a time in seconds, a heading may
    come first. Scaled to a mean ``rate`` (None: as recorded), begun again where it ends.

    ``ValueError`` names the line that is no time, and a file of fewer than two different times.
    """

    file: str | os.PathLike
    rate: float | None = None
    _recorded: np.ndarray = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        times = np.sort(_read_times(self.file))
        if len(times) < 2 or not times[-1] > times[0]:
            raise ValueError(f"{self.file}: expected at least two different times, got {len(times)} times")
        recorded = (len(times) - 1) / (times[-1] - times[0])
        rate = recorded if self.rate is None else self.rate
        _positive(rate=rate)
        object.__setattr__(self, "rate", rate)
        object.__setattr__(self, "_recorded", (times - times[0]) * (recorded / rate))

    def times(self, seconds: float, rng: np.random.Generator) -> np.ndarray:
        """``rng`` is not used: a trace is what it is."""
        _positive(seconds=seconds)
        # One mean gap lies between the last time and the first of the next turn.
        turn = len(self._recorded) / self.rate
        starts = turn * np.arange(math.ceil(seconds / turn))
        times = (starts[:, None] + self._recorded).ravel()
        return times[times < seconds]


def _read_times(file: str | os.PathLike) -> np.ndarray:
    times = []
    with open(file, newline="", encoding="utf-8") as lines:
        for number, line in enumerate(csv.reader(lines), start=1):
            if not line:
                continue
            try:
                time = float(line[0])
            except ValueError:
                if number == 1:
                    continue
                time = math.nan
            if not math.isfinite(time):
                raise ValueError(f"{file}, line {number}: expected a time in seconds, got {line[0]!r}")
            times.append(time)
    return np.array(times)


def arrivals_from(text: str, rate: float) -> Arrivals:
    """``poisson``, ``bursty``, ``diurnal`` or ``trace:FILE`` at a mean ``rate`` per second.

    ``ValueError`` for anything else, ``OSError`` for a file that cannot be read.
    """
    kind, _, file = text.partition(":")
    if kind == "trace" and file:
        return Trace(file, rate)
    kinds = {"poisson": Poisson, "bursty": Bursty, "diurnal": Diurnal}
    if text not in kinds:
        raise ValueError(f"arrivals: expected {', '.join(kinds)} or trace:FILE, got {text!r}")
    return kinds[text](rate)


@dataclass(frozen=True)
class QuerySizes:
    """Lognormal number of samples per query: its ``mean`` before clipping to ``[1, largest]``, and
    ``sigma``, the standard deviation of its logarithm.
    """

    mean: float = 128.0
    sigma: float = 1.0
    largest: int = 1024

    def __post_init__(self) -> None:
        if not (0 < self.mean < math.inf and 0 <= self.sigma < math.inf and self.largest >= 1):
            raise ValueError(f"query sizes need mean > 0, sigma >= 0 and largest >= 1, got {self}")

    def draw(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """int64 [count]."""
        mu = math.log(self.mean) - self.sigma**2 / 2
        return np.clip(np.rint(rng.lognormal(mu, self.sigma, count)), 1, self.largest).astype(np.int64)


#: Mean 128, as in MP-Rec.
LOGNORMAL_SIZES = QuerySizes()


@dataclass(frozen=True)
class NormalSizes:
    """Normal number of samples per query, clipped to ``[1, largest]``: DeepRecSys's (Gupta et al., 2020)."""

    mean: float = 165.0
    deviation: float = 16.0
    largest: int = 1024

    def __post_init__(self) -> None:
        if not (0 < self.mean < math.inf and 0 <= self.deviation < math.inf and self.largest >= 1):
            raise ValueError(f"query sizes need mean > 0, deviation >= 0 and largest >= 1, got {self}")

    def draw(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """int64 [count]."""
        return np.clip(np.rint(rng.normal(self.mean, self.deviation, count)), 1, self.largest).astype(
            np.int64
        )
