"""Whether a profile still describes the machine: a few of its cells, measured again as they were.

Corrections of a run under load cannot tell: after an idle wait, or beside other threads, a call takes longer
than in a profile that is right.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mprec.dispatch import Profile, ScoringPath
from mprec.dispatch.microbenchmark import microbenchmark

__all__ = ["profile_drift", "profile_warnings"]

_OFF = 1.5  # times as long, or as short, from which a profile is called stale
_PLACES = (0.25, 0.5, 0.75)  # in the profile's grid of batch sizes


def profile_drift(
    paths: Sequence[ScoringPath],
    profile: Profile,
    make_input: Callable[[int, np.random.Generator], Any],
    *,
    seconds: float = 0.5,
    seed: int = 1,
) -> dict[str, float]:
    """Times as long as profiled that each path's calls take now: the median over three batch sizes of the
    ratio of median latencies. Takes about ``seconds``.
    """
    sizes = {
        path.name: [
            grid[round(place * (len(grid) - 1))]
            for grid in [profile.cells[path.name]["warm"]["batch_sizes"]]
            for place in _PLACES
        ]
        for path in paths
    }
    drift = {}
    every = sorted({size for each in sizes.values() for size in each})
    samples = microbenchmark(paths, make_input, every, seconds=seconds, seed=seed)
    for path in paths:
        curve = profile.curve(path.name, "p50")
        ratios = [float(np.median(samples[path.name, size])) / curve.at(size) for size in sizes[path.name]]
        drift[path.name] = float(np.median(ratios))
    return drift


def profile_warnings(drift: dict[str, float]) -> list[str]:
    """A sentence if a path's calls take other times than profiled by half or more."""
    off = {path: factor for path, factor in drift.items() if not 1 / _OFF <= factor <= _OFF}
    if not off:
        return []
    listed = ", ".join(f"{path} {factor:.2f}" for path, factor in off.items())
    return [
        f"the profile is stale, or it was taken or is now checked on a busy machine: its calls take now "
        f"{listed} times as long. Profile again when the machine is quiet"
    ]
