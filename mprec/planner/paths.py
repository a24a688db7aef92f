"""Which of several measured paths one machine should hold side by side."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from mprec.dispatch import Curve
from mprec.planner.pareto import Candidate, front, matches
from mprec.planner.solver import Infeasible

__all__ = ["Held", "paths_within"]


class Held(NamedTuple):
    """``kept``: names of paths, as they were chosen. ``matched``: of the others, the name of a path that is
    kept and is as good and as fast; what is in neither does not fit."""

    kept: list[str]
    matched: dict[str, str]


def paths_within(
    paths: Sequence[Candidate],
    weights: Mapping[str, Mapping[Hashable, int]],
    memory_bytes: int,
    batch_size: int = 128,
) -> Held:
    """The path of highest quality that fits, beside it the one that takes the least time for ``batch_size``
    samples, then, by quality, what else fits. A path that is nowhere faster than a better one is left out:
    what it saves in bytes is no gain beside that one.

    Args:
        paths: their ``nbytes`` are not looked at.
        weights: by path, the bytes of its weights by what tells them apart; what paths share is held once.

    Raises:
        Infeasible: no path fits.
        ValueError: a path without latencies, or at other batch sizes than the first one's.
    """
    for path in paths:
        if not path.seconds:
            raise ValueError(f"path {path.name!r}: no latency is known of it")
        if set(path.seconds) != set(paths[0].seconds):
            raise ValueError(
                f"path {path.name!r}: expected latencies at batch sizes {sorted(paths[0].seconds)}, as of "
                f"{paths[0].name!r}, got {sorted(path.seconds)}"
            )
    time = {path.name: _seconds(path, batch_size) for path in paths}
    alike = [replace(path, nbytes=0) for path in paths]
    kept: list[Candidate] = []
    held: dict[Hashable, int] = {}

    def fits(path: Candidate) -> bool:
        return sum({**held, **weights[path.name]}.values()) <= memory_bytes

    def keep(path: Candidate) -> None:
        kept.append(path)
        held.update(weights[path.name])

    if not (fitting := [path for path in alike if fits(path)]):
        least = min(sum(weights[path.name].values()) for path in paths)
        raise Infeasible(f"no path fits: the smallest needs {least} bytes, there are {memory_bytes}")
    keep(min(fitting, key=lambda path: (-path.quality, sum(path.seconds.values()))))
    while True:
        left = [path for path in alike if path not in kept]
        by = {path.name: next((k.name for k in kept if matches(k, path)), None) for path in left}
        others = [path for path in left if by[path.name] is None and fits(path)]
        if not others:
            return Held([path.name for path in kept], {name: k for name, k in by.items() if k is not None})
        verdict = front(others)
        useful = [path for path in others if verdict[path.name] is None]
        fastest = len(kept) == 1
        keep(min(useful, key=lambda path: time[path.name] if fastest else -path.quality))


def _seconds(path: Candidate, batch_size: int) -> float:
    sizes = sorted(path.seconds)
    return float(Curve.fit(sizes, [path.seconds[size] for size in sizes]).at(batch_size))
