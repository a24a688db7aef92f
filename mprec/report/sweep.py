"""The picture of a sweep: correct predictions, misses, and which path answered, over the load."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import EngFormatter, FuncFormatter, NullLocator

from mprec.report.figures import path_colour, path_colours

__all__ = ["draw"]

_MARKERS = "osD^vP*X"


def draw(result: Mapping[str, Any], file: str | os.PathLike) -> None:
    """Draw the result of :func:`mprec.serving.loadsweep.sweep`: a column of three panels for each SLA.

    Writes PNG, or what the file's suffix says.
    """
    rows, dispatcher = result["rows"], result["dispatcher"]
    slas = sorted({row["sla_ms"] for row in rows})
    figure, panels = plt.subplots(
        3,
        len(slas),
        figsize=(2.2 + 3.6 * len(slas), 8.0),
        sharex=True,
        sharey="row",
        squeeze=False,
        layout="constrained",
    )
    names = list(dict.fromkeys(row["path"] for row in rows))
    colours = path_colours(names)
    for column, sla in zip(panels.T, slas, strict=True):
        of_sla = sorted((row for row in rows if row["sla_ms"] == sla), key=lambda row: row["load"])
        for name, marker in zip(names, _cycled(_MARKERS, len(names)), strict=True):
            own = [row for row in of_sla if row["path"] == name]
            _lines(column[0], column[1], own, name, colours[name], marker, strong=name == dispatcher)
        _mix(column[2], [row for row in of_sla if row["path"] == dispatcher], colours)
        column[0].set_title(f"SLA {sla:g} ms", fontsize=10)
        _finish(column, sorted({row["load"] for row in of_sla}), result["capacity_of"])
    panels[0, 0].set_ylabel("correct predictions\nin time per second")
    panels[0, 0].yaxis.set_major_formatter(EngFormatter(sep=""))
    panels[0, 0].set_ylim(bottom=0)
    panels[1, 0].set_ylabel("queries late,\nrefused or failed")
    panels[2, 0].set_ylabel(f"samples that the {dispatcher}\nanswered, by path")
    for axes in panels[1:, 0]:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:.0f} %"))
        axes.set_ylim(-0.02, 1.02)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(names), 4), frameon=False)
    figure.savefig(file, dpi=150)
    plt.close(figure)


def _cycled(marks: Sequence[str], count: int) -> Sequence[str]:
    return [marks[i % len(marks)] for i in range(count)]


def _lines(correct, missed, rows, name: str, colour: str, marker: str, *, strong: bool) -> None:
    """A contestant's lines; bars are one standard error."""
    loads = [row["load"] for row in rows]
    style = {
        "color": colour,
        "marker": marker,
        "markersize": 4,
        "linewidth": 2.2 if strong else 1.2,
        "zorder": 3 if strong else 2,
    }
    errors = [row["correct_per_s_error"] or 0.0 for row in rows]
    correct.errorbar(loads, [row["correct_per_s"] for row in rows], errors, capsize=2, label=name, **style)
    missed.plot(loads, [row["violations"] for row in rows], **style)


def _mix(axes, rows, colours: Mapping[str, str]) -> None:
    """Shares of the answered samples, stacked; a bar for each load, none where nothing was answered."""
    for row in rows:
        low, left, right = 0.0, row["load"] / 1.12, row["load"] * 1.12
        for name, share in row["chosen"].items():
            colour = colours.get(name, path_colour(name))
            axes.bar(left, share, width=right - left, bottom=low, align="edge", color=colour)
            low += share


def _finish(column, loads: Sequence[float], capacity_of: str) -> None:
    for axes in column:
        axes.set_xscale("log")
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xticks(loads, [f"{load:g}" for load in loads])
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    column[-1].set_xlabel(f"load, in capacities of {capacity_of}")
