"""Contestants of a simulated system, under the same load.

*Static*: one path on one executor. *Switching hardware only*: one path on every executor that holds it.
*Dispatcher*: all paths on all executors. The reference is the table on the first CPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mprec.dispatch import Profile
from mprec.simulate.devices import Device
from mprec.simulate.roofline import curve, resident
from mprec.simulate.shapes import ModelShape
from mprec.simulate.simulator import Result, SimulatedExecutor, SimulatedPath, simulate

__all__ = ["DISPATCHER", "Row", "capacity", "compare", "contestants", "described", "measured", "reference"]

DISPATCHER = "dispatcher"


def described(
    device: Device, shape: ModelShape, quality: Mapping[str, float], max_batch: int = 2048
) -> SimulatedExecutor | None:
    """An executor with the representations of ``quality`` that the device holds at once; None if there are
    none. ``quality``: share of correct predictions by representation.
    """
    shapes = {name: shape.with_representation(name) for name in quality}
    paths = [
        SimulatedPath(name, quality[name], curve(shapes[name], device, max_batch))
        for name in resident(shapes, device)
    ]
    return SimulatedExecutor(device.name, paths) if paths else None


def measured(profile: Profile, name: str, max_batch: int = 2048) -> SimulatedExecutor:
    """An executor that is as fast as a profile says, with its paths' qualities."""
    sizes = np.maximum(np.arange(max_batch + 1), 1)  # a batch of none is never served
    paths = [
        SimulatedPath(path, float(about["quality"]), profile.curve(path, "mean").at(sizes).tolist())
        for path, about in profile.paths.items()
    ]
    return SimulatedExecutor(name, paths)


def contestants(executors: Sequence[SimulatedExecutor]) -> dict[str, list[SimulatedExecutor]]:
    """Executors as each contestant uses them, by its name; the dispatcher is last."""
    names = [executor.name for executor in executors]
    if len(set(names)) != len(names):
        raise ValueError(f"executors: expected distinct names, got {names}")
    found = {
        f"{path.name} on {executor.name}": [SimulatedExecutor(executor.name, [path])]
        for executor in executors
        for path in executor.paths
    }
    for path in dict.fromkeys(path.name for executor in executors for path in executor.paths):
        holders = [
            SimulatedExecutor(executor.name, [p])
            for executor in executors
            for p in executor.paths
            if p.name == path
        ]
        if len(holders) > 1:
            found[f"{path} on all"] = holders
    return {**found, DISPATCHER: list(executors)}


def reference(executors: Sequence[SimulatedExecutor]) -> str:
    """Name of the static contestant that ratios refer to: the table on the first CPU, else the table wherever
    it is held first, else the first path of the first executor.
    """
    pairs = [(executor.name, path.name) for executor in executors for path in executor.paths]
    pairs.sort(key=lambda pair: (pair[1] != "table", not pair[0].startswith("cpu")))
    executor, path = pairs[0]
    return f"{path} on {executor}"


def capacity(executors: Sequence[SimulatedExecutor], samples_per_query: float, sla_s: float) -> float:
    """Queries per second of all executors together, each with its fastest path in the batches of greatest
    throughput that take half of the SLA at most (a single query's, if even that takes longer).
    """
    total = 0.0
    for executor in executors:
        best = 0.0
        for path in executor.paths:
            seconds = np.asarray(path.curve)
            sizes = np.arange(len(seconds))
            allowed = (seconds <= sla_s / 2) & (sizes > 0)
            allowed[min(max(1, round(samples_per_query)), len(seconds) - 1)] = True
            best = max(best, float((sizes[allowed] / seconds[allowed]).max()))
        total += best
    return total / samples_per_query


@dataclass(frozen=True)
class Row:
    """One contestant at one load and SLA. ``ratio``: its correct predictions per second over the reference's
    (None if that has none)."""

    contestant: str
    sla_ms: float
    qps: float
    result: Result
    ratio: float | None

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; ``mix``: share of the answered samples by ``path on executor``."""
        answered = sum(self.result.samples.values())
        keys = ("correct_per_s", "late", "refused", "missed", "p50_ms", "p99_ms")
        return {
            "contestant": self.contestant,
            "sla_ms": self.sla_ms,
            "qps": self.qps,
            "queries": self.result.queries,
            **{key: getattr(self.result, key) for key in keys},
            "ratio": self.ratio,
            "mix": {
                f"{path} on {executor}": count / answered
                for (path, executor), count in sorted(self.result.samples.items())
            },
            "utilisation": dict(self.result.utilisation),
        }


def compare(
    executors: Sequence[SimulatedExecutor],
    times: np.ndarray,
    sizes: np.ndarray,
    *,
    sla_s: float,
    qps: float,
    only: Sequence[str] | None = None,
    baseline: str | None = None,
    **options: Any,
) -> Iterator[Row]:
    """Let every contestant (or those named ``only``) serve the same load, the reference first.

    ``baseline``: the reference's name, if not :func:`reference`'s. ``options`` go to ``simulate``.
    """
    field = contestants(executors)
    first = baseline or reference(executors)
    base = None
    for name in [first, *(name for name in field if name != first)]:
        if only is not None and name not in only and name != first:
            continue
        result = simulate(field[name], times, sizes, sla_s=sla_s, **options)
        base = result.correct_per_s if base is None else base
        yield Row(name, 1e3 * sla_s, qps, result, result.correct_per_s / base if base else None)
