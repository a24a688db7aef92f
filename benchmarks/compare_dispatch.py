"""Rows of ``compare.py``: the dispatcher against an oracle and the best single candidate, its predictions and
decisions against their bounds."""

import os
from collections.abc import Iterator

import bench_dispatch
import harness
import numpy as np
import torch
from compare import Row

from mprec import data

ORACLE_BOUND, WANTED_GAIN = 1.05, 1.3
#: Per cent; and microseconds of a decision.
MEDIAN_ERROR, P95_ERROR, DECISION_US = 10, 30, 5


def rows(seconds: float, only: str) -> Iterator[Row]:
    threads = min(2, os.cpu_count() or 1)
    for name in bench_dispatch.WORKS:
        if "MovieLens" in name and not data.available()["movielens"]:
            continue
        work = f"dispatch, {name}"
        if only in work:
            with torch.inference_mode(False), torch.no_grad(), harness.threads(threads):
                errors, choices = bench_dispatch.measure(name, 8 * seconds, int(60 * seconds) or 1)
            yield from _rows(work, errors, choices, threads)


def _rows(work: str, errors: list[float], choices: dict, threads: int) -> Iterator[Row]:
    for label, found in choices.items():
        batches = len(found.chosen)
        mine, oracle = (bench_dispatch.total(t) / batches * 1e6 for t in (found.chosen, found.oracle))
        best = found.best_static()
        static = bench_dispatch.total(found.static[best]) / batches * 1e6
        note = f"mean batch of {batches} of 1...2048 samples, {threads} thread(s)"
        yield Row(f"{work}: {label}", "oracle", mine, oracle, round(1 / ORACLE_BOUND, 3), note)
        most = f"the oracle gains {static / oracle:.3f}; {note}"
        yield Row(f"{work}: {label}", f"always {best}", mine, static, WANTED_GAIN, most)
        yield Row(f"{work}: {label}", "bound", found.decision_us, DECISION_US, 1, "one decision")
    if errors:
        for what, value, bound in (
            ("median", np.median(errors), MEDIAN_ERROR),
            ("p95", np.quantile(errors, 0.95), P95_ERROR),
        ):
            note = f"{len(errors)} cells off the grid; in per cent, not microseconds"
            yield Row(f"{work}: prediction error, {what}", "bound", 100 * float(value), bound, 1, note)
