"""mprec against its peers and the machine's limits: one table, a row for each kind of work.

``python benchmarks/compare.py [--only SUBSTRING] [--seconds S] [--no-csv] [--list]``

Rows come from the ``compare_*.py`` files beside this one: each has ``rows(seconds, only)``, a generator of
`Row` (`only`: skip work whose name does not contain it), printed as they come, and may have ``names()``, the
list of its work. Every row names the target it is held to, so that
the table says *pass* or *short*. Peers that are not installed are left out, and the row says so.
"""

import argparse
import dataclasses
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import torch

sys.path.insert(0, str(Path(__file__).parent))
import ceilings
import harness

MODULES = (
    "compare_embedding_bag",
    "compare_optimizers",
    "compare_dhe",
    "compare_dispatch",
    "compare_cache",
    "compare_threads",
    "compare_whole_path",
    "compare_training",
)


@dataclasses.dataclass(frozen=True)
class Row:
    """One line: mprec's time for `work`, the peer's, their ratio (larger is better), and the target."""

    work: str
    peer: str
    mprec_us: float
    peer_us: float
    target: float
    note: str = ""

    @property
    def ratio(self) -> float:
        return self.peer_us / self.mprec_us

    @property
    def verdict(self) -> str:
        return "pass" if self.ratio >= self.target else "short"


def _sources() -> Iterator[tuple[str, ModuleType]]:
    for name in MODULES:
        if Path(__file__).with_name(f"{name}.py").exists():
            yield name, importlib.import_module(name)


def _line(*cells: str) -> str:
    forms = ("<70", "<31", ">10", ">10", ">6", ">6", ">5")
    return "  ".join(f"{cell:{form}}" for cell, form in zip(cells, forms, strict=True))


def _print(row: Row) -> None:
    numbers = f"{row.mprec_us:.2f}", f"{row.peer_us:.2f}", f"{row.ratio:.2f}", f"{row.target:g}"
    print(_line(row.work, row.peer, *numbers, row.verdict), row.note, sep="  ", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="rows whose source or work contains this text")
    parser.add_argument("--seconds", type=float, default=1.0, help="time for each comparison")
    parser.add_argument("--list", action="store_true", help="print the names of the work, measure nothing")
    parser.add_argument(
        "--no-csv", action="store_true", help="do not append to benchmarks/results/compare.csv"
    )
    args = parser.parse_args()
    if args.list:
        for source, module in _sources():
            print(source)
            for name in getattr(module, "names", list)():
                print(f"  {name}")
        return 0

    torch.set_num_threads(1)  # rows that compare threads set their own
    peak = ceilings.fma_peak()
    print(f"one core: {peak / 1e9:.0f} GFLOP/s float32, reads {_bandwidths()}", flush=True)
    print(_line("work", "peer", "mprec us", "peer us", "ratio", "target", ""))
    written = []
    with torch.inference_mode():
        for source, module in _sources():
            for row in module.rows(args.seconds, args.only if args.only not in source else ""):
                _print(row)
                written.append(
                    {
                        "work": row.work,
                        "peer": row.peer,
                        "mprec_us": f"{row.mprec_us:.3f}",
                        "peer_us": f"{row.peer_us:.3f}",
                        "ratio": f"{row.ratio:.3f}",
                        "target": row.target,
                        "verdict": row.verdict,
                        "note": row.note,
                    }
                )
    if written and not args.no_csv:
        print(f"appended to {harness.append_csv('compare', written)}")
    return 0


def _bandwidths() -> str:
    sizes = (("512 KiB", 512 << 10), ("8 MiB", 8 << 20), ("256 MiB", 256 << 20))
    return ", ".join(f"{name} {ceilings.read_bandwidth(size) / 1e9:.0f} GB/s" for name, size in sizes)


if __name__ == "__main__":
    sys.modules.setdefault("compare", sys.modules["__main__"])
    sys.exit(main())
