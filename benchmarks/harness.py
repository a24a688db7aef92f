"""Timing that can be trusted on a shared machine: interleaved rounds in one process, medians, fresh inputs.

Candidates that do the same work take turns of some milliseconds (A B C, A B C, …) so that a change of clock
or a noisy neighbour hits all of them alike; every call has a new random input. Results are appended to CSV
files in ``benchmarks/results/``, whose rows name the command that wrote them.
"""

import csv
import datetime
import os
import random
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mprec import _native
from mprec.dispatch.microbenchmark import no_collection

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Timing:
    """Seconds per call over the rounds."""

    p20: float
    p50: float
    p80: float
    rounds: int


def interleaved(
    candidates: Mapping[str, Callable[[Any], object]],
    make_input: Callable[[], Any],
    *,
    seconds: float = 1.0,
    min_rounds: int = 15,
    turn_s: float = 4e-3,
    own_inputs: bool = False,
    prepare: Mapping[str, Callable[[Any], Any]] | None = None,
) -> dict[str, Timing]:
    """Time `candidates` in turn, for about `seconds` in total.

    A turn is as many calls of one candidate, back to back, as the fastest of them makes in `turn_s` (200 at
    most), each on a fresh draw of `make_input`; a round is a turn of each, and its figures are the means per
    call. A turn must be long: the first calls meet caches, address translations and branch predictors that
    the others have filled, which in service nobody does. So one more call before each turn is not timed,
    and the order of the turns is drawn for each round: no candidate always finds what the same other left.

    `own_inputs`: draws for each candidate, for work out of cache: rows that one has read would be in cache
    for the next. `prepare`: by candidate, a step from the draw to the call's argument that is not timed.
    Returns one `Timing` per name. The garbage collector is off meanwhile.
    """
    ready = {name: (prepare or {}).get(name, lambda item: item) for name in candidates}
    fastest = float("inf")
    for name, call in candidates.items():
        for item in [ready[name](make_input()) for _ in range(4)]:
            start = time.perf_counter()
            call(item)
            fastest = min(fastest, time.perf_counter() - start)
    repeats = max(1, min(200, round(turn_s / max(fastest, 1e-9))))
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    names, order = list(candidates), random.Random(0)
    deadline = time.perf_counter() + seconds
    rounds = 0
    with no_collection():
        while rounds < min_rounds or time.perf_counter() < deadline:
            draws = None
            order.shuffle(names)
            for name in names:
                if own_inputs or draws is None:
                    draws = [make_input() for _ in range(1 + repeats)]
                inputs = [ready[name](draw) for draw in draws]
                call = candidates[name]
                call(inputs[0])
                start = time.perf_counter()
                for item in inputs[1:]:
                    call(item)
                samples[name].append((time.perf_counter() - start) / repeats)
            rounds += 1
    return {name: _timing(values) for name, values in samples.items()}


def _timing(values: list[float]) -> Timing:
    if len(values) < 2:
        return Timing(values[0], values[0], values[0], len(values))
    p20, _, _, p80 = statistics.quantiles(values, n=5)
    return Timing(p20, statistics.median(values), p80, len(values))


@contextmanager
def threads(count: int):
    """Run the enclosed calls with `count` threads (torch's and mprec's are the same)."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def environment() -> dict[str, str]:
    """The columns that say where a figure was measured."""
    spin = os.environ.get("GOMP_SPINCOUNT")
    return {
        "time": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "command": shlex.join([*([f"GOMP_SPINCOUNT={spin}"] if spin else []), "python", *sys.orig_argv[1:]]),
        "cpu": _native._C.cpu_model(),
        "isa": _native._C.isa(),
        "threads": str(torch.get_num_threads()),
        "mprec": _native.__version__,
        "torch": torch.__version__,
    }


def append_csv(name: str, rows: list[dict]) -> Path:
    """Append `rows` (equal keys) and the environment's columns to ``benchmarks/results/<name>.csv``.

    ``ValueError`` if the file has other columns: a result file keeps its form for ever.
    """
    path = RESULTS / f"{name}.csv"
    where = environment()
    full = [{**row, **where} for row in rows]
    if not full:
        return path
    columns = list(full[0])
    exists = path.exists()
    if exists:
        with path.open(newline="") as file:
            known = next(csv.reader(file))
        if known != columns:
            raise ValueError(f"{path}: has columns {known}, not {columns}")
    path.parent.mkdir(exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if not exists:
            writer.writeheader()
        writer.writerows(full)
    return path
