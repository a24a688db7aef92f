"""``mprec profile``: measure paths on this machine."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from mprec.cli._setup import add_path_arguments, batch_sizes, held_out, load_paths, reporter, say
from mprec.dispatch import BATCH_SIZES, Profile
from mprec.dispatch.profile import default_file
from mprec.paths import sampler
from mprec.report import latency
from mprec.report.terminal import terminal


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_path_arguments(parser, required=False)
    parser.add_argument(
        "--batch-sizes", type=batch_sizes, default=BATCH_SIZES, metavar="N,N,...", help="1,2,4,...,2048"
    )
    parser.add_argument("--seconds", type=float, default=20.0, help="time to spend (20)")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="default: a file per machine in the cache folder"
    )
    parser.add_argument(
        "--show",
        nargs="?",
        const="",
        metavar="FILE",
        help="draw the latency curves and where they cross, of FILE or of what is measured now",
    )
    parser.add_argument("--png", type=Path, metavar="FILE", help="with --show, the picture to write")


def run(args: argparse.Namespace) -> int:
    if args.show:
        profile, file = Profile.load(args.show), Path(args.show)
    else:
        if not args.checkpoints or not args.data:
            raise ValueError("--checkpoints and --data are needed to measure (or --show FILE)")
        paths = load_paths(args)
        file = args.output or default_file(paths)
        file.parent.mkdir(parents=True, exist_ok=True)  # rather now than after measuring
        profile = Profile.measure(
            paths, sampler(held_out(args)), args.batch_sizes, seconds=args.seconds, progress=reporter()
        )
        profile.save(file)
    picture = None
    if args.show is not None:
        picture = args.png or file.with_suffix(".png")
        latency.draw(profile, picture)
    if args.json:
        print(json.dumps({"file": str(file), "picture": picture and str(picture), **profile.to_dict()}))
        return 0
    console = terminal()
    console.print(latency.table(profile))
    if args.show is not None:
        console.print(latency.crossover_table(profile))
        console.print(latency.text_chart(profile, console.width), highlight=False)
    if profile.prediction_error:
        error = profile.prediction_error
        say(
            f"predictions between grid points (batch sizes {', '.join(map(str, error['batch_sizes']))}): "
            f"median error {100 * error['median']:.1f} %, p95 {100 * error['p95']:.1f} %"
        )
    say(f"profile: {file}" + (f", picture: {picture}" if picture else ""))
    return 0
