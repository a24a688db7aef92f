"""``mprec derive``: from one trained model to a bundle of measured paths."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.table import Table

from mprec import checkpoint
from mprec.cli._setup import parts_of, reporter, say, use_threads
from mprec.derive import derive, kept
from mprec.derive.derive import BATCH_SIZES, Derived
from mprec.derive.quality import METRICS
from mprec.paths import bundle
from mprec.report.terminal import format_bytes, terminal


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, metavar="MODEL", help="checkpoint, written by mprec train")
    parser.add_argument("--data", required=True, metavar="SPEC", help="the data that it was trained on")
    parser.add_argument(
        "--output", required=True, type=Path, metavar="FOLDER", help="bundle to write, a folder"
    )
    parser.add_argument(
        "--recipes",
        nargs="+",
        metavar="RECIPE",
        help="table, table[float16|int8|int4], dhe, dhe:PART (decoders in a PART-th of the rows' bytes), "
        "low_rank:RANK, low_rank:RANK[float16|int8], each also with /int8 or /bfloat16, of the dense layers, "
        "behind it, as the trained path's name (default: what suits the model)",
    )
    parser.add_argument(
        "--metric",
        choices=tuple(METRICS),
        default="auc",
        help="of the validation part, by which paths are compared (%(default)s)",
    )
    parser.add_argument("--all", action="store_true", help="keep paths that another one matches, too")
    parser.add_argument(
        "--seconds", type=float, default=10.0, help="time for measuring latencies (%(default)g)"
    )
    parser.add_argument("--threads", type=int, default=1, help="torch's threads (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")


def run(args: argparse.Namespace) -> int:
    use_threads(args.threads)
    if args.output.exists() and not args.output.is_dir():
        raise ValueError(f"--output: {args.output} is no folder")
    model, metadata = checkpoint.load(args.model)
    parts = parts_of(args.model, args.data)
    found = derive(
        model,
        metadata,
        parts,
        recipes=args.recipes,
        metric=args.metric,
        seconds=args.seconds,
        seed=args.seed,
        say=say,
        progress=reporter(),
    )
    members = [each.member() for each in found] if args.all else kept(found)
    metadata = {"derived_from": str(args.model), "metric": args.metric, **metadata}
    bundle.save(args.output, members, metadata, checkpoint.vocabularies(args.model))
    result = {
        "bundle": str(args.output),
        "bytes": sum(file.stat().st_size for file in args.output.iterdir()),
        "metric": args.metric,
        "kept": [member.name for member in members],
        "paths": [
            {"name": each.name, "representation": each.representation, "dense": each.dense, **each.facts()}
            for each in found
        ],
    }
    if args.json:
        print(json.dumps(result))
        return 0
    console = terminal()
    console.print(derived_table(found, f"{args.model}: test part ({len(parts[2])} rows)"))
    print(f"{len(members)} of {len(found)} paths in {args.output}, {format_bytes(result['bytes'])}")
    return 0


def derived_table(found: Sequence[Derived], title: str) -> Table:
    """Quality on the test part with standard errors, size and latency of each path, for a terminal.

    Differences are to the model that the paths were derived from.
    """
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    table.add_column("path", overflow="fold")
    for heading in ("AUC", "difference", "log-loss", "accuracy", "embedding"):
        table.add_column(heading, justify="right", overflow="fold")
    for batch in BATCH_SIZES:
        table.add_column(f"ms @{batch}", justify="right", overflow="fold")
    table.add_column("no better than", overflow="fold")
    for each in found:
        quality, difference = each.quality["test"], each.difference["test"]["auc"]
        table.add_row(
            each.name,
            f"{quality['auc'].value:.4f} ±{quality['auc'].error:.4f}",
            f"{difference.value:+.4f} ±{difference.error:.4f}" if difference.error else "",
            f"{quality['log_loss'].value:.4f} ±{quality['log_loss'].error:.4f}",
            f"{quality['accuracy'].value:.4f} ±{quality['accuracy'].error:.4f}",
            format_bytes(each.nbytes),
            *(f"{1e3 * each.seconds[batch]:.3f}" for batch in BATCH_SIZES),
            each.dominated_by or "",
            style=None if each.dominated_by is None else "dim",
        )
    return table
