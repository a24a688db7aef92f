"""The paths of a bundle that one machine holds side by side: ``mprec plan``'s answer for what is there."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from mprec.cli._setup import say
from mprec.paths import bundle, vocabularies_of
from mprec.paths.forms import embedding_weights
from mprec.planner import Candidate, Held, paths_within
from mprec.report.terminal import format_bytes

__all__ = ["HeldPaths", "held_paths"]


#: As :func:`mprec.paths.bundle.load` gives it.
Bundle = tuple[Sequence[bundle.Member], dict[str, Any]]


@dataclass(frozen=True)
class HeldPaths:
    """``nbytes``: of embeddings that are held, with what paths share counted once."""

    source: Path
    metric: str
    memory_bytes: int
    nbytes: int
    candidates: Sequence[Candidate]
    choice: Held

    def to_dict(self) -> dict[str, Any]:
        return {
            "memory_bytes": self.memory_bytes,
            "bytes": self.nbytes,
            "kept": self.choice.kept,
            "matched": self.choice.matched,
        }

    def summary(self) -> str:
        return (
            f"{self.source}: {len(self.choice.kept)} of {len(self.candidates)} paths side by side, "
            f"{format_bytes(self.nbytes)} of {format_bytes(self.memory_bytes)}"
        )

    def table(self) -> Table:
        """For a terminal."""
        table = Table(box=box.SIMPLE_HEAD)
        table.add_column("path", overflow="fold")
        batches = sorted(self.candidates[0].seconds)
        for heading in (self.metric, "embedding", *(f"ms @{batch}" for batch in batches)):
            table.add_column(heading, justify="right", overflow="fold")
        table.add_column("", overflow="fold")
        for path in sorted(self.candidates, key=lambda path: -path.quality):
            held = path.name in self.choice.kept
            by = self.choice.matched.get(path.name)
            table.add_row(
                path.name,
                f"{path.quality:.4f}",
                format_bytes(path.nbytes),
                *(f"{1e3 * path.seconds[batch]:.3f}" for batch in batches),
                "" if held else "does not fit" if by is None else f"no better than {by}",
                style=None if held else "dim",
            )
        return table


def held_paths(args: argparse.Namespace, bundles: Mapping[Path, Bundle]) -> HeldPaths | None:
    """What ``--memory`` holds of the one bundle among ``--checkpoints``, written to ``--bundle``; ``bundles``
    are loaded.

    None without a bundle, and where no path fits or one was not measured: that is said, or a ``ValueError``
    if there is ``--bundle``.
    """
    asked = args.bundle is not None
    files = args.checkpoints
    if args.memory is None or len(files) != 1 or files[0] not in bundles:
        if asked:
            raise ValueError("--bundle goes with --memory and one bundle as --checkpoints")
        return None
    if asked and args.bundle.exists() and not args.bundle.is_dir():
        raise ValueError(f"--bundle: {args.bundle} is no folder")
    if asked and args.bundle.resolve() == files[0].resolve():
        raise ValueError(
            f"--bundle: {args.bundle} is the bundle planned for, whose other paths would be lost"
        )
    members, metadata = bundles[files[0]]
    weights = {member.name: embedding_weights(member.model.embeddings) for member in members}
    try:
        candidates = [
            _candidate(member, args.metric, sum(weights[member.name].values())) for member in members
        ]
        choice = paths_within(candidates, weights, args.memory, args.batch_size)
    except ValueError as error:  # Infeasible is one
        if asked:
            raise
        say(f"no path of {files[0]} is chosen: {error}")
        return None
    if asked:
        chosen = [member for member in members if member.name in choice.kept]
        bundle.save(args.bundle, chosen, metadata, vocabularies_of(files[0]))
        say(f"{len(chosen)} paths in {args.bundle}")
    together: dict[Any, int] = {}
    for name in choice.kept:
        together.update(weights[name])
    return HeldPaths(files[0], args.metric, args.memory, sum(together.values()), candidates, choice)


def _candidate(member: bundle.Member, metric: str, nbytes: int) -> Candidate:
    latency: Mapping[str, float] = member.facts.get("latency_ms") or {}
    seconds = {int(batch): 1e-3 * time for batch, time in latency.items()}
    return Candidate(member.name, member.quality(metric), nbytes, seconds)
