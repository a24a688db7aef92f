"""Training progress for people: a rich bar on a terminal, one plain line per epoch elsewhere.

Quality is that of the validation part.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from mprec.training import Progress

__all__ = ["training_progress"]


def _line(name: str, event: Progress) -> str:
    quality = event.valid
    return (
        f"{name}: epoch {event.epoch}/{event.epochs}, loss {event.loss:.4f}, AUC {quality.auc:.4f}, "
        f"log-loss {quality.log_loss:.4f}, accuracy {quality.accuracy:.4f} ({event.seconds:.1f} s)"
    )


@contextlib.contextmanager
def training_progress(file=None) -> Iterator[Callable[[str, Progress], None]]:
    """A function ``report(name, event)`` that writes to ``file`` (standard error)."""
    file = sys.stderr if file is None else file
    if not file.isatty():

        def report(name: str, event: Progress) -> None:
            if event.valid is not None:
                print(_line(name, event), file=file, flush=True)

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
            bars.update(
                tasks[name],
                description=f"{name} {event.epoch}/{event.epochs}",
                completed=event.step,
                note=f"loss {event.loss:.4f}",
            )
            if event.valid is not None:
                bars.console.print(_line(name, event), highlight=False)

        yield draw
