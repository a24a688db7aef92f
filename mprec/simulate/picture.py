"""Pictures of simulated contests: every one says that it is simulated."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

from mprec.report.figures import path_colour
from mprec.simulate.contest import DISPATCHER

__all__ = ["draw"]

_STYLES = ("-", "--", ":", "-.")
_MARKERS = ("o", "s", "^", "D")


def draw(rows: Sequence[dict[str, Any]], title: str, file: str | Path) -> None:
    """Correct predictions per second over the load, a panel for each SLA, a line for each contestant.

    ``rows`` are those of :meth:`mprec.simulate.contest.Row.to_dict`. Writes PNG, or what the suffix says.
    """
    slas = sorted({row["sla_ms"] for row in rows})
    names = list(dict.fromkeys(row["contestant"] for row in rows))
    places = list(dict.fromkeys(name.partition(" on ")[2] for name in names))
    figure, panels = plt.subplots(
        1, len(slas), figsize=(1.5 + 3.1 * len(slas), 3.6), sharey=True, squeeze=False
    )
    for axes, sla in zip(panels[0], slas, strict=True):
        for name in names:
            points = sorted(
                (row["qps"], row["correct_per_s"])
                for row in rows
                if row["contestant"] == name and row["sla_ms"] == sla and row["correct_per_s"] > 0
            )
            if not points:  # nothing in time: no place on a logarithmic axis
                continue
            path, _, place = name.partition(" on ")
            number = places.index(place)
            axes.plot(
                *zip(*points, strict=True),
                color=path_colour(path),
                linestyle=_STYLES[number % len(_STYLES)] if name != DISPATCHER else "-",
                linewidth=2.2 if name == DISPATCHER else 1.2,
                marker=_MARKERS[number % len(_MARKERS)],
                markersize=3,
                label=name,
            )
        axes.set_title(f"SLA {sla:g} ms", fontsize=9)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.xaxis.set_major_locator(LogLocator(10, (1.0, 3.0)))
        axes.xaxis.set_minor_formatter(NullFormatter())
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(EngFormatter(sep=""))
        axes.set_xlabel("queries per second")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    panels[0][0].set_ylabel("correct predictions in time per second")
    legend = {}
    for axes in panels[0]:
        legend |= dict(zip(*axes.get_legend_handles_labels()[::-1], strict=True))
    figure.legend(
        legend.values(),
        legend.keys(),
        frameon=False,
        fontsize=7,
        loc="center left",
        bbox_to_anchor=(0.99, 0.5),
    )
    figure.suptitle(f"SIMULATED: {title}", fontsize=10)
    figure.tight_layout()
    figure.savefig(file, dpi=100, bbox_inches="tight")
    plt.close(figure)
