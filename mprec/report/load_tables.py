"""Load tests' results as tables for a terminal of 80 columns. What has no room goes on below."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

__all__ = ["load_table", "loadgen_table", "sweep_tables", "with_error"]


def _table(title: str, *names: str) -> Table:
    """Of left-aligned columns ``names``; more are added by the caller."""
    table = Table(
        title=title, box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False, collapse_padding=True
    )
    for name in names:
        table.add_column(name, overflow="fold")
    return table


def _figure(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def with_error(value: float | None, error: float | None, form: str) -> str:
    """``1,234 ±56``; no error where it is unknown."""
    if value is None:
        return "-"
    return format(value, form) + ("" if error is None else f" ±{error:{form}}")


def sweep_tables(result: Mapping[str, Any]) -> list[Table]:
    """A table for each SLA: a line for each load and contestant."""
    tables = []
    for sla in sorted({row["sla_ms"] for row in result["rows"]}):
        title = (
            f"SLA {sla:g} ms, {result['arrivals']} arrivals; load 1 is what {result['capacity_of']} can do: "
            f"{result['capacity_qps']:.0f} queries/s"
        )
        table = _table(title)
        table.add_column("load", justify="right", overflow="fold")
        table.add_column("path", overflow="fold")
        for heading in ("correct/s", "/ best static", "late", "refused", "p99 ms"):
            table.add_column(heading, justify="right", overflow="fold")
        shown = None
        for row in (row for row in result["rows"] if row["sla_ms"] == sla):
            if shown is not None and row["load"] != shown:
                table.add_section()
            refused = (sum(row["refused"].values()) + row["failed"]) / max(row["queries"], 1)
            table.add_row(
                "" if row["load"] == shown else f"{row['load']:g}",
                row["path"],
                with_error(row["correct_per_s"], row["correct_per_s_error"], ",.0f"),
                with_error(row["ratio"], row["ratio_error"], ".3f"),
                f"{100 * row['late']:.1f} %",
                f"{100 * refused:.1f} %",
                _figure(row["p99_ms"], ".1f"),
                style="bold" if row["path"] == result["dispatcher"] else None,
            )
            shown = row["load"]
        tables.append(table)
    return tables


def load_table(result: Mapping[str, Any]) -> Table:
    """One load: a line for each contestant."""
    table = _table(
        f"{result['data']}: {result['queries']} queries, {result['samples']} samples, "
        f"{result['qps']:.0f} queries/s, SLA {result['sla_ms']:g} ms",
        "path",
    )
    searched = "max_qps" in result["rows"][0]
    for heading in ["p50 ms", "p99 ms", "missed", "accuracy", "correct/s"] + ["max qps"] * searched:
        table.add_column(heading, justify="right", overflow="fold")
    table.add_column("answered by", overflow="fold")
    for row in result["rows"]:
        chosen = "\n".join(f"{name} {100 * share:.0f} %" for name, share in row["chosen"].items())
        table.add_row(
            row["path"],
            _figure(row["p50_ms"], ".2f"),
            _figure(row["p99_ms"], ".2f"),
            f"{100 * row['violations']:.1f} %",
            _figure(row["accuracy"], ".4f"),
            with_error(row["correct_per_s"], row["correct_per_s_error"], ",.0f"),
            *([f"{row['max_qps']:.0f}"] if searched else []),
            chosen,
        )
    return table


def loadgen_table(rows: Sequence[Mapping[str, Any]], qps: float, sla_ms: float) -> Table:
    """MLPerf LoadGen's verdicts, and why they are what they are."""
    table = _table(
        f"MLPerf LoadGen, Server scenario, {qps:.0f} queries/s, SLA {sla_ms:g} ms", "path", "verdict"
    )
    for heading in ("p99 ms", "refused", "failed"):
        table.add_column(heading, justify="right", overflow="fold")
    table.add_column("why", overflow="fold")
    for row in rows:
        p99_ns = row["summary"].get("99.00 percentile latency (ns)")
        table.add_row(
            row["path"],
            "VALID" if row["valid"] else "INVALID",
            _figure(None if p99_ns is None else float(p99_ns) / 1e6, ".2f"),
            str(row["refused"]),
            str(row["failed"]),
            row["reason"],
        )
    return table
