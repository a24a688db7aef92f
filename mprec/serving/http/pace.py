"""Clients that ask again at once when they are refused must not take the time of those who are served."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

__all__ = ["Pace"]

_SHARE = 0.15  # of the event loop's time for queries that are refused for load
_GAIN = 0.05


class Pace:
    """When refusals are told. While they are few, at once; beyond that so that what they cost is a fixed
    share of the loop's time, but none later than it could have been answered in time. A client that waits
    for its refusal does not ask meanwhile.

    For one thread, the event loop's. ``clock`` gives seconds.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, clock: Callable[[], float]) -> None:
        self._loop, self._clock = loop, clock
        self._held: deque[tuple[float, Callable[[], None]]] = deque()  # until when at most, what to do
        self._next = 0.0  # when the next one may be told
        self._cost = 1e-4  # of one, in seconds
        self._timer: asyncio.TimerHandle | None = None

    def tell(self, work: Callable[[], None], latest: float, cost_s: float) -> None:
        """Call ``work`` in time, by ``latest`` on the clock. The query has cost ``cost_s`` seconds."""
        self._cost += _GAIN * (cost_s - self._cost)
        now = self._clock()
        if not self._held and now >= self._next:
            self._step(now)
            work()
        else:
            self._held.append((latest, work))
            self._set_timer(now)

    def _step(self, now: float) -> None:
        self._next = max(self._next, now - 1e-3) + self._cost / _SHARE  # timers have milliseconds

    def _set_timer(self, now: float) -> None:
        if self._timer is None and self._held:
            latest, _ = self._held[0]
            self._timer = self._loop.call_later(max(min(self._next, latest) - now, 1e-3), self._release)

    def _release(self) -> None:
        self._timer = None
        now = self._clock()
        while self._held and (now >= self._next or now >= self._held[0][0]):
            _, work = self._held.popleft()
            if now >= self._next:
                self._step(now)
            work()
        self._set_timer(now)
