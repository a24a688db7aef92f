"""The demo's table, for a terminal."""

from collections.abc import Mapping

from rich import box
from rich.table import Table

__all__ = ["demo_table", "format_bytes"]


def format_bytes(count: float) -> str:
    """``1536`` -> ``1.5 KiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError("unreachable")


def demo_table(result: Mapping) -> Table:
    """Quality, size and latency of each representation, and how each fared under load.

    The static paths stand first, the dispatcher's row last: it has no size or latency of its own.
    """
    load = result["load"]
    batches = list(result["representations"][0]["latency_ms"])
    table = Table(
        title=f"{result['data']['name']}: four representations and the dispatcher "
        f"(SLA {load['sla_ms']:g} ms, {load['qps']:.0f} queries/s)",
        box=box.SIMPLE_HEAD,
        title_justify="left",
    )
    table.add_column("path")
    for heading in ("AUC", "log-loss", "accuracy", "embedding", "parameters"):
        table.add_column(heading, justify="right")
    for batch in batches:
        table.add_column(f"ms @{batch}", justify="right")
    for heading in ("p99 ms", "late", "correct/s"):
        table.add_column(heading, justify="right")

    under_load = {row["path"]: row for row in load["rows"]}
    for entry in result["representations"]:
        row = under_load.pop(entry["representation"])
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
    for row in under_load.values():
        blank = [""] * (2 + len(batches))
        table.add_row(row["path"], "", "", f"{row['accuracy']:.4f}", *blank, *_load_cells(row), style="bold")
    return table


def _load_cells(row: Mapping) -> tuple[str, str, str]:
    return f"{row['p99_ms']:.2f}", f"{100 * row['violations']:.1f} %", f"{row['correct_per_s']:,.0f}"
