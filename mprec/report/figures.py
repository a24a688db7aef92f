"""The page's pictures, as inline SVG text."""

import io
import itertools
from collections.abc import Iterable, Mapping

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter, PercentFormatter

from mprec.report.verdict import dispatcher_row, ranked
from mprec.representations import REPRESENTATIONS, SELECT

__all__ = [
    "chosen_shares",
    "correct_throughput",
    "latency_curves",
    "learning_curve",
    "path_colour",
    "path_colours",
    "quality_against_size",
]

# Okabe and Ito's palette: told apart by colour-blind readers.
_COLOURS = {
    **{found.name: found.colour for found in REPRESENTATIONS.values()},
    SELECT: "#009E73",
    "dispatcher": "#222222",
}


# Of paths beyond the four representations: what is left of that palette, and others that differ.
_FURTHER = ("#E69F00", "#56B4E9", "#8C564B", "#999999", "#882255", "#44AA99", "#F0E442")


def path_colour(path: str) -> str:
    """The colour of a path's curves and bars; grey for other paths."""
    return _COLOURS.get(path, "#777777")


def path_colours(paths: Iterable[str]) -> dict[str, str]:
    """The colours of several paths in one picture: those beyond the four representations take turns."""
    further = itertools.cycle(_FURTHER)
    return {path: _COLOURS.get(path) or next(further) for path in dict.fromkeys(paths)}


def _colours(result: Mapping) -> dict[str, str]:
    """The same in every picture of a result."""
    return path_colours(entry["representation"] for entry in result["representations"])


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    # A fixed hash salt and no date make equal results equal pages.
    with plt.rc_context({"svg.hashsalt": "mprec"}):
        figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)
    return buffer.getvalue()[buffer.getvalue().index("<svg") :]


def _axes(xlabel: str, ylabel: str) -> tuple[Figure, plt.Axes]:
    figure, axes = plt.subplots(figsize=(5.6, 3.6))
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    return figure, axes


def latency_curves(result: Mapping) -> str:
    """Measured latency over batch size, one line a path, and the SLA."""
    figure, axes = _axes("samples per batch", "milliseconds (median)")
    colours = _colours(result)
    for entry in result["representations"]:
        points = sorted((int(batch), ms) for batch, ms in entry.get("curve_ms", entry["latency_ms"]).items())
        name = entry["representation"]
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3, color=colours[name], label=name)
    axes.axhline(result["load"]["sla_ms"], color="#999999", linestyle="--", linewidth=1)
    axes.annotate(
        "SLA", (1, result["load"]["sla_ms"]), textcoords="offset points", xytext=(2, 3), color="#777777"
    )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
    axes.legend(frameon=False)
    return _svg(figure)


def quality_against_size(result: Mapping) -> str:
    """AUC over embedding memory: up and left is better."""
    figure, axes = _axes("embedding memory, KiB", "AUC on the test split")
    colours = _colours(result)
    # Names of neighbours stand at different heights.
    heights = itertools.cycle((8, -16, 22, -30))
    for entry in sorted(result["representations"], key=lambda entry: entry["embedding_bytes"]):
        name = entry["representation"]
        x, y = entry["embedding_bytes"] / 1024, entry["auc"]
        axes.scatter(x, y, color=colours[name], s=45)
        place = {"textcoords": "offset points", "xytext": (0, next(heights)), "ha": "center"}
        axes.annotate(name, (x, y), color=colours[name], fontsize=8, **place)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    # Sizes within one power of ten would leave the axis with one label or none.
    axes.xaxis.set_major_locator(LogLocator(10, (1.0, 2.0, 5.0)))
    axes.margins(x=0.25, y=0.2)
    low, high = axes.get_xlim()
    axes.set_xlim(low / 1.5, high * 1.5)
    return _svg(figure)


def correct_throughput(result: Mapping) -> str:
    """Correct predictions per second within the SLA, a bar a path; a line on it is one standard error."""
    figure, axes = _axes("", "correct predictions in time per second")
    rows, colours = ranked(result), _colours(result)
    bars = axes.bar(
        [row["path"] for row in rows],
        [row["correct_per_s"] for row in rows],
        yerr=[row.get("correct_per_s_error") or 0.0 for row in rows],
        capsize=3,
        color=[colours.get(row["path"], path_colour(row["path"])) for row in rows],
    )
    axes.bar_label(bars, fmt="{:,.0f}", fontsize=8, padding=2)
    axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    axes.margins(y=0.12)
    if len(rows) > 5:
        axes.tick_params(axis="x", rotation=20)
    axes.grid(False)
    return _svg(figure)


def chosen_shares(result: Mapping) -> str:
    """Share of samples that the dispatcher answered by each path: of its own row, whatever its place."""
    row = dispatcher_row(result)
    chosen = row.get("chosen", {}) if row else {}
    figure, axes = _axes("share of the samples that were answered", "")
    figure.set_figheight(1.4)
    colours = _colours(result)
    left = 0.0
    for name, share in chosen.items():
        axes.barh(
            [row["path"]],
            [share],
            left=left,
            color=colours.get(name, path_colour(name)),
            label=f"{name} {share:.0%}",
        )
        left += share
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.grid(False)
    if chosen:
        axes.legend(frameon=False, ncols=min(len(chosen), 4), loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return _svg(figure)


def learning_curve(result: Mapping) -> str:
    """AUC of the trained model on the validation split after each epoch."""
    figure, axes = _axes("epoch", "AUC on the validation split")
    name, history = result["training"]["representation"], result["training"]["history"]
    axes.plot(range(1, len(history) + 1), history, marker="o", markersize=3, color=path_colour(name))
    axes.xaxis.get_major_locator().set_params(integer=True)
    return _svg(figure)
