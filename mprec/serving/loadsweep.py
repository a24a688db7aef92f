"""Load tests over many loads and latency targets, in shares of what the best static path can do.

The figures that a reader wants of each are on one row: (load, SLA, contestant).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from mprec.arrivals import LOGNORMAL_SIZES, Sizes, arrivals_from
from mprec.data import ClickDataset
from mprec.metrics import known
from mprec.serving.loads import generate, generate_from
from mprec.serving.loadtest import (
    Contestant,
    Outcome,
    UnansweredError,
    capacity,
    compare,
    ratio_to_best,
)

__all__ = ["LOADS", "SHORT_LOADS", "best_capacity", "sweep", "warnings_of"]

#: Of the best static path's capacity: from nearly idle to three times too much.
LOADS = (0.1, 0.3, 0.6, 0.9, 1.2, 2.0, 3.0)
#: Idle, busy and too much: what takes a minute.
SHORT_LOADS = (0.3, 0.9, 2.0)

_SLOW = 1.5  # observed over profiled time, or the inverse, from which it is told
_LATE_SHARE = 0.1  # of the SLA, from which the generator's own lateness disturbs
_LEAST_SLAS = 8  # that a piece of the load should last: in a shorter one the queue hides overload
_CAPACITY_QUERIES = 300
_CAPACITY_REPEATS = 3


def best_capacity(
    dispatchers: Mapping[str, Contestant],
    dataset: ClickDataset,
    *,
    sizes: Sizes = LOGNORMAL_SIZES,
    seed: int = 0,
    **engine_options: Any,
) -> tuple[float, str]:
    """(queries per second, name) of the contestant with the greatest measured capacity.

    Medians of three runs after one that warms up. Contestants that fail a query are left out;
    ``UnansweredError`` if all do.
    """
    batches = [a.batch for a in generate(dataset, 1.0, _CAPACITY_QUERIES, sizes=sizes, seed=seed)]
    found, failures = {}, []
    for name, contestant in dispatchers.items():
        try:
            capacity(contestant, batches[: len(batches) // 4], **engine_options)
            found[name] = capacity(contestant, batches, repeats=_CAPACITY_REPEATS, **engine_options)
        except UnansweredError as error:
            failures.append(f"{name}: {error}")
    if not found:
        raise UnansweredError("no contestant answers: " + "; ".join(failures))
    best = max(found, key=found.get)
    return found[best], best


def sweep(
    dispatchers: Mapping[str, Contestant],
    dataset: ClickDataset,
    *,
    loads: Sequence[float] = LOADS,
    slas_s: Sequence[float] = (0.01,),
    arrivals: str = "poisson",
    seconds: float = 4.0,
    rounds: int = 3,
    sizes: Sizes = LOGNORMAL_SIZES,
    seed: int = 0,
    progress: Callable[[str, float], object] | None = None,
    **engine_options: Any,
) -> dict[str, Any]:
    """The contestants, of which the dispatcher is last, at each of ``loads`` and each of ``slas_s``.

    ``loads`` are shares of the best static path's measured capacity. ``seconds`` of load for each contestant,
    load and SLA, cut in ``rounds`` turns. ``arrivals`` as for :func:`mprec.arrivals.arrivals_from`.

    Returns a JSON-able dictionary: ``capacity_qps`` and ``capacity_of``; ``arrivals``, ``seconds``,
    ``rounds``; ``warnings``, sentences about what disturbs the figures; ``rows``, for each of which
    :meth:`Outcome.row`, and ``load``, ``qps`` (of the queries that came), ``sla_ms``, ``best_static``,
    ``ratio`` and ``ratio_error`` (of correct predictions per second to the best static path's, as
    :func:`mprec.serving.loadtest.ratio_to_best` says; None where unknown).
    """
    for name, values in (("loads", loads), ("slas_s", slas_s), ("seconds", [seconds])):
        if bad := [value for value in values if not 0 < value < math.inf]:
            raise ValueError(f"{name}: expected finite numbers above 0, got {bad[0]}")
        if not len(values):
            raise ValueError(f"{name}: expected at least one number, got none")
    *static, dispatcher = dispatchers
    limit, fastest = best_capacity(
        {name: dispatchers[name] for name in static}, dataset, sizes=sizes, seed=seed, **engine_options
    )
    rows, warnings = [], []
    cells = [(sla_s, load) for sla_s in slas_s for load in loads]
    for i, (sla_s, share) in enumerate(cells):
        # The same load for every SLA: only one thing differs at a time.
        seed_of_load = seed + 1 + i % len(loads)
        process = arrivals_from(arrivals, share * limit)
        load = generate_from(dataset, process, seconds, sizes=sizes, seed=seed_of_load)

        def report(name: str, done: float, share=share, sla_s=sla_s, i=i) -> None:
            if progress is not None:
                progress(f"load {share:g}, SLA {1e3 * sla_s:g} ms", (i + done) / len(cells))

        outcomes = compare(
            dispatchers,
            load,
            rounds=rounds,
            seconds=seconds,
            seed=seed_of_load,
            progress=report,
            sla_s=sla_s,
            **engine_options,
        )
        where = f"load {share:g}, SLA {1e3 * sla_s:g} ms"
        warnings += [f"{where}: {text}" for text in warnings_of(outcomes)]
        for name, outcome in outcomes.items():
            ratio, error, best = ratio_to_best(outcomes, name, static)
            rows.append(
                {
                    "load": share,
                    "qps": len(load) / seconds,
                    "sla_ms": 1e3 * sla_s,
                    **outcome.row(name),
                    "best_static": best,
                    "ratio": known(ratio),
                    "ratio_error": known(error),
                }
            )
    return {
        "capacity_qps": limit,
        "capacity_of": fastest,
        "arrivals": arrivals,
        "seconds": seconds,
        "rounds": rounds,
        "dispatcher": dispatcher,
        "warnings": warnings,
        "rows": rows,
    }


def warnings_of(outcomes: Mapping[str, Outcome]) -> list[str]:
    """What disturbs a comparison: calls that took other times than profiled, a late generator, pieces too
    short for their SLA, queries that failed. One sentence each. Whether the profile itself is wrong, only
    :mod:`mprec.serving.profile_check` can tell.
    """
    found = []
    slow: dict[str, list[float]] = {}
    for outcome in outcomes.values():
        for path, factor in outcome.slowness().items():
            slow.setdefault(path, []).append(factor)
    off = {path: float(np.median(factors)) for path, factors in slow.items()}
    off = {path: factor for path, factor in off.items() if not 1 / _SLOW <= factor <= _SLOW}
    if off:
        listed = ", ".join(f"{path} {factor:.2f}" for path, factor in off.items())
        found.append(
            f"under load calls took other times than profiled, which the dispatcher corrects for ({listed} "
            "times as long)"
        )
    for name, outcome in outcomes.items():
        late = float(np.percentile(outcome.generator_late_s, 99)) if outcome.generator_late_s else 0.0
        if late > _LATE_SHARE * outcome.sla_s:
            found.append(
                f"the generator of {name}'s queries was {1e3 * late:.1f} ms late at p99, which counts as "
                "latency"
            )
        if outcome.failed:
            found.append(f"{outcome.failed} of {outcome.queries} queries of {name} failed")
    outcome = next(iter(outcomes.values()))
    pieces = len(outcome.piece_rates)
    if pieces and outcome.seconds / pieces < _LEAST_SLAS * outcome.sla_s:
        found.append(
            f"a turn lasts {outcome.seconds / pieces:.2g} s, less than {_LEAST_SLAS} SLAs, so that queues "
            "hide overload; use more seconds"
        )
    return found
