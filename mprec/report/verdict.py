"""What a load test says of the dispatcher, in words: also where it lost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["dispatcher_row", "ranked", "verdicts"]


def dispatcher_row(result: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The row of the load test that is no single path's; None if there is none."""
    static = {entry["representation"] for entry in result["representations"]}
    rows = [row for row in result["load"]["rows"] if row["path"] not in static]
    return rows[-1] if rows else None


def ranked(result: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The load test's rows, the most correct predictions per second first."""
    return sorted(result["load"]["rows"], key=lambda row: -row["correct_per_s"])


def verdicts(result: Mapping[str, Any]) -> list[str]:
    """Sentences: how the dispatcher fared against the best static path, and whether its p99 is within the
    target. A difference within two standard errors is called none.
    """
    mine = dispatcher_row(result)
    if mine is None:
        return []
    static = [row for row in ranked(result) if row is not mine]
    found = [] if not static else [_against(mine, static[0], result["load"])]
    sla_ms = result["load"]["sla_ms"]
    if mine["p99_ms"] is None:
        found.append(f"The {mine['path']} answered no query.")
    elif mine["p99_ms"] > sla_ms:
        found.append(f"The {mine['path']}'s p99 of {mine['p99_ms']:.2f} ms exceeds the SLA of {sla_ms:g} ms.")
    return found


def _against(mine: Mapping[str, Any], best: Mapping[str, Any], load: Mapping[str, Any]) -> str:
    name, other = mine["path"], best["path"]
    if not best["correct_per_s"]:
        return f"No static path answered in time; the {name} had {mine['correct_per_s']:,.0f} correct/s."
    ratio, error = load.get("ratio"), load.get("ratio_error")
    if ratio is None:
        ratio = mine["correct_per_s"] / best["correct_per_s"]
    if error is None:
        return (
            f"The {name} made {ratio:.3f} times as many correct predictions per second as {other}, the best "
            "static path; the error of that is unknown."
        )
    if ratio < 1 - 2 * error:
        verb = "lost to"
    elif ratio > 1 + 2 * error:
        verb = "beat"
    else:
        verb = "was level with"
    where = "each round against the path that was best in the other rounds"
    if rounds := load.get("ratio_rounds"):
        where = f"in {rounds} further rounds of these two"
    return (
        f"The {name} {verb} {other}, the best static path: {ratio:.3f} ± {error:.3f} times as many correct "
        f"predictions per second ({where})."
    )
