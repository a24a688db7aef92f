"""What the commands that run trained paths have in common: checkpoints, data, profile."""

from __future__ import annotations

import argparse
import functools
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from mprec import data
from mprec.data import ClickDataset
from mprec.dispatch import BATCH_SIZES, Profile, ScoringPath
from mprec.paths import (
    can_cache,
    inputs_of,
    paths_from_checkpoints,
    sampler,
    vocabularies_of,
    with_cache,
)

__all__ = [
    "add_path_arguments",
    "add_profile_arguments",
    "batch_sizes",
    "get_profile",
    "held_out",
    "load_checked",
    "load_for",
    "load_paths",
    "parts_of",
    "reporter",
    "say",
    "size_in_bytes",
    "use_threads",
]


def say(message: str) -> None:
    """A line for people, on standard error."""
    print(message, file=sys.stderr, flush=True)


def reporter() -> Callable[[str, float], None]:
    """Progress ``(what, share done)``: a counter on a terminal, a line per new ``what`` elsewhere and one
    every half minute; with the seconds that are left, once a few have passed."""
    terminal = sys.stderr.isatty()
    before, began, told = None, 0.0, 0.0

    def report(what: str, share: float) -> None:
        nonlocal before, began, told
        now = time.monotonic()
        if what != before:
            before, began, told = what, now, now
            if not terminal:
                say(f"{what} ...")
        passed = now - began
        left = f", {passed * (1 - share) / share:.0f} s left" if passed > 3 and 0 < share < 1 else ""
        if terminal:
            end = "\n" if share >= 1 else ""
            print(f"\r{what:<28} {100 * share:3.0f} %{left:<14}", end=end, file=sys.stderr, flush=True)
        elif now - told > 30:
            say(f"{what}: {100 * share:.0f} %{left}")
            told = now

    return report


def batch_sizes(text: str) -> tuple[int, ...]:
    """``1,2,4`` -> (1, 2, 4)."""
    try:
        sizes = tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers joined by commas, got {text!r}") from None
    if sizes[0] < 1:
        raise argparse.ArgumentTypeError(f"batch sizes: expected at least 1, got {sizes[0]}")
    return sizes


_UNITS = {"": 1, "b": 1} | {
    prefix + suffix: base**power
    for power, prefix in enumerate("kmgt", start=1)
    for suffix, base in (("b", 1000), ("ib", 1024))
}


def size_in_bytes(text: str) -> int:
    """``64MiB``, ``2GB``, ``1.5 GiB``, ``4096`` -> bytes."""
    match = re.fullmatch(r"\s*([0-9.]+)\s*([a-z]*)\s*", text.lower())
    try:
        return int(float(match[1]) * _UNITS[match[2]])
    except (TypeError, KeyError, ValueError):
        raise argparse.ArgumentTypeError(f"expected a size such as 64MiB or 2GB, got {text!r}") from None


def add_path_arguments(
    parser: argparse.ArgumentParser, *, required: bool = True, needs_data: bool | None = None
) -> None:
    """``needs_data`` says whether ``--data`` is required too (None: as ``required``)."""
    group = parser.add_argument_group("paths")
    group.add_argument(
        "--checkpoints",
        nargs="+",
        type=Path,
        required=required,
        metavar="FILE",
        help="written by mprec train, or bundles by mprec derive, for the same data",
    )
    group.add_argument(
        "--data",
        required=required if needs_data is None else needs_data,
        metavar="SPEC",
        help="as for mprec train",
    )
    group.add_argument(
        "--quality",
        choices=("auc", "accuracy"),
        default="accuracy",
        help="validation metric to prefer (accuracy: what correct predictions per second count)",
    )
    group.add_argument(
        "--cache",
        type=size_in_bytes,
        metavar="SIZE",
        help="also offer every path that has deep hash embeddings with a cache of hot IDs of SIZE",
    )
    group.add_argument("--threads", type=int, help="torch's threads (default: torch's own choice)")


def add_profile_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("profile")
    group.add_argument(
        "--profile", type=Path, metavar="FILE", help="written by mprec profile; measured if not usable"
    )
    group.add_argument(
        "--profile-seconds", type=float, default=20.0, metavar="S", help="time for measuring one (20)"
    )


def use_threads(threads: int | None) -> None:
    """``--threads``: torch's, from now on (None: as they are)."""
    if threads is None:
        return
    if threads < 1:
        raise ValueError(f"--threads: expected at least 1, got {threads}")
    torch.set_num_threads(threads)


def load_paths(args: argparse.Namespace) -> list[ScoringPath]:
    """The paths of ``--checkpoints``; sets ``--threads``."""
    use_threads(args.threads)
    paths = paths_from_checkpoints(args.checkpoints, metric=args.quality)
    if args.cache is not None:
        counts = None  # without a log the cache fills as it serves
        if args.data is not None:
            train, *_ = parts_of(args.checkpoints[0], args.data)
            counts = {name: train.counts(name) for name, _ in train.features}
        hashed = [p for p in paths if can_cache(p)]
        if not hashed:
            raise ValueError("--cache: none of the checkpoints has deep hash embeddings")
        paths += [with_cache(path, args.cache, counts) for path in hashed]
    for path in paths:
        if path.note:
            say(f"path {path.name}: {path.note}")
    return paths


def held_out(args: argparse.Namespace) -> ClickDataset:
    """The test part of ``--data``, cut as it was for the first checkpoint.

    ``ValueError`` if the data's features are not the checkpoint's.
    """
    return parts_of(args.checkpoints[0], args.data)[-1]


@functools.lru_cache(maxsize=1)
def parts_of(file: Path, spec: str) -> tuple[ClickDataset, ...]:
    """(train, valid, test) of the data, cut as it was for the checkpoint in ``file``."""
    return load_checked(file, spec).split(by=inputs_of(file).split)


def load_checked(file: Path, spec: str, **options: Any) -> ClickDataset:
    """The data, as :func:`load_for` reads it. ``ValueError`` if its features are not the checkpoint's."""
    inputs = inputs_of(file)
    dataset = load_for([file], spec, **options)
    if (dataset.features, dataset.num_dense) != (inputs.features, inputs.num_dense):
        raise ValueError(
            f"--data: {dataset.name} has other features or vocabularies than the data that "
            f"{file} was trained on"
        )
    return dataset


def load_for(files: Sequence[Path], spec: str, **options: Any) -> ClickDataset:
    """The data, its raw values as IDs by the vocabularies of the first of the checkpoints, if it has any, and
    with the crosses that it was trained on. ``options`` go to the reader, if it knows them."""
    known = vocabularies_of(files[0]) if files else {}
    crosses = inputs_of(files[0]).crosses if files else None
    if known:
        options["vocabularies"] = known
    return data.load(spec, crosses=crosses, progress=reporter(), **options)


def get_profile(args: argparse.Namespace, paths: list[ScoringPath], dataset: ClickDataset) -> Profile:
    """``--profile``, or the one in the cache folder, measured anew if it is not this machine's."""
    return Profile.load_or_measure(
        paths,
        sampler(dataset),
        BATCH_SIZES,
        file=args.profile,
        seconds=args.profile_seconds,
        report=say,
        progress=reporter(),
    )
