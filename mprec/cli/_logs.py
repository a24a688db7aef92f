"""Training logs in files: a CSV, or events for TensorBoard."""

from __future__ import annotations

import contextlib
import csv
from collections.abc import Callable, Iterator
from pathlib import Path

from mprec.training import Progress

__all__ = ["csv_log", "tensorboard_log"]

Log = Callable[[str, Progress], None]


def _record(event: Progress) -> dict[str, float]:
    return {"epoch": event.epoch, "loss": event.loss, "seconds": event.seconds, **event.valid.to_dict()}


def csv_log(file: Path, resume: bool) -> Log:
    """Appends a row at the end of each epoch; the file is begun anew unless ``resume``."""
    if not resume or not file.exists():
        file.write_text("", encoding="utf-8")

    def log(name: str, event: Progress) -> None:
        if event.valid is None:
            return
        record = {"representation": name, **_record(event)}
        with open(file, "a", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, record)
            if not stream.tell():
                writer.writeheader()
            writer.writerow(record)

    return log


@contextlib.contextmanager
def tensorboard_log(folder: Path) -> Iterator[Log]:
    """Writes the metrics of each epoch and, each hundred batches, the loss.

    ``ValueError`` if TensorBoard, which is no dependency of mprec's, is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError(f"--tensorboard needs the package tensorboard: {error}") from error
    with SummaryWriter(str(folder)) as writer:

        def log(name: str, event: Progress) -> None:
            if event.valid is not None:
                for metric, value in _record(event).items():
                    if metric != "epoch":
                        writer.add_scalar(f"{name}/{metric}", value, event.epoch)
                writer.flush()
            elif event.step % 100 == 0:
                step = (event.epoch - 1) * event.steps + event.step
                writer.add_scalar(f"{name}/batch/loss", event.loss, step)

        yield log
