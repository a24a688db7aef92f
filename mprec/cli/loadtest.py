"""``mprec loadtest``: the dispatcher against every static path, under one load."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict

from rich import box
from rich.console import Console
from rich.table import Table

from mprec.cli._setup import (
    add_path_arguments,
    add_profile_arguments,
    get_profile,
    held_out,
    load_paths,
    reporter,
    say,
)
from mprec.dispatch import Dispatcher
from mprec.serving import Engine
from mprec.serving.loadgen import run_loadgen
from mprec.serving.loadtest import (
    QuerySizes,
    compare,
    contestants,
    engine_for,
    find_max_qps,
    generate,
    ratio_to_best,
    replay,
    suggested_qps,
    sweep,
)

NOBODY_ANSWERED = 3  # exit status
_SWITCH_S = 5e-4  # after which a thread that computes lets others have Python's interpreter lock


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_path_arguments(parser)
    add_profile_arguments(parser)
    load = parser.add_argument_group("load")
    load.add_argument("--sla-ms", type=float, default=10.0, help="latency target of every query (10)")
    load.add_argument("--qps", type=float, help="queries per second (default: what strains the slower paths)")
    load.add_argument(
        "--loads",
        type=_shares,
        metavar="X,X,...",
        help="instead: several loads, in shares of what the fastest contestant can do, such as 0.1,0.6,0.9,3",
    )
    load.add_argument(
        "--seconds", type=float, default=2.0, help="with --loads, of each load for each contestant (2)"
    )
    load.add_argument("--queries", type=int, default=1000, help="(1000)")
    load.add_argument("--size-mean", type=float, default=128.0, help="samples per query, mean (128)")
    load.add_argument("--size-sigma", type=float, default=1.0, help="of its logarithm (1.0)")
    load.add_argument("--rounds", type=int, default=4, help="turns that the contestants take (4)")
    load.add_argument("--seed", type=int, default=0)
    load.add_argument(
        "--max-qps",
        action="store_true",
        help="also search each contestant's highest load with at most 1 %% of the queries not in time",
    )
    load.add_argument(
        "--driver",
        choices=("mprec", "loadgen"),
        default="mprec",
        help="loadgen: let MLPerf LoadGen (pip install mlcommons-loadgen) issue the queries and judge",
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
    if not args.sla_ms > 0:
        raise ValueError(f"--sla-ms must be positive, got {args.sla_ms}")
    paths = load_paths(args)
    test = held_out(args)
    profile = get_profile(args, paths, test)
    sizes = QuerySizes(args.size_mean, args.size_sigma)
    options = {
        "sla_s": args.sla_ms / 1e3,
        "max_batch": args.max_batch,
        "admission": not args.no_admission,
    }
    if args.processes < 0:
        raise ValueError(f"--processes must not be negative, got {args.processes}")
    sys.setswitchinterval(_SWITCH_S)
    dispatchers = contestants(paths, profile, processes=args.processes)
    if args.loads is not None:
        return _sweep(args, dispatchers, test, sizes, options)
    qps = args.qps
    if qps is None:
        qps = suggested_qps(dispatchers, test, sizes=sizes, seed=args.seed, **options)
    load = generate(test, qps, args.queries, sizes=sizes, seed=args.seed)
    if args.driver == "loadgen":
        return _run_loadgen(args, dispatchers, load, qps, options)
    outcomes = compare(dispatchers, load, rounds=args.rounds, progress=reporter(), **options)
    rows = [outcome.row(name) for name, outcome in outcomes.items()]
    if args.max_qps:
        for row in rows:
            say(f"highest load of {row['path']} ...")
            row["max_qps"] = _max_qps(row["path"], args, paths, profile, test, sizes, qps, options)
    result = {
        "data": test.name,
        "sla_ms": args.sla_ms,
        "qps": qps,
        "queries": args.queries,
        "samples": sum(len(arrival.batch) for arrival in load),
        "rows": rows,
    }
    if args.json:
        print(json.dumps(result))
    else:
        Console().print(load_table(result))
        ratio, error, best = ratio_to_best(outcomes)
        say(f"dispatcher / {best}, the best static path: {ratio:.3f} +- {error:.3f}")
    return _status(rows)


def _status(rows) -> int:
    """Whether anybody was answered at all."""
    if any(row["p50_ms"] is not None for row in rows):
        return 0
    say("every query of every contestant was refused or failed")
    return NOBODY_ANSWERED


def _sweep(args, dispatchers, test, sizes, options) -> int:
    capacity, entries = sweep(
        dispatchers,
        test,
        loads=args.loads,
        seconds=args.seconds,
        rounds=args.rounds,
        sizes=sizes,
        seed=args.seed,
        progress=reporter(),
        **options,
    )
    if args.json:
        result = {"data": test.name, "sla_ms": args.sla_ms, "capacity_qps": capacity, "loads": entries}
        print(json.dumps(result))
    else:
        Console().print(sweep_table(capacity, entries, args.sla_ms))
    return _status([row for entry in entries for row in entry["rows"]])


def sweep_table(capacity: float, entries: list[dict], sla_ms: float) -> Table:
    """Correct predictions per second (and the share of queries missed) of every contestant at every load."""
    table = Table(
        title=f"thousand correct/s (missed), SLA {sla_ms:g} ms, capacity {capacity:.0f} queries/s",
        box=box.SIMPLE_HEAD,
        title_justify="left",
        pad_edge=False,
        collapse_padding=True,
    )
    table.add_column("load", justify="right")
    for row in entries[0]["rows"]:
        table.add_column(row["path"], justify="right")
    table.add_column("/ best static", justify="right")
    for entry in entries:
        cells = [
            f"{row['correct_per_s'] / 1e3:.1f} ({100 * row['violations']:.0f} %)" for row in entry["rows"]
        ]
        table.add_row(f"{entry['load']:g}", *cells, f"{entry['ratio']:.3f} +- {entry['ratio_error']:.3f}")
    return table


def _shares(text: str) -> tuple[float, ...]:
    """``0.1,0.9`` -> (0.1, 0.9)."""
    try:
        shares = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers joined by commas, got {text!r}") from None
    if not all(0 < share < float("inf") for share in shares):
        raise argparse.ArgumentTypeError(f"loads must be positive and finite, got {text!r}")
    return shares


def _run_loadgen(args, dispatchers, load, qps, options) -> int:
    queries, rows = [arrival.batch for arrival in load], []
    for name, dispatcher in dispatchers.items():
        say(f"{name} ...")
        with engine_for(dispatcher, **options) as engine:
            result = run_loadgen(engine, queries, qps=qps, seconds=args.queries / qps)
        rows.append({"path": name, **asdict(result)})
    if args.json:
        print(json.dumps({"sla_ms": args.sla_ms, "qps": qps, "rows": rows}))
        return _loadgen_status(rows)
    table = Table(title=f"MLPerf LoadGen, Server scenario, {qps:.0f} queries/s, SLA {args.sla_ms:g} ms")
    for heading in ("path", "verdict", "p99 ms", "refused", "failed", "why"):
        table.add_column(heading)
    for row in rows:
        p99_ms = float(row["summary"]["99.00 percentile latency (ns)"]) / 1e6
        verdict = "VALID" if row["valid"] else "INVALID"
        counts = str(row["refused"]), str(row["failed"])
        table.add_row(row["path"], verdict, f"{p99_ms:.2f}", *counts, row["reason"])
    Console().print(table)
    return _loadgen_status(rows)


def _loadgen_status(rows) -> int:
    if all(row["refused"] + row["failed"] >= row["queries"] for row in rows):
        say("every query of every contestant was refused or failed")
        return NOBODY_ANSWERED
    return 0


def _max_qps(name, args, paths, profile, test, sizes, qps, options) -> float:
    queries = max(100, args.queries // 4)

    def violations(rate: float) -> float:
        chosen = [path for path in paths if path.name == name] or paths
        load = generate(test, rate, queries, sizes=sizes, seed=args.seed)
        with Engine(Dispatcher(chosen, profile), **options) as engine:
            return replay(engine, load).violations

    return find_max_qps(violations, qps)


def load_table(result: dict) -> Table:
    """The result for a terminal."""
    table = Table(
        title=f"{result['data']}: {result['queries']} queries, {result['samples']} samples, "
        f"{result['qps']:.0f} queries/s, SLA {result['sla_ms']:g} ms",
        box=box.SIMPLE_HEAD,
        title_justify="left",
        pad_edge=False,
        collapse_padding=True,
    )
    table.add_column("path", no_wrap=True)
    headings = ["p50 ms", "p95 ms", "p99 ms", "missed", "accuracy", "correct/s"]
    searched = "max_qps" in result["rows"][0]
    for heading in headings + ["max qps"] * searched:
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("answered by", no_wrap=True)
    for row in result["rows"]:
        chosen = "\n".join(f"{name} {100 * share:.0f} %" for name, share in row["chosen"].items())
        table.add_row(
            row["path"],
            *("-" if row[key] is None else f"{row[key]:.2f}" for key in ("p50_ms", "p95_ms", "p99_ms")),
            f"{100 * row['violations']:.1f} %",
            "-" if row["accuracy"] is None else f"{row['accuracy']:.4f}",
            f"{row['correct_per_s']:,.0f}",
            *([f"{row['max_qps']:.0f}"] if searched else []),
            chosen,
        )
    return table
