"""Figures of ``benchmarks/results`` as tables: the last whole comparison of each machine; quality."""

import csv
import re
import sys
from pathlib import Path

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
WHOLE = "python benchmarks/compare.py"
#: Rows in microseconds; what the dispatcher's rows hold are shares of the best choice.
MARKERS = {
    "<!-- figures: compared -->": lambda row: True,
    "<!-- figures: peers faster -->": lambda row: float(row["ratio"]) < 1,
}


def compared() -> dict[str, list[dict[str, str]]]:
    """Rows of the last whole comparison, by machine."""
    machines: dict[str, dict[tuple[str, str], dict[str, str]]] = {}
    with (RESULTS / "compare.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            if row["command"] == WHOLE and not row["work"].startswith("dispatch"):
                machine = f"{row['cpu']}, {row['isa']}, {row['threads']} thread, {row['time'][:10]}"
                machines.setdefault(machine, {})[row["work"], row["peer"]] = row
    return {machine: list(rows.values()) for machine, rows in machines.items()}


def tables(wanted) -> str:
    parts = []
    for machine, rows in compared().items():
        lines = [
            f"| {r['work']} | {float(r['mprec_us']):,.0f} | {r['peer']} | {float(r['peer_us']):,.0f} "
            f"| {float(r['ratio']):.2f} |"
            for r in rows
            if wanted(r)
        ]
        head = "| work | mprec, µs | peer | peer, µs | times as fast |\n|---|---|---|---|---|"
        parts.append(f"**{machine}**\n\n" + "\n".join([head, *lines]))
    return "\n\n".join(parts)


def quality(found: re.Match) -> str:
    """The table of a marker such as ``<!-- figures: quality ml-1m -->``."""
    sys.path.insert(0, str(RESULTS.parent))
    try:
        import quality_tables
    finally:
        sys.path.pop(0)
    return quality_tables.cce_table() if found[1] == "cce" else quality_tables.table(found[1])


def on_page_markdown(markdown, page, config, files):
    markdown = re.sub(r"<!-- figures: quality (\S+) -->", quality, markdown)
    for marker, wanted in MARKERS.items():
        if marker in markdown:
            markdown = markdown.replace(marker, tables(wanted))
    return markdown
