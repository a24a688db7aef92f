"""``mprec loadtest``: the dispatcher against every static path, from an idle machine to overload."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from mprec.arrivals import QuerySizes, arrivals_from
from mprec.cli._setup import (
    add_path_arguments,
    add_profile_arguments,
    get_profile,
    held_out,
    load_paths,
    reporter,
    say,
)
from mprec.metrics import known
from mprec.paths import sampler
from mprec.report.load_tables import load_table, loadgen_table, sweep_tables, with_error
from mprec.report.sweep import draw
from mprec.report.terminal import terminal
from mprec.serving.loadgen import run_loadgen
from mprec.serving.loads import generate, generate_from
from mprec.serving.loadsweep import LOADS, SHORT_LOADS, sweep, warnings_of
from mprec.serving.loadtest import (
    UnansweredError,
    compare,
    contestants,
    engine_for,
    find_max_qps,
    ratio_to_best,
    replay,
    suggested_qps,
)
from mprec.serving.profile_check import profile_drift, profile_warnings

NOBODY_ANSWERED = 3  # exit status
_MOST_WARNINGS = 5  # printed
_SWITCH_S = 5e-4  # after which a thread that computes lets others have Python's interpreter lock


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_path_arguments(parser)
    add_profile_arguments(parser)
    load = parser.add_argument_group("load")
    load.add_argument("--sla-ms", type=float, default=10.0, help="latency target of every query (10)")
    load.add_argument(
        "--slas-ms", type=_numbers, metavar="MS,MS,...", help="instead: a sweep over several latency targets"
    )
    load.add_argument(
        "--loads",
        type=_numbers,
        default=SHORT_LOADS,
        metavar="X,X,...",
        help="in shares of what the fastest path can do, which is measured "
        f"({','.join(f'{load:g}' for load in SHORT_LOADS)}; all: {','.join(f'{load:g}' for load in LOADS)})",
    )
    load.add_argument(
        "--seconds", type=float, default=4.0, help="of each load and target for each contestant (4)"
    )
    load.add_argument("--qps", type=float, help="instead of several loads one, of so many queries per second")
    load.add_argument("--queries", type=int, default=1000, help="with --qps, about so many (1000)")
    load.add_argument(
        "--arrivals",
        default="poisson",
        metavar="KIND",
        help="poisson, bursty, diurnal, or trace:FILE, a time in seconds on each line, scaled (poisson)",
    )
    load.add_argument("--size-mean", type=float, default=128.0, help="samples per query, mean (128)")
    load.add_argument("--size-sigma", type=float, default=1.0, help="of its logarithm (1.0)")
    load.add_argument("--rounds", type=int, default=4, help="turns that the contestants take (4)")
    load.add_argument("--seed", type=int, default=0)
    load.add_argument(
        "--max-qps",
        action="store_true",
        help="one load; also search each contestant's highest with at most 1 %% of the queries not in time",
    )
    load.add_argument(
        "--driver",
        choices=("mprec", "loadgen"),
        default="mprec",
        help="loadgen: let MLPerf LoadGen (pip install mlcommons-loadgen) issue the queries and judge",
    )
    parser.add_argument(
        "--output", type=Path, metavar="FOLDER", help="write result.json there, and sweep.png of a sweep"
    )
    engine = parser.add_argument_group("engine")
    engine.add_argument(
        "--processes",
        type=int,
        default=0,
        metavar="N",
        help="executors: N processes of one thread each (with --threads 1) instead of this process (0)",
    )
    engine.add_argument("--max-batch", type=int, default=2048, help="samples scored together at most (2048)")
    engine.add_argument("--no-admission", action="store_true", help="answer hopeless queries late")


def run(args: argparse.Namespace) -> int:
    for name, value in (("--sla-ms", args.sla_ms), ("--seconds", args.seconds), ("--qps", args.qps)):
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{name}: expected a finite number above 0, got {value}")
    for name, value, least in (
        ("--queries", args.queries, 1),
        ("--rounds", args.rounds, 1),
        ("--processes", args.processes, 0),
    ):
        if value < least:
            raise ValueError(f"{name}: expected at least {least}, got {value}")
    single = args.qps is not None or args.max_qps or args.driver == "loadgen"
    if single and args.slas_ms is not None:
        raise ValueError("--slas-ms: expected a sweep, got --qps, --max-qps or --driver loadgen, of one load")
    if args.driver == "loadgen" and args.arrivals != "poisson":
        raise ValueError(f"--arrivals: expected poisson with --driver loadgen, got {args.arrivals!r}")
    arrivals_from(args.arrivals, 1.0)  # a bad one is refused before anything is measured
    paths = load_paths(args)
    test = held_out(args)
    profile = get_profile(args, paths, test)
    options = {"max_batch": args.max_batch, "admission": not args.no_admission}
    sys.setswitchinterval(_SWITCH_S)
    checked = profile_warnings(profile_drift(paths, profile, sampler(test), seed=args.seed + 1))
    dispatchers = contestants(paths, profile, processes=args.processes)
    sizes = QuerySizes(args.size_mean, args.size_sigma)
    try:
        if not single:
            return _sweep(args, dispatchers, test, sizes, options, checked)
        options["sla_s"] = args.sla_ms / 1e3
        qps = args.qps
        if qps is None:
            qps = suggested_qps(dispatchers, test, sizes=sizes, seed=args.seed, **options)
        if args.driver == "loadgen":
            load = generate(test, qps, args.queries, sizes=sizes, seed=args.seed)
            return _run_loadgen(args, dispatchers, load, qps, options, checked)
        return _single(args, dispatchers, test, sizes, qps, options, checked)
    except UnansweredError as error:
        say(str(error))
        return NOBODY_ANSWERED


def _sweep(args, dispatchers, test, sizes, options, checked) -> int:
    result = sweep(
        dispatchers,
        test,
        loads=args.loads,
        slas_s=[sla_ms / 1e3 for sla_ms in args.slas_ms or (args.sla_ms,)],
        arrivals=args.arrivals,
        seconds=args.seconds,
        rounds=args.rounds,
        sizes=sizes,
        seed=args.seed,
        progress=reporter(),
        **options,
    )
    result = {"data": test.name, **result, "warnings": checked + result["warnings"]}
    _give(args, result, sweep_tables(result), result["warnings"])
    if args.output is not None:
        draw(result, args.output / "sweep.png")
    return _status(result["rows"])


def _single(args, dispatchers, test, sizes, qps, options, checked) -> int:
    seconds = args.queries / qps
    process = arrivals_from(args.arrivals, qps)
    load = generate_from(test, process, seconds, sizes=sizes, seed=args.seed)
    outcomes = compare(
        dispatchers, load, rounds=args.rounds, seconds=seconds, seed=args.seed, progress=reporter(), **options
    )
    rows = [outcome.row(name) for name, outcome in outcomes.items()]
    if args.max_qps:
        for row in rows:
            say(f"highest load of {row['path']} ...")
            row["max_qps"] = _max_qps(dispatchers[row["path"]], args, test, sizes, qps, options)
    ratio, error, best = ratio_to_best(outcomes)
    result = {
        "data": test.name,
        "sla_ms": args.sla_ms,
        "qps": qps,
        "arrivals": args.arrivals,
        "queries": len(load),
        "samples": sum(len(arrival.batch) for arrival in load),
        "best_static": best,
        "ratio": known(ratio),
        "ratio_error": known(error),
        "warnings": checked + warnings_of(outcomes),
        "rows": rows,
    }
    _give(args, result, [load_table(result)], result["warnings"])
    if result["ratio"] is not None and not args.json:
        say(f"dispatcher / {best}, the best static path: {with_error(ratio, result['ratio_error'], '.3f')}")
    return _status(rows)


def _give(args, result: dict, tables: list, warnings: Sequence[str] = ()) -> None:
    """Print the result, and write it where ``--output`` says."""
    if args.output is not None:
        args.output.mkdir(parents=True, exist_ok=True)
        (args.output / "result.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
    if args.json:
        print(json.dumps(result))
    else:
        for table in tables:
            terminal().print(table)
    for text in warnings[:_MOST_WARNINGS]:
        say(f"warning: {text}")
    if len(warnings) > _MOST_WARNINGS:
        say(f"warning: {len(warnings) - _MOST_WARNINGS} more, all of them in the JSON")


def _status(rows) -> int:
    """Whether anybody was answered at all."""
    if any(row["p50_ms"] is not None for row in rows):
        return 0
    say("every query of every contestant was refused or failed")
    return NOBODY_ANSWERED


def _numbers(text: str) -> tuple[float, ...]:
    """``0.1,0.9`` -> (0.1, 0.9); ``all`` -> every load."""
    if text == "all":
        return LOADS
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers joined by commas, got {text!r}") from None
    if not all(0 < number < math.inf for number in numbers):
        raise argparse.ArgumentTypeError(f"expected finite numbers above 0, got {text!r}")
    return numbers


def _run_loadgen(args, dispatchers, load, qps, options, checked) -> int:
    queries, rows = [arrival.batch for arrival in load], []
    for name, dispatcher in dispatchers.items():
        say(f"{name} ...")
        with engine_for(dispatcher, **options) as engine:
            result = run_loadgen(engine, queries, qps=qps, seconds=args.queries / qps)
        rows.append({"path": name, **asdict(result)})
    result = {"sla_ms": args.sla_ms, "qps": qps, "warnings": checked, "rows": rows}
    _give(args, result, [loadgen_table(rows, qps, args.sla_ms)], checked)
    if all(row["refused"] + row["failed"] >= row["queries"] for row in rows):
        say("every query of every contestant was refused or failed")
        return NOBODY_ANSWERED
    return 0


def _max_qps(contestant, args, test, sizes, qps, options) -> float:
    queries = max(100, args.queries // 4)

    def violations(rate: float) -> float:
        load = generate(test, rate, queries, sizes=sizes, seed=args.seed)
        with engine_for(contestant, **options) as engine:
            return replay(engine, load).violations

    return find_max_qps(violations, qps)
