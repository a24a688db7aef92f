"""The dispatcher against an oracle and against every static choice; how well latencies are predicted; what a
decision costs.

``python benchmarks/bench_dispatch.py [--only NAME] [--seconds S] [--threads N] [--batches N] [--no-csv]``

Work: eight DHE features (1024-128-16) and eight tables over Zipf(1.05) IDs of a vocabulary of a million, the
former also over a stream of which every other batch, at random, is uniform, and the hybrid DLRM of random
weights over MovieLens-100k's held-out rows where that is installed. Candidates give equal results: kernels
(threads, equal IDs once or not) and MP-Cache with 1 % of the IDs.

*Prediction error*: profiled median at batch sizes off the grid against the median that is then observed, of
calls among calls of other sizes and paths, as in the profile. (Sixteen calls of one size in a row get faster
and faster, as caches fill and the allocator has memory at hand: eight tables at batch 1900 by a third.)

*Regret*: a stream of batches of 1...2048 samples, half of log-uniform size, half lognormal (median 64,
sigma 1, as of recommendation queries); every candidate runs every batch three times, in turn, and its time
is the least. The dispatcher is compared with the oracle, which takes the fastest candidate of each batch,
and with the best single candidate, by total time and by the geometric mean over batches. *Oracle gain*, the
oracle over the best single candidate, is the most that any choice among these candidates could gain.

On a machine that others use, take one thread (OpenMP's regions wait for the slowest core) and
``--clock cpu``, the calling thread's CPU time, which leaves out what others ran meanwhile.
"""

import argparse
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent))
import harness

from mprec import data
from mprec.bags import Bags
from mprec.cache import CachedEmbeddingBagCollection
from mprec.data import Batch
from mprec.dispatch import (
    Dispatcher,
    Profile,
    ScoringPath,
    microbenchmark,
    unique_share,
)
from mprec.models import DLRM
from mprec.nn import DheConfig, EmbeddingBagCollection, FeatureConfig, option_candidates, with_representation
from mprec.paths import sampler
from mprec.tuning import _with

FEATURES, VOCABULARY, EXPONENT = 8, 1_000_000, 1.05
OFF_GRID = (3, 6, 11, 23, 45, 91, 181, 300, 362, 724, 1000, 1448, 1900)


clock = time.perf_counter


class Ids:
    """Batches of one ID per feature: Zipf with a chance of ``zipf``, else uniform. Ranks are scattered over
    the vocabulary."""

    def __init__(self, zipf: float, seed: int = 0) -> None:
        self.zipf = zipf
        weights = np.arange(1, VOCABULARY + 1, dtype=np.float64) ** -EXPONENT
        self.cumulative = np.cumsum(weights)
        self.ids = np.random.default_rng(seed).permutation(VOCABULARY)
        self.counts = np.zeros(VOCABULARY)
        self.counts[self.ids] = weights

    def __call__(self, batch_size: int, rng: np.random.Generator) -> Batch:
        n = FEATURES * batch_size
        if rng.random() < self.zipf:
            ids = self.ids[np.searchsorted(self.cumulative, rng.random(n) * self.cumulative[-1])]
        else:
            ids = rng.integers(VOCABULARY, size=n)
        return Batch(
            torch.zeros(batch_size, 0),
            Bags(torch.from_numpy(ids), torch.arange(n + 1), num_features=FEATURES),
            torch.zeros(batch_size),
        )


def embedding_work(representation: str, zipf: float):
    draw = Ids(zipf)
    dhe = DheConfig(k=1024, hidden=(128,)) if representation == "dhe" else None
    features = [FeatureConfig(f"f{i}", VOCABULARY, 16, representation, dhe) for i in range(FEATURES)]
    collection = EmbeddingBagCollection(features)
    candidates = option_candidates(dhe is not None)
    paths = [ScoringPath(name, representation, 0.0, _with(collection, o)) for name, o in candidates.items()]
    if dhe is not None:
        nbytes = FEATURES * VOCABULARY // 100 * 16 * 4 * 2
        cached = CachedEmbeddingBagCollection(collection, nbytes, {f.name: draw.counts for f in features})
        paths.append(ScoringPath("MP-Cache of 1 %", "dhe", 0.0, _with(cached, None)))
    return paths, draw


def movielens_work():
    log = data.load("movielens")
    features = [FeatureConfig(name, size, 16) for name, size in log.features]
    model = DLRM(with_representation(features, "hybrid", DheConfig()), log.num_dense, 16, (64, 32), (64, 32))
    *_, test = log.split()

    def scored(options):
        @torch.inference_mode()
        def run(batch: Batch) -> torch.Tensor:
            model.embeddings.options = lambda samples: options
            return model(batch.dense, batch.bags)

        return run

    paths = [ScoringPath(name, "hybrid", 0.0, scored(o)) for name, o in option_candidates(True).items()]
    return paths, sampler(test)


#: Not for predictions: a batch size alone does not tell which of two streams a batch is from.
MIXED = "8 x DHE 1024-128-16, Zipf(1.05) or uniform"
WORKS = {
    "8 x DHE 1024-128-16, Zipf(1.05)": lambda: embedding_work("dhe", 1.0),
    MIXED: lambda: embedding_work("dhe", 0.5),
    "8 tables, Zipf(1.05)": lambda: embedding_work("table", 1.0),
    "hybrid DLRM, MovieLens-100k": movielens_work,
}


def prediction_errors(paths, profile, draw, seconds: float) -> list[float]:
    """Of each path at each batch size off the grid, against calls made as the profile's were."""
    samples = microbenchmark(paths, draw, OFF_GRID, seconds=seconds, seed=1, clock=clock)
    return [
        abs(profile.curve(name).at(size) / float(np.median(seen)) - 1)
        for (name, size), seen in samples.items()
    ]


def _times(path: ScoringPath, inputs) -> list[float]:
    times = []
    for item in inputs:
        start = clock()
        path.model(item)
        times.append(clock() - start)
    return times


def stream_sizes(batches: int, rng) -> list[int]:
    log_uniform = np.exp(rng.uniform(0, np.log(2048.999), batches - batches // 2))
    lognormal = np.exp(rng.normal(np.log(64), 1.0, batches // 2))
    return rng.permutation(np.clip(np.concatenate([log_uniform, lognormal]), 1, 2048).astype(int)).tolist()


class Taken(NamedTuple):
    """Seconds of one batch: of each candidate, and of counting its unique IDs, whose share is told too."""

    seconds: dict[str, float]
    size: int
    share: float
    share_s: float


def stream(paths, draw, sizes, rng) -> list[Taken]:
    """What each candidate takes for each batch."""
    taken, counting = [], ScoringPath("share of unique IDs", "", 0.0, unique_share)
    for i, size in enumerate(sizes):
        batch = draw(size, rng)
        share_s = min(_times(counting, [batch] * 3))
        best = {path.name: float("inf") for path in paths}
        for _ in range(3):
            for path in paths[i % len(paths) :] + paths[: i % len(paths)]:
                best[path.name] = min(best[path.name], *_times(path, [batch]))
        taken.append(Taken(best, size, unique_share(batch), share_s))
    return taken


def total(times) -> float:
    return float(np.sum(times))


def geometric_mean(times) -> float:
    return float(np.exp(np.mean(np.log(times))))


@dataclass(frozen=True)
class Choices:
    """Seconds of each batch of a stream: as the dispatcher chose, and of every candidate."""

    chosen: list[float]
    static: dict[str, list[float]]
    decision_us: float

    @property
    def oracle(self) -> list[float]:
        return [min(times) for times in zip(*self.static.values(), strict=True)]

    def best_static(self, over=total) -> str:
        """The candidate of the least total time (or geometric mean)."""
        return min(self.static, key=lambda name: over(self.static[name]))

    def row(self) -> dict[str, str | int]:
        found = {"batches": len(self.chosen)}
        for label, over in (("total", total), ("geomean", geometric_mean)):
            best = self.best_static(over)
            worst = max(over(times) for times in self.static.values())
            chosen, static = over(self.chosen), over(self.static[best])
            found |= {
                f"{label}_regret": f"{chosen / over(self.oracle):.4f}",
                f"{label}_best_static": best,
                f"{label}_gain": f"{static / chosen:.4f}",
                f"{label}_oracle_gain": f"{static / over(self.oracle):.4f}",
                f"{label}_gain_over_worst": f"{worst / chosen:.4f}",
            }
        return found


def choices(paths, profile, taken: list[Taken]) -> Choices:
    """The dispatcher among ``paths`` on a stream of which each candidate's times are known. Where it asks for
    the share of unique IDs, it pays for counting them."""
    dispatcher = Dispatcher(paths, profile, statistic="mean")
    chosen = []
    for batch in taken:
        asked = []
        count = lambda batch=batch, asked=asked: asked.append(batch) or batch.share  # noqa: E731
        name = dispatcher.choose(batch.size, 0.0, unique_share=count).name
        dispatcher.observe(name, batch.size, batch.seconds[name], batch.share if asked else None)
        chosen.append(batch.seconds[name] + (batch.share_s if asked else 0.0))
    static = {path.name: [batch.seconds[path.name] for batch in taken] for path in paths}
    return Choices(chosen, static, decision_us(dispatcher))


def decision_us(dispatcher: Dispatcher) -> float:
    def once() -> float:
        start = time.perf_counter()
        for _ in range(1000):
            dispatcher.choose(128, 0.01, 0.001, lambda: 0.7)
        return (time.perf_counter() - start) * 1e3

    return statistics.median(once() for _ in range(25))


def measure(name: str, seconds: float, batches: int) -> tuple[list[float], dict[str, Choices]]:
    """Errors of predictions off the grid; choices among the kernels, then with the cache."""
    paths, draw = WORKS[name]()
    rng = np.random.default_rng(1)
    profile = Profile.measure(paths, draw, seconds=seconds, conditions=("warm",), clock=clock)
    sizes = stream_sizes(batches, rng)
    taken = stream(paths, draw, sizes, rng)
    errors = [] if name == MIXED else prediction_errors(paths, profile, draw, seconds / 4)
    kernels = [p for p in paths if "Cache" not in p.name]
    subsets = {"kernels": kernels} if len(kernels) == len(paths) else {"kernels": kernels, "and cache": paths}
    return errors, {label: choices(some, profile, taken) for label, some in subsets.items()}


def rows(name: str, args) -> tuple[list[dict], list[dict]]:
    """Rows of predictions, and of the stream."""
    errors, found = measure(name, args.seconds, args.batches)
    predictions = []
    if errors:
        predictions.append(
            {
                "work": name,
                "clock": args.clock,
                "off_grid": " ".join(map(str, OFF_GRID)),
                "cells": len(errors),
                "error_median": f"{np.median(errors):.4f}",
                "error_p95": f"{np.quantile(errors, 0.95):.4f}",
                "error_max": f"{max(errors):.4f}",
            }
        )
    regrets = [
        {
            "work": name,
            "candidates": label,
            "clock": args.clock,
            **c.row(),
            "decision_us": f"{c.decision_us:.3f}",
        }
        for label, c in found.items()
    ]
    return predictions, regrets


def show(title: str, rows: list[dict]) -> None:
    """One column per row: there are more figures than works."""
    table = Table(title=title, title_justify="left", show_header=False)
    for key in rows[0]:
        table.add_row(key, *(str(row[key]) for row in rows))
    Console(width=max(80, 24 + 34 * len(rows))).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", default="", help="part of a work's name")
    parser.add_argument("--seconds", type=float, default=10.0, help="per profile (10)")
    parser.add_argument("--batches", type=int, default=150, help="of the stream (150)")
    parser.add_argument("--threads", type=int, default=1, help="(1)")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="(wall)")
    parser.add_argument("--no-csv", action="store_true")
    args = parser.parse_args()
    if args.clock == "cpu":
        if args.threads > 1:
            parser.error("--clock cpu sees one thread only")
        global clock
        clock = time.thread_time
    torch.set_num_threads(args.threads)
    works = [name for name in WORKS if args.only in name]
    if not data.available()["movielens"]:
        works = [name for name in works if "MovieLens" not in name]
    if not works:
        parser.error(f"--only: nothing to run is called {args.only!r}")
    found = [rows(name, args) for name in works]
    predictions, regrets = ([row for parts in found for row in parts[i]] for i in (0, 1))
    if predictions:
        show(f"predictions, {args.threads} thread(s)", predictions)
    show(f"choices, {args.threads} thread(s)", regrets)
    if not args.no_csv:
        print(harness.append_csv("prediction", predictions))
        print(harness.append_csv("regret", regrets))


if __name__ == "__main__":
    main()
