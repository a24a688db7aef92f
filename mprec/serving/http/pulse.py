"""Whether queries get answered."""

from __future__ import annotations

__all__ = ["Pulse"]


class Pulse:
    """Silent if queries have come for ``patience_s`` seconds, and none has been answered.

    It is not enough that some are refused: under overload that is right. Once queries have stayed away for as
    long, and none is under way, it is no longer silent, so that a load balancer tries again. Times are one
    clock's, in seconds. Not thread-safe.
    """

    def __init__(self, patience_s: float) -> None:
        self.patience_s = patience_s
        self.under_way = 0
        self._unanswered_since: float | None = None
        self._latest = 0.0

    def asked(self, now: float) -> None:
        self.under_way += 1
        self._latest = now
        if self._unanswered_since is None:
            self._unanswered_since = now

    def settled(self, answered: bool) -> None:
        self.under_way -= 1
        if answered:
            self._unanswered_since = None

    def is_silent(self, now: float) -> bool:
        since = self._unanswered_since
        if since is None or now - since <= self.patience_s:
            return False
        if self.under_way or now - self._latest <= self.patience_s:
            return True
        self._unanswered_since = None
        return False
