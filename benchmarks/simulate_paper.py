"""What a dispatcher gains on systems of the paper's kind. Everything here is simulated.

    python benchmarks/simulate_paper.py                # all systems, loads and SLAs, and pictures
    python benchmarks/simulate_paper.py --sensitivity  # the GPU's figures times and over 1.5

Devices are the descriptions of ``mprec.simulate``, qualities are the paper's (arXiv 2302.10872), and the
scheduler is the one that serves. Loads are multiples of what the table on the CPU can serve within the SLA.
Rows go to ``benchmarks/results/simulated.csv``, pictures to ``docs/pictures/``.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
from harness import append_csv

from mprec.arrivals import QuerySizes
from mprec.simulate import load_device, load_shape
from mprec.simulate.contest import DISPATCHER, capacity, compare, contestants, described, reference
from mprec.simulate.loads import LEAST_SLAS, draw

PICTURES = Path(__file__).parent.parent / "docs" / "pictures"
STARVED = {"gpu:v100": 200e6}  # bytes: decoders fit, tables do not
# name -> (devices, memory that differs from the description's)
SYSTEMS = {
    "cpu": (("cpu:broadwell",), {}),
    "cpu+gpu": (("cpu:broadwell", "gpu:v100"), {}),
    "cpu+gpu starved": (("cpu:broadwell", "gpu:v100"), STARVED),
    "cpu+tpu": (("cpu:broadwell", "tpu:v3-core"), {}),
    "cpu+ipu": (("cpu:broadwell", "ipu:gc200"), {}),
}
SLAS_MS = (5.0, 10.0, 50.0, 200.0)
LOADS = (0.1, 0.25, 0.5, 1.0, 2.0, 4.0)  # of the reference's capacity
MOST_QUERIES = 40_000  # a case that needs more to last long enough is left out
SENSITIVITY = {
    f"{field} {sign}1.5": {field: factor}
    for field in ("launch_overhead_s", "memory_bandwidth", "link_bandwidth", "compute_efficiency")
    for sign, factor in (("x", 1.5), ("/", 1 / 1.5))
}


def system(name: str, data: str, changes: dict[str, float]):
    """Executors of a system; ``changes``: factors on figures of its GPU. (A share stays at most 1.)"""
    shape, quality = load_shape(data)
    names, memory = SYSTEMS[name]
    executors = []
    for device in map(load_device, names):
        if device.name in memory:
            device = replace(device, memory_bytes=memory[device.name])
        if device.kind == "gpu":
            scaled = {field: getattr(device, field) * factor for field, factor in changes.items()}
            device = device.with_(
                **{k: min(v, 1.0) if k.endswith("efficiency") else v for k, v in scaled.items()}
            )
        executors.append(described(device, shape, quality))
    return executors


def study(
    name: str, data: str, sla_ms: float, load: float, queries: int, variant="", changes=None
) -> list[dict]:
    """Rows of all contestants at one load."""
    executors, sizes = system(name, data, changes or {}), QuerySizes()
    mean = float(sizes.draw(100_000, np.random.default_rng(0)).mean())
    most = capacity(contestants(executors)[reference(executors)], mean, sla_ms / 1e3)
    seconds = max(queries / (load * most), LEAST_SLAS * sla_ms / 1e3)
    if (needed := seconds * load * most) > MOST_QUERIES:
        print(f"{name}, {data}, SLA {sla_ms:g} ms, load {load:g}: left out, it takes {needed:.0f} queries")
        return []
    times, drawn = draw("poisson", load * most, seconds, sizes=sizes)
    rows = []
    for row in compare(executors, times, drawn, sla_s=sla_ms / 1e3, qps=load * most):
        found = row.to_dict()
        mix = {key: round(share, 4) for key, share in found["mix"].items() if share >= 5e-5}
        rows.append(
            {
                "simulated": "yes",
                "system": name,
                "devices": "+".join(executor.name for executor in executors),
                "variant": variant,
                "data": data,
                "sla_ms": sla_ms,
                "load": load,
                "qps": round(found["qps"], 1),
                "queries": found["queries"],
                "contestant": found["contestant"],
                "correct_per_s": round(found["correct_per_s"], 1),
                "ratio": "" if found["ratio"] is None else round(found["ratio"], 4),
                "late": round(found["late"], 5),
                "refused": round(found["refused"], 5),
                "p99_ms": "" if found["p99_ms"] is None else round(found["p99_ms"], 4),
                "mix": json.dumps(mix),
            }
        )
    return rows


def summary(rows: list[dict]) -> None:
    """The dispatcher beside the reference and the best static choice, a line for each load."""
    print(
        f"{'system':16} {'data':9} {'SLA ms':>6} {'load':>5} {'/reference':>10} {'/best static':>12}  variant"
    )
    cells = {}
    for row in rows:
        key = (row["system"], row["data"], row["sla_ms"], row["load"], row["variant"])
        cells.setdefault(key, {})[row["contestant"]] = row["correct_per_s"]
    for (name, data, sla, load, variant), found in cells.items():
        static = max(v for k, v in found.items() if k != DISPATCHER and not k.endswith(" on all"))
        base = next(v for k, v in found.items() if k.startswith("table on cpu"))
        mine = found[DISPATCHER]
        print(f"{name:16} {data:9} {sla:6g} {load:5g} {mine / base:10.3f} {mine / static:12.4f}  {variant}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--data", nargs="+", choices=("kaggle", "terabyte"), default=["kaggle", "terabyte"])
    parser.add_argument("--sla-ms", nargs="+", type=float, default=SLAS_MS)
    parser.add_argument("--loads", nargs="+", type=float, default=LOADS)
    parser.add_argument("--queries", type=int, default=20_000, help="of each run (20000)")
    parser.add_argument("--sensitivity", action="store_true", help="vary the GPU instead")
    parser.add_argument("--dry", action="store_true", help="write neither rows nor pictures")
    args = parser.parse_args()
    variants = SENSITIVITY if args.sensitivity else {"": {}}
    systems = [s for s in args.systems if not args.sensitivity or "gpu" in s]
    rows = []
    for name in systems:
        for data in args.data:
            here = [
                row
                for variant, changes in variants.items()
                for sla_ms in args.sla_ms
                for load in args.loads
                for row in study(name, data, sla_ms, load, args.queries, variant, changes)
            ]
            summary(here)
            rows += here
            if not args.dry and not args.sensitivity:
                from mprec.simulate.picture import draw as draw_picture

                PICTURES.mkdir(parents=True, exist_ok=True)
                file = PICTURES / f"simulated-{name.replace(' ', '-').replace('+', '-')}-{data}.png"
                draw_picture(here, f"{name}, Criteo {data}", file)
    if not args.dry:
        print(append_csv("simulated", rows))


if __name__ == "__main__":
    main()
