"""A profile for people: table, crossover points, curves as text and as a picture."""

from __future__ import annotations

import math
from itertools import combinations
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from rich import box
from rich.table import Table

from mprec.dispatch import Profile
from mprec.dispatch.curve import crossovers
from mprec.report.figures import path_colours

__all__ = ["crossover_table", "draw", "table", "text_chart"]


def _title(profile: Profile) -> str:
    where = profile.fingerprint
    text = f"{where.get('cpu')}, {where.get('isa')}, {where.get('threads')} thread(s)"
    return f"SIMULATED: {text}" if profile.simulated else text


def table(profile: Profile) -> Table:
    """Median and tail milliseconds of each path at each batch size."""
    sizes = sorted({size for name in profile.paths for size in profile.cells[name]["warm"]["batch_sizes"]})
    out = Table(
        title=f"milliseconds, median (p95); {_title(profile)}", box=box.SIMPLE_HEAD, title_justify="left"
    )
    out.add_column("batch", justify="right")
    for name in profile.paths:
        out.add_column(name, justify="right")
    for size in sizes:
        cells = []
        for name in profile.paths:
            cell = profile.cells[name]["warm"]
            if size not in cell["batch_sizes"]:
                cells.append("")
                continue
            i = cell["batch_sizes"].index(size)
            cells.append(f"{1e3 * cell['p50'][i]:.3f} ({1e3 * cell['p95'][i]:.3f})")
        out.add_row(str(size), *cells)
    return out


def crossover_table(profile: Profile) -> Table:
    """Which of two paths is faster where."""
    out = Table(title="crossover points (median)", box=box.SIMPLE_HEAD, title_justify="left")
    out.add_column("paths")
    out.add_column("batch sizes at which the faster one changes")
    for first, second in combinations(profile.paths, 2):
        a, b = profile.curve(first), profile.curve(second)
        points = crossovers(a, b)
        if points:
            text = ", ".join(f"{point:.0f}" for point in points)
        else:
            middle = math.sqrt(a.batch_sizes[0] * a.batch_sizes[-1])
            text = f"none: {first if a.at(middle) <= b.at(middle) else second} is faster throughout"
        out.add_row(f"{first} / {second}", text)
    return out


def text_chart(profile: Profile, width: int = 80, height: int = 18) -> str:
    """The curves with logarithmic axes, in plain characters, lines of at most ``width``."""
    width = max(width - 20, 16)  # of the axis: labels stand to its left, its unit to the right
    curves = {name: profile.curve(name) for name in profile.paths}
    low = min(c.batch_sizes[0] for c in curves.values())
    high = max(c.batch_sizes[-1] for c in curves.values())
    # Not the ends of the curves: where a second thread sets in, latency falls with the batch.
    bottom = min(min(c.seconds) for c in curves.values())
    top = max(max(c.seconds) for c in curves.values())
    columns = np.geomspace(low, high, width)
    span = math.log(top / bottom) or 1.0
    canvas = [[" "] * width for _ in range(height)]
    marks = {name: chr(ord("a") + i) for i, name in enumerate(curves)}
    for name, curve in curves.items():
        for x, seconds in enumerate(curve.at(columns)):
            y = round((height - 1) * (1 - math.log(seconds / bottom) / span))
            canvas[y][x] = marks[name]
    labels = {0: f"{1e3 * top:.3g} ms", height - 1: f"{1e3 * bottom:.3g} ms"}
    lines = [f"{labels.get(y, ''):>10} |{''.join(row)}" for y, row in enumerate(canvas)]
    axis = f"{'':>10} +{'-' * width}\n{'':>12}{low:<{width // 2}}{high:>{width - width // 2}} samples"
    legend = "   ".join(f"{mark} {name}" for name, mark in marks.items())
    return "\n".join([*lines, axis, f"{'':>12}{legend}"])


def draw(profile: Profile, file: Path) -> None:
    """PNG (or what the suffix says): median with the band up to p95, and the crossover points."""
    figure, axes = plt.subplots(figsize=(7, 4.5))
    colours = path_colours(profile.paths)
    for name in profile.paths:
        median, tail = profile.curve(name), profile.curve(name, "p95")
        sizes = np.array(median.batch_sizes)
        line = axes.plot(
            sizes,
            1e3 * np.array(median.seconds),
            marker="o",
            markersize=3,
            color=colours[name],
            label=name,
        )
        axes.fill_between(
            sizes, 1e3 * median.at(sizes), 1e3 * np.maximum(tail.at(sizes), median.at(sizes)),
            color=line[0].get_color(), alpha=0.12, linewidth=0,
        )  # fmt: skip
    for first, second in combinations(profile.paths, 2):
        curve = profile.curve(first)
        for point in crossovers(curve, profile.curve(second)):
            axes.plot(point, 1e3 * curve.at(point), marker="x", color="#444444")
            axes.annotate(
                f"{point:.0f}", (point, 1e3 * curve.at(point)), textcoords="offset points", xytext=(4, -10)
            )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("samples per batch")
    axes.set_ylabel("milliseconds: median, band to p95")
    axes.set_title(_title(profile), fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    figure.savefig(file, dpi=150, bbox_inches="tight")
    plt.close(figure)
