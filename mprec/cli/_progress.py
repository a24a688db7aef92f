"""Training progress for people: a rich bar on a terminal, plain lines elsewhere: one at the end of each epoch
and one every half minute within it.

Quality is that of the validation part. What is left of the epoch is told from its own pace.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from mprec.training import Progress

__all__ = ["Pace", "training_progress"]

_EVERY_S = 30.0


class Pace:
    """Samples per second and seconds left of the epoch, from the events of one training."""

    def __init__(self) -> None:
        self._epoch = self._step = 0
        self._seconds = 0.0

    def of(self, event: Progress) -> tuple[float, float]:
        """Both, as of the first event of the epoch that was seen; (0, 0) at that one."""
        if event.epoch != self._epoch:
            self._epoch, self._step, self._seconds = event.epoch, event.step, event.seconds
        steps, seconds = event.step - self._step, event.seconds - self._seconds
        if not steps or seconds <= 0:
            return 0.0, 0.0
        return steps * event.batch_size / seconds, (event.steps - event.step) * seconds / steps


def _line(name: str, event: Progress) -> str:
    told = f"{name}: epoch {event.epoch}/{event.epochs}, loss {event.loss:.4f}"
    return f"{told}, {event.valid} ({event.seconds:.1f} s)"


def _within(name: str, event: Progress, pace: Pace) -> str:
    rate, left = pace.of(event)
    share = 100 * event.step / event.steps
    return (
        f"{name}: epoch {event.epoch}/{event.epochs}, {share:.0f} %, loss {event.loss:.4f}, "
        f"{rate:,.0f} rows/s, {left:.0f} s left of the epoch"
    )


@contextlib.contextmanager
def training_progress(file=None) -> Iterator[Callable[[str, Progress], None]]:
    """A function ``report(name, event)`` that writes to ``file`` (standard error)."""
    file = sys.stderr if file is None else file
    paces: dict[str, Pace] = {}
    if not file.isatty():
        told = {}

        def report(name: str, event: Progress) -> None:
            pace = paces.setdefault(name, Pace())
            pace.of(event)
            if event.valid is not None:
                print(_line(name, event), file=file, flush=True)
            elif event.seconds - told.setdefault(name, event.seconds) > _EVERY_S:
                print(_within(name, event, pace), file=file, flush=True)
            else:
                return
            told[name] = event.seconds

        yield report
        return
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()]
    with Bars(
        *columns, TextColumn("{task.fields[note]}"), console=Console(file=file), transient=True
    ) as bars:
        tasks: dict[str, int] = {}

        def draw(name: str, event: Progress) -> None:
            if name not in tasks:
                tasks[name] = bars.add_task(name, total=event.steps, note="")
            rate, left = paces.setdefault(name, Pace()).of(event)
            bars.update(
                tasks[name],
                description=f"{name} {event.epoch}/{event.epochs}",
                completed=event.step,
                note=f"loss {event.loss:.4f}, {rate:,.0f} rows/s, {left:.0f} s left",
            )
            if event.valid is not None:
                bars.console.print(_line(name, event), highlight=False)

        yield draw
