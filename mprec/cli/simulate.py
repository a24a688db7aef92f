"""``mprec simulate``: what other devices would buy, in virtual time."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.table import Table

from mprec.arrivals import QuerySizes
from mprec.cli._setup import reporter, say, size_in_bytes
from mprec.dispatch import Profile
from mprec.report.terminal import terminal
from mprec.simulate.contest import capacity, compare, contestants, described, measured, reference
from mprec.simulate.devices import device_names, load_device
from mprec.simulate.loads import ARRIVALS, LEAST_SLAS, draw
from mprec.simulate.shapes import load_shape
from mprec.simulate.simulator import SimulatedExecutor

_LOADS = (0.25, 0.5, 1.0, 2.0, 4.0)  # of what the reference can serve


def add_arguments(parser: argparse.ArgumentParser) -> None:
    system = parser.add_argument_group("system: at least one device or profile")
    system.add_argument(
        "--devices",
        default="",
        metavar="NAME,NAME",
        help=f"descriptions: files (.json) or {', '.join(device_names())}",
    )
    system.add_argument(
        "--shape", default="kaggle", help="what the devices serve: kaggle, terabyte or a file (kaggle)"
    )
    system.add_argument(
        "--memory",
        nargs="+",
        default=[],
        metavar="NAME=SIZE",
        help="memory of a device instead of its description's, as in gpu:v100=200MB",
    )
    system.add_argument(
        "--profile",
        nargs="+",
        type=Path,
        default=[],
        metavar="FILE",
        help="profiles as executors; the quality of their paths is taken as the share of correct predictions",
    )
    load = parser.add_argument_group("load")
    load.add_argument("--sla-ms", type=float, nargs="+", default=[10.0, 50.0], help="(10 50)")
    load.add_argument(
        "--loads",
        type=float,
        nargs="+",
        metavar="QPS",
        help="queries per second (default: 1/4 to 4 times what the table on the first CPU can serve)",
    )
    load.add_argument("--arrivals", choices=ARRIVALS, default="poisson", help="(poisson)")
    load.add_argument("--seconds", type=float, default=10.0, help="of virtual time for each load (10)")
    load.add_argument(
        "--most-queries",
        type=int,
        default=4000,
        help="loads are shortened to about so many, but not to less than eight SLAs (4000)",
    )
    load.add_argument("--size-mean", type=float, default=128.0, help="samples per query, mean (128)")
    load.add_argument("--size-sigma", type=float, default=1.0, help="of its logarithm (1.0)")
    load.add_argument("--max-batch", type=int, default=2048, help="samples scored together at most (2048)")
    load.add_argument("--noise", type=float, default=0.05, help="of the logarithm of a call's time (0.05)")
    load.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, metavar="PICTURE", help="also draw a picture, as in out.png")


def run(args: argparse.Namespace) -> int:
    for name, values in (("--sla-ms", args.sla_ms), ("--loads", args.loads or [])):
        if wrong := [value for value in values if not 0 < value < float("inf")]:
            raise ValueError(f"{name}: expected finite numbers above 0, got {wrong[0]:g}")
    if args.max_batch < 1 or args.most_queries < 1:
        raise ValueError("--max-batch and --most-queries: expected at least 1")
    if args.seconds < (least := LEAST_SLAS * max(args.sla_ms) / 1e3):
        raise ValueError(f"--seconds: expected at least {LEAST_SLAS} SLAs, {least:g} s, got {args.seconds:g}")
    executors, about = _executors(args)
    base = reference(executors)
    sizes = QuerySizes(args.size_mean, args.size_sigma)
    loads = args.loads
    if not loads:
        most = capacity(contestants(executors)[base], args.size_mean, min(args.sla_ms) / 1e3)
        loads = [share * most for share in _LOADS]
    rows, report = [], reporter()
    for i, (sla_ms, qps) in enumerate((s, q) for s in args.sla_ms for q in loads):
        report(f"SLA {sla_ms:g} ms, {qps:.0f} queries/s", i / (len(args.sla_ms) * len(loads)))
        times, drawn = draw(
            args.arrivals,
            qps,
            args.seconds,
            sizes=sizes,
            most=args.most_queries,
            least_s=LEAST_SLAS * sla_ms / 1e3,
            seed=args.seed,
        )
        contest = compare(
            executors,
            times,
            drawn,
            sla_s=sla_ms / 1e3,
            qps=qps,
            max_batch=args.max_batch,
            noise=args.noise,
            seed=args.seed,
        )
        rows += [row.to_dict() for row in contest]
    result = {
        "simulated": True,
        "executors": about,
        "reference": base,
        "arrivals": args.arrivals,
        "seed": args.seed,
        "rows": rows,
    }
    if args.output:
        from mprec.simulate.picture import draw as draw_picture  # matplotlib: only where it is asked for

        draw_picture(rows, " + ".join(executor.name for executor in executors), args.output)
    if args.json:
        print(json.dumps(result))
        return 0
    console = terminal()
    for sla_ms in args.sla_ms:
        for qps in loads:
            chosen = [row for row in rows if row["sla_ms"] == sla_ms and row["qps"] == qps]
            console.print(contest_table(chosen, base))
    return 0


def _executors(args: argparse.Namespace) -> tuple[list[SimulatedExecutor], list[dict]]:
    """What serves, and what it is, for the result."""
    memory = {}
    for text in args.memory:
        name, equals, size = text.rpartition("=")
        if not equals:
            raise ValueError(f"--memory: expected NAME=SIZE, got {text!r}")
        try:
            memory[name] = size_in_bytes(size)
        except argparse.ArgumentTypeError as error:
            raise ValueError(f"--memory: {error}") from error
    executors, about = [], []
    names = [name.strip() for name in args.devices.split(",") if name.strip()]
    if names:
        shape, quality = load_shape(args.shape)
    for name in names:
        device = load_device(name)
        if (size := memory.pop(name, None)) is not None:
            device = dataclasses.replace(device, memory_bytes=size)
        executor = described(device, shape, quality, args.max_batch)
        if executor is None:
            say(f"{device.name}: no representation of {shape.name} fits its {device.memory_bytes:.3g} bytes")
            continue
        executors.append(executor)
        held = [path.name for path in executor.paths]
        about.append({"name": device.name, "title": device.title, "described": True, "paths": held})
    if memory:
        raise ValueError(f"--memory: expected a device of --devices, got {next(iter(memory))!r}")
    for file in args.profile:
        profile = Profile.load(file)
        executor = measured(profile, file.stem, args.max_batch)
        executors.append(executor)
        title = str(profile.fingerprint.get("cpu"))
        held = [path.name for path in executor.paths]
        about.append({"name": file.stem, "title": title, "described": profile.simulated, "paths": held})
    if not executors:
        raise ValueError("--devices or --profile: expected at least one that holds a path, got none")
    return executors, about


def contest_table(rows: Sequence[dict], base: str) -> Table:
    """One load at one SLA, for a terminal."""
    first = rows[0]
    table = Table(
        title=f"simulated: {first['qps']:.0f} queries/s, SLA {first['sla_ms']:g} ms; ratio to {base}",
        box=box.SIMPLE_HEAD,
        title_justify="left",
        pad_edge=False,
        collapse_padding=True,
    )
    table.add_column("contestant", max_width=20)
    for heading in ("correct/s", "ratio", "missed", "p99 ms"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("answered by")
    for row in rows:
        mix = sorted(row["mix"].items(), key=lambda item: -item[1])
        table.add_row(
            row["contestant"],
            f"{row['correct_per_s']:,.0f}",
            "-" if row["ratio"] is None else f"{row['ratio']:.2f}",
            f"{100 * row['missed']:.1f} %",
            "-" if row["p99_ms"] is None else f"{row['p99_ms']:.2f}",
            "\n".join(f"{100 * share:.0f} % {name}" for name, share in mix if share >= 0.005),
        )
    return table
