"""Queries as an engine's clients see them."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import NamedTuple

import torch

from mprec._native import Engine, EngineQuery
from mprec.data import Batch
from mprec.data.batching import num_features

__all__ = [
    "Answer",
    "QueryFuture",
    "QueryRefusedError",
    "Replayed",
    "check",
    "check_plain",
    "refusal",
    "settle",
    "settle_outcomes",
]

_LOGGER = logging.getLogger(__name__)


class QueryRefusedError(RuntimeError):
    """The engine did not score a query. ``reason``: ``full``, ``overload``, ``expired`` or ``closed``."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Answer:
    """``scores`` float32 [B] in the order of the query's samples; ``paths``: samples scored by each path.

    Times are the engine's clock in seconds: when the query came, when the last of it was scored.
    """

    scores: torch.Tensor
    paths: dict[str, int]
    arrived_s: float
    finished_s: float

    @property
    def latency_s(self) -> float:
        return self.finished_s - self.arrived_s


class Replayed(NamedTuple):
    """What became of a query of a load. ``late_s``: from when it was due until it was submitted; other times
    are the engine's clock. ``refused``: the reason, empty if it was not; ``message`` says more. ``scores``
    and ``paths`` as an :class:`Answer` has them; None and empty without an answer.
    """

    late_s: float
    due_s: float
    finished_s: float
    refused: str
    failed: bool
    scores: torch.Tensor | None
    paths: dict[str, int]
    message: str = ""


class QueryFuture(Future):
    """A query's outcome to come. Once it is cancelled, the query costs no more work."""

    def __init__(self, batch: Batch) -> None:
        super().__init__()
        self.batch = batch
        self.failed_on: int | None = None  # the executor none of whose paths could score it
        self._engine: Engine | None = None
        self._query: EngineQuery | None = None

    def taken(self, engine: Engine, query: EngineQuery) -> None:
        """The engine has queued it."""
        self._engine, self._query = engine, query

    def cancel(self) -> bool:
        cancelled = super().cancel()
        if cancelled and self._engine is not None and self._engine.cancel(self._query):
            self.set_running_or_notify_cancel()
        return cancelled

    def settle(self, answer: Answer | None = None, error: BaseException | None = None) -> None:
        """Unless it was cancelled."""
        if self.set_running_or_notify_cancel():
            if error is not None:
                self.set_exception(error)
            else:
                self.set_result(answer)


def settle_outcomes(outcomes: Iterable[tuple]) -> None:
    """Of the native engine."""
    for future, scores, paths, arrived, finished in outcomes:
        if scores is not None:
            settle(future, Answer(scores, paths, arrived, finished))
        else:
            settle(future, error=refusal("expired", ""))


def refusal(reason: str, message: str) -> Exception:
    """What a client is told of a query that was not taken, or not scored."""
    if reason == "unsupported":
        return ValueError(message)
    if reason == "expired":
        message = "the deadline could no longer be met when the query's turn came"
    return QueryRefusedError(reason, message)


def settle(future: QueryFuture, answer: Answer | None = None, error: BaseException | None = None) -> None:
    """Tell the client, whatever that sets off."""
    try:
        future.settle(answer, error)
    except BaseException:  # a callback that exits: it must not end the thread that settles all
        _LOGGER.exception("a callback of a query's future raised")


def check_plain(batch: Batch) -> None:
    """``ValueError`` for bags of which indices and offsets, all that native code reads, say not all."""
    if not batch.bags.is_plain:
        raise ValueError("bags: expected those of all features, without per_sample_weights and padding")


def check(batch: Batch, features: int, num_dense: int) -> None:
    """``ValueError`` if a query has no samples, or other inputs than the paths take (-1: not known)."""
    if not len(batch):
        raise ValueError("batch: expected at least one sample, got none")
    if batch.dense.dim() != 2 or len(batch.dense) != len(batch):
        raise ValueError(f"dense: expected [{len(batch)}, numbers], got {list(batch.dense.shape)}")
    inputs = num_features(batch), batch.dense.shape[1]
    if features >= 0 and inputs != (features, num_dense):
        raise ValueError(
            f"batch has {inputs[0]} features and {inputs[1]} dense numbers, "
            f"the paths take {features} and {num_dense}"
        )
