"""Tables and pictures of ``derived.csv`` and ``cce.csv``: means over seeds with their standard deviations.

    python benchmarks/quality_tables.py

prints the tables and draws ``docs/pictures/quality-*.png``. The documentation's site makes the tables anew.
"""

import csv
import statistics
from collections.abc import Iterable
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
PICTURES = Path(__file__).parents[1] / "docs" / "pictures"
#: (training, path) -> what a reader calls it; of other paths of ``mapped`` their recipe.
NAMES = {
    ("mapped", "table"): "table, mapped in training (the default)",
    ("table", "table"): "table, not mapped",
    ("mapped + dhe", "mixed"): "mapped, and a DHE beside the two largest features",
    ("hybrid", "hybrid"): "hybrid, not mapped",
    ("low rank", "low_rank"): "low rank, trained",
    ("dhe", "dhe"): "DHE, trained",
    ("hot + dhe", "hot_dhe"): "rows for one ID in 16, a DHE for the others, trained",
    ("hot + low rank", "hot_low_rank"): "rows for one ID in 16, low rank for the others, trained",
}
BASE = ("mapped", "table")


def rows_of(name: str) -> list[dict[str, str]]:
    path = RESULTS / f"{name}.csv"
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def spread(values: Iterable[float], digits: int = 4, sign: str = "") -> str:
    """Mean ± standard deviation; of one value the value."""
    values = list(values)
    mean = f"{statistics.fmean(values):{sign}.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def forms(data: str) -> dict[tuple[str, str], dict[str, dict[str, str]]]:
    """Rows by (training, path) and seed."""
    found: dict[tuple[str, str], dict[str, dict[str, str]]] = {}
    for row in rows_of("derived"):
        if row["data"] == data:
            found.setdefault((row["training"], row["path"]), {})[row["seed"]] = row
    return found


def sizes(by_seed: dict[str, dict[str, str]]) -> float:
    return statistics.fmean(float(row["embedding_bytes"]) for row in by_seed.values())


def table(data: str) -> str:
    """Forms of one dataset, most bytes first; differences are to the mapped table of the same seed."""
    found = forms(data)
    base = found[BASE]
    lines = ["| form | kB | of a table | AUC | AUC less the mapped table's | log-loss | seeds |"]
    lines.append("|---|---|---|---|---|---|---|")
    for key, by_seed in sorted(found.items(), key=lambda item: -sizes(item[1])):
        differences = [float(row["auc"]) - float(base[s]["auc"]) for s, row in by_seed.items() if s in base]
        lines.append(
            f"| {NAMES.get(key) or f'`{key[1]}`'} | {sizes(by_seed) / 1e3:.1f} "
            f"| {sizes(by_seed) / sizes(base):.3f} | {spread(float(r['auc']) for r in by_seed.values())} "
            f"| {spread(differences, sign='+') if key != BASE and differences else ''} "
            f"| {spread(float(r['log_loss']) for r in by_seed.values())} | {len(by_seed)} |"
        )
    return "\n".join(lines)


def cce() -> dict[str, dict[tuple[str, int], list[float]]]:
    """AUCs by source (``ours``, ``published``) and (form, budget)."""
    found: dict[str, dict[tuple[str, int], list[float]]] = {"ours": {}, "published": {}}
    for source, file in (("ours", "cce"), ("published", "cce_published")):
        for row in rows_of(file):
            found[source].setdefault((row["form"], int(row["budget"])), []).append(float(row["auc"]))
    return found


def cce_table() -> str:
    found = cce()
    budgets = sorted({budget for rows in found.values() for _, budget in rows if budget})
    lines = ["| | " + " | ".join(f"{budget}" for budget in budgets) + " |", "|---" * (len(budgets) + 1) + "|"]
    for source, rows in found.items():
        for form in dict.fromkeys(form for form, _ in rows):
            cells = []
            for budget in budgets:
                values = rows.get((form, budget)) or rows.get((form, 0))  # 0: whatever the budget
                cells.append(spread(values, 3 if source == "published" else 4) if values else "")
            lines.append(f"| {form}, {source} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw_forms(data: str) -> None:
    import matplotlib.pyplot as plt

    found = forms(data)
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    families = {
        "table": "rows",
        "low_rank": "low rank, int8, of the mapped rows",
        "dhe": "DHE taught by them",
    }
    drawn = {name: [] for name in families.values()}
    for (training, path), by_seed in found.items():
        if "/" in path:
            continue
        aucs = [float(row["auc"]) for row in by_seed.values()]
        point = sizes(by_seed) / 1e3, statistics.fmean(aucs), statistics.stdev(aucs) if len(aucs) > 1 else 0
        if training == "mapped":
            drawn[families[path.split(":")[0].split("[")[0]]].append(point)
        else:
            axes.errorbar(*point, fmt="x", capsize=3, label=NAMES[training, path])
    for (name, points), style in zip(drawn.items(), ("o-", "s-", "^-"), strict=True):
        if points:
            x, y, errors = zip(*sorted(points), strict=True)
            axes.errorbar(x, y, errors, fmt=style, capsize=3, label=name)
    axes.set(xscale="log", xlabel="kB of embeddings", ylabel="AUC, mean ± s.d. over seeds", title=data)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(PICTURES / f"quality-{data}.png", dpi=110)
    plt.close(figure)


def draw_cce() -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for source, rows in cce().items():
        marked = "o-" if source == "ours" else "x--"
        for form in dict.fromkeys(form for form, _ in rows):
            points = sorted((budget, values) for (f, budget), values in rows.items() if f == form)
            means = [statistics.fmean(values) for _, values in points]
            if points[0][0] == 0:
                style = "-" if source == "ours" else "--"
                grey = "lightgrey" if form == "mapped" else "grey"
                axes.axhline(means[0], ls=style, lw=1.5, color=grey, label=f"{form}, {source}")
                continue
            errors = [statistics.stdev(values) if len(values) > 1 else 0 for _, values in points]
            budgets = [budget for budget, _ in points]
            axes.errorbar(budgets, means, errors, fmt=marked, capsize=3, label=f"{form}, {source}")
    axes.set(xscale="log", xlabel="parameters per dimension and table", ylabel="AUC of held-out ratings")
    axes.set_title("MovieLens-1M, factorisation, 32 dimensions")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(PICTURES / "quality-cce.png", dpi=110)
    plt.close(figure)


def main() -> None:
    for data in dict.fromkeys(row["data"] for row in rows_of("derived")):
        print(f"\n{data}\n\n{table(data)}")
        draw_forms(data)
    if rows_of("cce"):
        print(f"\nCCE's protocol\n\n{cce_table()}")
        draw_cce()


if __name__ == "__main__":
    main()
