"""Times paths over batch sizes so that the figures can be compared: in interleaved rounds, in one process.

In every round each path runs at each batch size, the paths in turn: a change of clock or a busy neighbour
hits all of them alike. Every call is timed by itself, because what matters is the tail. Small batches are
called more often per round than large ones, as they cost less.

Each path gets fresh inputs of its own: on those of another it would find that one's rows in the CPU's caches.
Of several calls in a row the first is not timed: drawing inputs has filled the caches with other things.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from mprec.dispatch.paths import ScoringPath

__all__ = ["Evict", "Samples", "microbenchmark"]

Samples = dict[tuple[str, int], list[float]]  # (path's name, batch size) -> seconds of each call

_ROUND_S = 3e-3  # a path is called for about this long per batch size and round ...
_MAX_CALLS = 16  # ... but not more often than this, and at least once


class Evict:
    """Called before a timed call, empties the CPU's caches by reading as much as they hold, or 256 MiB."""

    def __init__(self, nbytes: int | None = None) -> None:
        self._memory = np.ones((nbytes or _largest_cache()) // 8)

    def __call__(self) -> None:
        self._memory.sum()


def _largest_cache() -> int:
    """Bytes of the largest cache, if Linux tells."""
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    known = [int(size.read_text().strip().removesuffix("K")) << 10 for size in sizes]
    return min(max(known, default=64 << 20), 256 << 20)


def microbenchmark(
    paths: Sequence[ScoringPath],
    make_input: Callable[[int, np.random.Generator], Any],
    batch_sizes: Sequence[int],
    *,
    seconds: float,
    min_rounds: int = 3,
    max_calls: int = 2000,
    before_call: Callable[[], object] | None = None,
    after_call: Callable[[str, int, Any], object] | None = None,
    clock: Callable[[], float] = time.perf_counter,
    seed: int = 0,
    progress: Callable[[float], object] | None = None,
) -> Samples:
    """Time every path at every batch size it supports, for about ``seconds`` in total, inputs, warm-up and
    all, unless ``min_rounds`` take longer.

    ``make_input(batch_size, rng)`` draws one input; it is not timed. Stops after the time is up and
    ``min_rounds`` are done, or when every path has been called ``max_calls`` times at every size.
    ``before_call`` runs before each timed call (``Evict()``: cold caches), ``after_call`` some time after it,
    with the path's name, the batch size and the input. ``progress`` gets the share done.
    """
    if seconds < 0:
        raise ValueError(f"seconds: expected at least 0, got {seconds}")
    if bad := [size for size in batch_sizes if size < 1]:
        raise ValueError(f"batch_sizes: expected sizes of at least 1, got {bad[0]}")
    rng = np.random.default_rng(seed)
    cells = {
        size: [path for path in paths if path.supports is None or path.supports(size)]
        for size in sorted(set(batch_sizes))
    }
    samples: Samples = {(path.name, size): [] for size, able in cells.items() for path in able}
    start = clock()
    prepare = before_call or (lambda: None)
    repeats = {size: _warm_up(able, make_input, size, rng, prepare, clock) for size, able in cells.items()}
    rounds = 0
    with no_collection():
        while rounds < min_rounds or clock() - start < seconds:
            for size, able in cells.items():
                if able and len(samples[able[0].name, size]) < max_calls:
                    settle = repeats[size] > 1 and before_call is None
                    # Rotated, so that no path always follows the same one.
                    for path in able[rounds % len(able) :] + able[: rounds % len(able)]:
                        inputs = [make_input(size, rng) for _ in range(repeats[size] + settle)]
                        if settle:
                            path.model(inputs.pop())
                        _time(path.model, inputs, prepare, clock, samples[path.name, size])
                        if after_call is not None:
                            for item in inputs:
                                after_call(path.name, size, item)
            rounds += 1
            if progress is not None:
                progress(min(1.0, (clock() - start) / seconds if seconds else rounds / min_rounds))
            if all(len(values) >= max_calls for values in samples.values()):
                break
    return samples


def _warm_up(paths, make_input, size, rng, prepare, clock) -> int:
    """Call each path twice (first calls allocate and pack), or once where that is long; how often a round
    shall call each."""
    slowest = 0.0
    for path in paths:
        for _ in range(2):
            item = make_input(size, rng)
            start = clock()
            prepare()
            path.model(item)
            elapsed = clock() - start
            if elapsed > _ROUND_S:
                break
        slowest = max(slowest, elapsed)
    return max(1, min(_MAX_CALLS, int(_ROUND_S / max(slowest, 1e-9))))


def _time(model, inputs, prepare, clock, out: list[float]) -> None:
    for item in inputs:
        prepare()
        start = clock()
        model(item)
        out.append(clock() - start)


@contextmanager
def no_collection() -> Iterator[None]:
    """No garbage collection; what is alive now is left out of the next ones until the end."""
    was_on = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        if was_on:
            gc.enable()
