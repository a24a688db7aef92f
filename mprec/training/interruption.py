"""Ctrl-C, SIGTERM and a closed terminal as a wish that training ends at its next batch."""

from __future__ import annotations

import signal
import threading

__all__ = ["Interruption"]


class Interruption:
    """Inside it, the first SIGINT, SIGTERM or SIGHUP (a terminal that was closed) is kept as ``signal``, and
    calling it says whether there was one; a second one does what it did before. One that the process ignores,
    as ``nohup`` has it, stays ignored. In threads other than the main one it hears nothing.

        with Interruption() as stop:
            train(..., keep=Keep(stop=stop))
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[int, object] = {}

    def __call__(self) -> bool:
        return self.signal is not None

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if signal.getsignal(number) != signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        self._restore()

    def _note(self, number: int, frame: object) -> None:
        self.signal = number
        self._restore()

    def _restore(self) -> None:
        while self._before:
            number, handler = self._before.popitem()
            signal.signal(number, handler)
