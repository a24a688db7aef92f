"""From a thread's future to a coroutine that awaits it."""

from __future__ import annotations

import asyncio
from collections import deque
from concurrent.futures import Future

__all__ = ["Bridge"]


class Bridge:
    """Wakes an event loop when futures of other threads are done: once for many that finish together, as each
    waking is a system call in the thread that finishes them.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._done: deque[asyncio.Future] = deque()
        self._is_woken = False

    def wait_for(self, future: Future) -> asyncio.Future:
        """Done, with None, when ``future`` is done in any way. For the loop's thread."""
        waiter = self._loop.create_future()
        future.add_done_callback(lambda _: self._wake(waiter))
        return waiter

    def _wake(self, waiter: asyncio.Future) -> None:
        self._done.append(waiter)
        if not self._is_woken:
            self._is_woken = True
            self._loop.call_soon_threadsafe(self._settle)

    def _settle(self) -> None:
        self._is_woken = False  # before looking, so that whoever comes later wakes again
        while self._done:
            waiter = self._done.popleft()
            if not waiter.done():
                waiter.set_result(None)
