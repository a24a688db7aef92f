"""The executors of ``mprec serve``: paths, a profile of them, and the split of the cores."""

from __future__ import annotations

import argparse
import functools
import os
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path

import numpy as np
import orjson
import torch

from mprec.cli._setup import held_out, load_paths, say
from mprec.data import Batch
from mprec.data.zipf import zipf_batches
from mprec.dispatch import BATCH_SIZES, Profile, ProfileError, ScoringPath
from mprec.dispatch.profile import default_file
from mprec.paths import sampler
from mprec.serving import splits
from mprec.serving.build import ModelInputs, model_inputs
from mprec.serving.executors import Executor
from mprec.serving.splits import Split

__all__ = ["check_split", "load_executors"]

_DISTINCT = 16  # queries of a size


def check_split(args: argparse.Namespace) -> Split | None:
    """What ``--executors`` and ``--threads`` ask for; None for auto."""
    if args.executors in (None, "auto"):
        if args.threads is None:
            return None
        if args.executors == "auto":
            raise ValueError("--threads: leave it out where --executors auto is to find the best")
        return Split(0, args.threads)
    if args.threads is not None:
        raise ValueError("--threads: --executors says it already")
    try:
        return Split.parse(args.executors)
    except ValueError as error:
        raise ValueError(f"--executors: {error}") from None


def load_executors(
    args: argparse.Namespace, split: Split | None, progress: Callable[[str, float], object]
) -> tuple[list[Executor], ModelInputs, Split]:
    """Executors that have been started, what the models take, and the split, which is measured if it is None
    and not known from before."""
    inputs = model_inputs(args.checkpoints)
    paths = load_paths(args)
    make_input = (
        zipf_batches(inputs.vocabularies, inputs.num_dense) if args.data is None else sampler(held_out(args))
    )

    def profile_of(threads: int) -> Profile:
        torch.set_num_threads(threads)
        return Profile.load_or_measure(
            paths,
            make_input,
            BATCH_SIZES,
            file=profile_file(args, paths),
            seconds=args.profile_seconds,
            conditions=("warm",),  # what the engine asks for: the others take long
            report=say,
            progress=progress,
        )

    if split is None:
        rates = splits.load(paths)
        if rates is None:
            rates = _measure(paths, profile_of(1), make_input, inputs, progress)
            paths = load_paths(args)  # the weights are in memory for processes now, without huge pages
        split = splits.best(rates)
        _tell(rates, split)
    some = splits.executors(split, paths, profile_of(split.threads))
    if split.processes:
        torch.set_num_threads(1)  # of what is left to this process
        progress("starting processes", 0.0)
    splits.start(some)
    return some, inputs, split


def profile_file(args: argparse.Namespace, paths: list[ScoringPath]) -> Path:
    """``--profile``, or a whole profile in the cache folder, or a file of this command's own there: what it
    measures is quick, and perhaps on random IDs, and must not pass for a whole one of these paths.
    """
    if args.profile is not None:
        return Path(args.profile)
    whole = default_file(paths)
    try:
        Profile.load(whole, paths)
    except ProfileError:
        inputs = "random" if args.data is None else "data"
        return whole.with_name(f"quick-{inputs}-{whole.name}")
    return whole


def _measure(
    paths: list[ScoringPath],
    profile: Profile,
    make_input: Callable[[int, np.random.Generator], Batch],
    inputs: ModelInputs,
    progress: Callable[[str, float], object],
) -> dict[Split, dict[int, float]]:
    from mprec.serving.http.parse import Limits, parse_json

    rng, limits = np.random.default_rng(0), Limits()

    def read(body: bytes) -> Batch:
        return parse_json(body, inputs, limits)[0]

    queries = {
        size: [functools.partial(read, _body(make_input(size, rng), inputs)) for _ in range(_DISTINCT)]
        for size in splits.SIZES
    }
    possible = splits.candidates(len(os.sched_getaffinity(0)))
    try:
        rates = splits.measure(possible, paths, profile, queries, progress=progress)
    except ValueError as error:  # a path with a cache of rows, which is this process's alone
        say(f"executors: no processes: {error}")
        possible = [split for split in possible if not split.processes]
        rates = splits.measure(possible, paths, profile, queries, progress=progress)
    try:
        splits.save(rates, paths)
    except OSError as error:
        say(f"what was measured of executors could not be kept: {error}")
    return rates


def _body(batch: Batch, inputs: ModelInputs) -> bytes:
    """The query in JSON."""
    size, ids = len(batch), batch.indices.tolist()
    ends = batch.offsets.tolist()
    bags = [ids[start:stop] for start, stop in pairwise(ends)]
    rows = [
        [bag[0] if len(bag) == 1 else bag for bag in bags[b::size]] for b in range(size)
    ]  # feature-major: sample b's bags are every size-th
    return orjson.dumps({"ids": rows} | ({"dense": batch.dense.tolist()} if inputs.num_dense else {}))


def _tell(rates: Mapping[Split, Mapping[int, float]], chosen: Split) -> None:
    for split, of in rates.items():
        shown = ", ".join(f"{rate:.0f}/s of {size}" for size, rate in of.items())
        say(f"executors {split}: queries {shown}" + (" (chosen)" if split == chosen else ""))
