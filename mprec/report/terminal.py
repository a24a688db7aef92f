"""Tables for a terminal, and the demo's."""

from collections.abc import Mapping

from rich import box
from rich.console import Console
from rich.table import Table

from mprec.report.load_tables import with_error
from mprec.report.verdict import ranked

__all__ = ["demo_table", "format_bytes", "terminal"]


def terminal() -> Console:
    """What tables are printed to: as wide as the terminal, or 150 columns in a file or pipe. Brackets are no
    style there, as a path may be called ``table[int8]``."""
    return Console(width=None if Console().is_terminal else 150, markup=False)


def format_bytes(count: float) -> str:
    """``1536`` -> ``1.5 KiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError("unreachable")


def demo_table(result: Mapping) -> Table:
    """Quality, size and latency of each representation, and how each fared under load.

    The most correct predictions per second stand first; the dispatcher is in its place by rank. It has no
    size or latency of its own.
    """
    load = result["load"]
    batches = list(result["representations"][0]["latency_ms"])
    table = Table(
        title=f"{result['data']['name']}: {len(result['representations'])} paths and the "
        f"dispatcher (SLA {load['sla_ms']:g} ms, {load['qps']:.0f} queries/s)",
        box=box.SIMPLE_HEAD,
        title_justify="left",
    )
    table.add_column("path", overflow="fold")
    for heading in ("AUC", "log-loss", "accuracy", "embedding", "parameters"):
        table.add_column(heading, justify="right", overflow="fold")
    for batch in batches:
        table.add_column(f"ms @{batch}", justify="right", overflow="fold")
    for heading in ("p99 ms", "missed", "correct/s"):
        table.add_column(heading, justify="right", overflow="fold")

    entries = {entry["representation"]: entry for entry in result["representations"]}
    for row in ranked(result):
        if (entry := entries.get(row["path"])) is None:
            accuracy = "-" if row["accuracy"] is None else f"{row['accuracy']:.4f}"
            blank = [""] * (2 + len(batches))
            table.add_row(row["path"], "", "", accuracy, *blank, *_load_cells(row), style="bold")
            continue
        table.add_row(
            entry["representation"],
            f"{entry['auc']:.4f}",
            f"{entry['log_loss']:.4f}",
            f"{entry['accuracy']:.4f}",
            format_bytes(entry["embedding_bytes"]),
            f"{entry['parameters']:,}",
            *(f"{entry['latency_ms'][batch]:.3f}" for batch in batches),
            *_load_cells(row),
        )
    return table


def _load_cells(row: Mapping) -> tuple[str, str, str]:
    p99 = "-" if row["p99_ms"] is None else f"{row['p99_ms']:.2f}"
    correct = with_error(row["correct_per_s"], row.get("correct_per_s_error"), ",.0f")
    return p99, f"{100 * row['violations']:.1f} %", correct
