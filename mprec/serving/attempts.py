"""Scoring of a batch whose path may raise: by another path then, and by halves if none can score it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from mprec._native import EngineQuery
from mprec.data import Batch
from mprec.data.batching import join
from mprec.serving.executors import Executor
from mprec.serving.queries import QueryFuture

__all__ = ["Piece", "score_pieces"]

# Samples start to stop of a query.
Piece = tuple[QueryFuture, EngineQuery, int, int]


def score_pieces(
    executor: Executor,
    path: str,
    pieces: Sequence[Piece],
    outcomes: list[tuple[Piece, object]],
    clock: Callable[[], float],
) -> float:
    """Score pieces by ``path``, or by another if it raises; if all do, half the pieces at a time, so that
    only queries at fault fail. Adds (piece, (path, scores) or error) to ``outcomes``. Gives the path's
    seconds by ``clock``; -1 if another path answered; 0 if no path did.
    """
    try:
        batch = join(
            [future.batch for future, _, _, _ in pieces],
            [start for _, _, start, _ in pieces],
            [stop for _, _, _, stop in pieces],
        )
    except (TypeError, ValueError) as error:  # a query is in a form that does not go with the others
        return _score_halves(executor, path, pieces, outcomes, clock, error)
    first_error = None
    others = sorted((p for p in executor.paths if p.name != path), key=lambda p: -p.quality)
    for name in (path, *(p.name for p in others if p.supports is None or p.supports(len(batch)))):
        try:
            begin = clock()
            scores = executor.run(name, batch)
            end = clock()
            scores = _checked(scores, name, batch)
        except BaseException as error:
            first_error = first_error or error
            continue
        parts = scores.contiguous().split([stop - start for _, _, start, stop in pieces])
        outcomes += [(piece, (name, part)) for piece, part in zip(pieces, parts, strict=True)]
        return max(end - begin, 1e-9) if first_error is None else -1.0
    return _score_halves(executor, path, pieces, outcomes, clock, first_error)


def _checked(scores: torch.Tensor, path: str, batch: Batch) -> torch.Tensor:
    """float32 on the CPU; raises what scores of another shape, or that are not finite, are."""
    if scores.shape != batch.labels.shape:
        raise RuntimeError(f"path {path!r} gave {tuple(scores.shape)} scores for {len(batch)} samples")
    scores = scores.detach().to("cpu", torch.float32)
    if not (math.isfinite(scores.sum().item()) or torch.isfinite(scores).all()):
        raise ArithmeticError(f"path {path!r} gave scores that are not finite")
    return scores


def _score_halves(
    executor: Executor,
    path: str,
    pieces: Sequence[Piece],
    outcomes: list[tuple[Piece, object]],
    clock: Callable[[], float],
    error: BaseException,
) -> float:
    """As :func:`score_pieces`, of pieces that raised ``error`` together."""
    if len(pieces) == 1:
        outcomes.append((pieces[0], error))
        return 0.0
    middle = len(pieces) // 2
    parts = [
        score_pieces(executor, path, part, outcomes, clock) for part in (pieces[:middle], pieces[middle:])
    ]
    return min(min(parts), 0.0)
