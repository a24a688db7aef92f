"""How the cores of a machine are split among executors, and which split is the best on the machine at hand.

``local:T`` is one executor in this process, of T threads; ``local:NxT`` are N of them, side by side;
``process:NxT`` are N processes of T threads each (:class:`mprec.serving.ProcessExecutor`), which share one
copy of the weights. Processes cost a message for each batch, and gain what threads lose to Python's lock
where paths are not native programs, so that only a measurement can tell.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from mprec.data import Batch
from mprec.dispatch import Profile, ScoringPath
from mprec.dispatch.fingerprint import fingerprint
from mprec.dispatch.microbenchmark import no_collection
from mprec.dispatch.paths import shape_digest
from mprec.dispatch.profile import default_file
from mprec.files import write_whole
from mprec.serving.engine import Engine
from mprec.serving.executors import Executor, LocalExecutor
from mprec.serving.process_executor import ProcessExecutor

__all__ = ["SIZES", "Split", "best", "candidates", "close", "executors", "load", "measure", "save", "start"]

SIZES = (1, 16, 128)  # samples of a query
_OUTSTANDING = 16  # queries at any time
_TURNS = 3
_VERSION = 1


@dataclass(frozen=True)
class Split:
    """``processes`` of ``threads`` each; 0 is this process, with ``workers`` executors of so many."""

    processes: int
    threads: int
    workers: int = 1

    @classmethod
    def parse(cls, text: str) -> Split:
        """``local:2``, ``local:2x1``, ``process:2`` or ``process:2x1``. ``ValueError`` for anything else."""
        found = re.fullmatch(r"(local|process):(\d+)(?:x(\d+))?", text)
        if not found:
            raise ValueError(
                f"expected local:THREADS, local:NxTHREADS, process:N or process:NxTHREADS, got {text!r}"
            )
        kind, first, second = found[1], int(found[2]), found[3] and int(found[3])
        if first < 1 or second == 0:
            raise ValueError(f"expected at least one thread and one process, got {text!r}")
        if kind == "process":
            return cls(first, second or 1)
        return cls(0, first) if second is None else cls(0, second, first)

    def __str__(self) -> str:
        if self.processes:
            return f"process:{self.processes}x{self.threads}"
        return f"local:{self.threads}" if self.workers == 1 else f"local:{self.workers}x{self.threads}"


def candidates(cores: int) -> list[Split]:
    """What is worth measuring on so many cores: one thread, two threads, and executors and processes for all
    cores, all but the one that the front end needs, and half of them."""
    found = [Split(0, 1)]
    if cores > 1:
        counts = sorted({max(cores // 2, 1), cores - 1, cores})
        found += [Split(0, 2), *(Split(0, 1, count) for count in counts if count > 1)]
        found += [Split(count, 1) for count in counts]
    if cores > 3:
        found.append(Split(cores // 2, 2))
    return found


def executors(split: Split, paths: Sequence[ScoringPath], profile: Profile) -> list[Executor]:
    """Not yet started. The profile should be of as many threads as an executor has. For ``local`` set torch's
    threads yourself. ``ValueError`` if a path cannot go to a process."""
    if not split.processes:
        names = ["cpu"] if split.workers == 1 else [f"cpu {i}" for i in range(split.workers)]
        return [LocalExecutor(name, paths, profile) for name in names]
    return [
        ProcessExecutor(f"cpu {i}", paths, profile, threads=split.threads) for i in range(split.processes)
    ]


def start(some: Sequence[Executor]) -> None:
    """Start executors side by side: a process takes seconds. If one fails, all are closed."""
    with ThreadPoolExecutor(len(some)) as pool:
        starting = [pool.submit(executor.start) for executor in some]
    try:
        for future in starting:
            future.result()
    except BaseException:
        close(some)
        raise


def close(some: Sequence[Executor]) -> None:
    for executor in some:
        executor.close()


class _Kept(Executor):
    """An executor that outlives an engine."""

    def __init__(self, executor: Executor) -> None:
        super().__init__(executor.name, executor.paths, executor.profile)
        self.run, self.program = executor.run, executor.program


def measure(
    splits: Sequence[Split],
    paths: Sequence[ScoringPath],
    profile: Profile,
    queries: Mapping[int, Sequence[Callable[[], Batch]]],
    *,
    seconds: float = 0.2,
    progress: Callable[[str, float], object] = lambda what, share: None,
) -> dict[Split, dict[int, float]]:
    """Queries per second by split and size, over all paths: sixteen queries are under way at any time, in an
    engine that scores at most 128 samples at once.

    ``queries[size]`` make a query each, with the work that a front end has with it: that is done in the
    calling thread, so that splits are judged beside it. Each path, size and split has three turns of
    ``seconds``, the splits one after another. The figure of a size is the geometric mean over paths and
    turns. ``ValueError`` if a path cannot go to a process and ``splits`` has processes.
    """
    groups: dict[Split, list[Executor]] = {}
    pools = {t: max(s.processes for s in splits if s.threads == t) for t in {s.threads for s in splits}}
    before, workers = torch.get_num_threads(), {}
    try:
        for threads, count in pools.items():
            if count:
                workers[threads] = executors(Split(count, threads), paths, profile)
        if workers:
            progress("starting processes", 0.0)
            start([executor for some in workers.values() for executor in some])
        for split in splits:
            groups[split] = (
                workers[split.threads][: split.processes]
                if split.processes
                else executors(split, paths, profile)
            )
        logs: dict[Split, dict[int, list[float]]] = {
            split: {size: [] for size in queries} for split in splits
        }
        turns = [(path, size) for _ in range(_TURNS) for path in paths for size in queries]
        with no_collection():
            for done, (path, size) in enumerate(turns):
                progress("comparing executors", done / len(turns))
                for split, some in groups.items():
                    torch.set_num_threads(1 if split.processes else split.threads)
                    rate = _rate(some, path, queries[size], seconds)
                    logs[split][size].append(math.log(rate))
        progress("comparing executors", 1.0)
    finally:
        torch.set_num_threads(before)
        close([executor for some in workers.values() for executor in some])
    return {
        split: {size: math.exp(sum(values) / len(values)) for size, values in of.items()}
        for split, of in logs.items()
    }


def _rate(
    some: Sequence[Executor], path: ScoringPath, queries: Sequence[Callable[[], Batch]], seconds: float
) -> float:
    kept = [_Kept(executor) for executor in some]
    for executor in kept:
        executor.paths = [path]
    engine = Engine(executors=kept, sla_s=60.0, max_batch=max(SIZES), admission=False).start()
    free = threading.Semaphore(_OUTSTANDING)
    begin, asked = time.perf_counter(), 0
    try:
        while time.perf_counter() - begin < seconds or asked < _OUTSTANDING:
            free.acquire()
            future = engine.submit(queries[asked % len(queries)]())
            future.add_done_callback(lambda _: free.release())
            asked += 1
    finally:
        engine.close()
    counts = engine.statistics()
    if counts["answered"] != asked:
        raise RuntimeError(f"path {path.name!r} failed {asked - counts['answered']} of {asked} queries")
    return asked / (time.perf_counter() - begin)


def best(rates: Mapping[Split, Mapping[int, float]]) -> Split:
    """The split of the highest rate, over sizes by the geometric mean."""
    return max(rates, key=lambda split: sum(map(math.log, rates[split].values())))


# -- what was measured is kept beside the profiles


def _file(paths: Sequence[ScoringPath]) -> Path:
    key = {**fingerprint(), "threads": None, "cores": len(os.sched_getaffinity(0))}
    key["paths"] = {path.name: path.shape for path in paths}
    return default_file(paths).with_name(f"executors-{shape_digest(key)}.json")


def save(rates: Mapping[Split, Mapping[int, float]], paths: Sequence[ScoringPath]) -> None:
    """``OSError`` if the user's cache folder cannot be written to."""
    file = _file(paths)
    file.parent.mkdir(parents=True, exist_ok=True)
    content = {"version": _VERSION, "queries_per_s": {str(split): dict(of) for split, of in rates.items()}}
    write_whole(file, lambda stream: stream.write(json.dumps(content, indent=1).encode()))


def load(paths: Sequence[ScoringPath]) -> dict[Split, dict[int, float]] | None:
    """What was measured on this machine for these paths; None if nothing was, or it cannot be read."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        content = json.loads(_file(paths).read_text(encoding="utf-8"))
        if content["version"] == _VERSION and content["queries_per_s"]:
            return {
                Split.parse(name): {int(size): float(rate) for size, rate in of.items() if rate > 0}
                for name, of in content["queries_per_s"].items()
            }
    return None
