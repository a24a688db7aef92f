"""Queries as an engine keeps them, what becomes of them, and what is counted."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch

from mprec.data import Batch

__all__ = ["Answer", "Query", "QueryRefusedError", "Statistics"]


class QueryRefusedError(RuntimeError):
    """The engine did not score a query. ``reason``: ``full``, ``overload``, ``expired`` or ``closed``."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Answer:
    """``scores`` float [B] in the order of the query's samples; ``paths``: samples scored by each path.

    Times are the engine's clock in seconds: when the query came, when the last of it was scored.
    """

    scores: torch.Tensor
    paths: dict[str, int]
    arrived_s: float
    finished_s: float

    @property
    def latency_s(self) -> float:
        return self.finished_s - self.arrived_s


@dataclass
class Statistics:
    """Counts since the engine was made."""

    queries: int = 0
    answered: int = 0
    late: int = 0  # answered, after the deadline
    failed: int = 0  # the query's own input raised, on every path
    cancelled: int = 0  # by the client, before it was scored
    refused: Counter = field(default_factory=Counter)  # by reason
    batches: int = 0
    samples: Counter = field(default_factory=Counter)  # by path
    path_errors: Counter = field(default_factory=Counter)  # by path: batches that another had to answer
    executor_errors: Counter = field(default_factory=Counter)  # by executor: the same of queries


class Query:
    """A query and how far it is."""

    __slots__ = ("arrived", "batch", "failed_on", "future", "missing", "paths", "scores")

    def __init__(self, batch: Batch, arrived: float) -> None:
        self.batch, self.arrived = batch, arrived
        self.future: Future[Answer] = Future()
        self.missing = len(batch)
        self.scores: dict[int, torch.Tensor] = {}  # by the first sample's position
        self.paths: dict[str, int] = {}  # samples by path
        self.failed_on: int | None = None  # the executor none of whose paths could score it
