"""In which order an event loop does what queries need."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future

__all__ = ["Turns"]


class Turns:
    """A turn of the loop hands out all answers that there are, and then begins one new query.

    Between two turns the loop looks at its sockets, so that a query has its time of arrival even while many
    wait to be read: what waits in the kernel's buffers instead waits unseen. The loop is woken once for all
    futures that are done at about the same time, as each waking is a system call in the thread that finishes
    them.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._begun: deque[Callable[[], None]] = deque()
        self._done: deque[tuple[Callable[[Future], None], Future]] = deque()
        self._is_scheduled = False  # by the loop's thread
        self._is_woken = False  # by others

    def begin(self, work: Callable[[], None]) -> None:
        """Call ``work`` in a turn of its own. For the loop's thread."""
        self._begun.append(work)
        self._schedule()

    def when_done(self, future: Future, callback: Callable[[Future], None]) -> None:
        """Call ``callback(future)`` in the loop's thread once it is done, in any way."""
        future.add_done_callback(lambda done: self._wake(callback, done))

    def _wake(self, callback: Callable[[Future], None], future: Future) -> None:
        self._done.append((callback, future))
        if not self._is_woken:
            self._is_woken = True
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                self._loop.call_soon_threadsafe(self._hand_out)

    def _schedule(self) -> None:
        if not self._is_scheduled:
            self._is_scheduled = True
            self._loop.call_soon(self._turn)

    def _turn(self) -> None:
        self._is_scheduled = False
        self._hand_out()
        if self._begun:
            work = self._begun.popleft()
            if self._begun:
                self._schedule()
            work()

    def _hand_out(self) -> None:
        self._is_woken = False  # before looking, so that whoever comes later wakes again
        while self._done:
            callback, future = self._done.popleft()
            try:
                callback(future)
            except Exception as error:  # one client's: the others have theirs to get
                self._loop.call_exception_handler({"message": "answering a query", "exception": error})
