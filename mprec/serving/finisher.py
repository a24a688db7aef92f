"""Futures settled where no lock is held."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future

from mprec.serving.queries import Answer

__all__ = ["Finisher"]

_SLOW_CALLBACK_S = 10e-3  # longer than a wait for the interpreter's lock


class Finisher:
    """Settles futures. Callbacks run in the thread that settles; once one has been slow, on a thread of their
    own, so that a slow client does not keep an executor waiting. Without ``start`` there is never such a
    thread: what was settled can be read at once."""

    def __init__(self) -> None:
        self._later: list[tuple[Future, BaseException]] = []
        self._thread: threading.Thread | None = None
        self._queue: list[tuple] = []
        self._wake = threading.Condition()
        self._closed = True

    def start(self) -> None:
        self._closed = False

    def later(self, future: Future, error: BaseException) -> None:
        """Settle at the next ``flush``, where no lock is held."""
        self._later.append((future, error))

    @property
    def has_some(self) -> bool:
        return bool(self._later)

    def flush(self) -> None:
        while self._later:
            future, error = self._later.pop()
            self.settle(future, error=error)

    def settle(
        self, future: Future, answer: Answer | None = None, error: BaseException | None = None
    ) -> None:
        """Never raises: a client may have cancelled, and callbacks' errors are logged by the future."""
        if self._thread is not None:
            with self._wake:
                self._queue.append((future, answer, error))
                self._wake.notify()
            return
        start = time.perf_counter()
        _settle(future, answer, error)
        if time.perf_counter() - start > _SLOW_CALLBACK_S and not self._closed:
            self._thread = threading.Thread(target=self._run, name="mprec-answers", daemon=True)
            self._thread.start()

    def close(self) -> None:
        self.flush()
        self._closed = True
        if self._thread is not None:
            with self._wake:
                self._wake.notify()
            self._thread.join()

    def _run(self) -> None:
        while True:
            with self._wake:
                while not self._queue:
                    if self._closed:
                        return
                    self._wake.wait()
                items, self._queue = self._queue, []
            for item in items:
                _settle(*item)


def _settle(future: Future, answer: Answer | None, error: BaseException | None) -> None:
    if future.set_running_or_notify_cancel():
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(answer)
