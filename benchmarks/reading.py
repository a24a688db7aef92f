"""How fast a log in Criteo's format is read: by mprec the first time and from its cache, and by peers.

    python benchmarks/reading.py train.txt

Each reader runs in a process of its own. Rows per second of wall clock and of CPU time, and the process's
peak of resident memory (mapped files included) go to ``benchmarks/results/reading.csv``. *read* means that
the peer only parses columns of integers and text; *dictionary* that categories become codes too. The first
reading by mprec makes vocabularies and writes the cache.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time

import harness

NAMES = ["label", *(f"I{i}" for i in range(1, 14)), *(f"C{i}" for i in range(1, 27))]


def mprec(file: str, cache: str) -> int:
    from mprec import data

    return len(data.load(f"criteo:{file},cache={cache}"))


def polars(file: str, cache: str) -> int:
    import polars as pl

    kinds = {name: pl.String if name.startswith("C") else pl.Int64 for name in NAMES}
    return len(pl.read_csv(file, separator="\t", has_header=False, schema=kinds))


def polars_dictionary(file: str, cache: str) -> int:
    import polars as pl

    kinds = {name: pl.Categorical if name.startswith("C") else pl.Int64 for name in NAMES}
    return len(pl.read_csv(file, separator="\t", has_header=False, schema=kinds))


def pyarrow_dictionary(file: str, cache: str) -> int:
    import pyarrow as pa
    from pyarrow import csv

    kinds = {name: pa.dictionary(pa.int32(), pa.string()) if name[0] == "C" else pa.int64() for name in NAMES}
    return csv.read_csv(
        file,
        read_options=csv.ReadOptions(column_names=NAMES),
        parse_options=csv.ParseOptions(delimiter="\t"),
        convert_options=csv.ConvertOptions(column_types=kinds),
    ).num_rows


READERS = {
    "mprec, first": mprec,
    "mprec, from its cache": mprec,
    "polars, read": polars,
    "polars, dictionary": polars_dictionary,
    "pyarrow, dictionary": pyarrow_dictionary,
}


def measure(name: str, file: str, cache: str) -> None:
    """In a process of its own: prints a line of JSON."""
    import resource

    if name.startswith("mprec"):
        import mprec.data  # noqa: F401 - importing torch is no reading
    start, cpu = time.perf_counter(), time.process_time()
    rows = READERS[name](file, cache)
    wall, cpu = time.perf_counter() - start, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps({"rows": rows, "wall_s": wall, "cpu_s": cpu, "peak_gib": peak}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file")
    parser.add_argument("--readers", nargs="+", choices=READERS, default=list(READERS))
    parser.add_argument("--cache", help="folder for the cache (a temporary one)")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        measure(args.only, args.file, args.cache)
        return
    with tempfile.TemporaryDirectory(dir=args.cache) as cache:
        for name in args.readers:
            command = [sys.executable, __file__, args.file, "--only", name, "--cache", cache]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                print(f"{name}: {done.stderr.strip().splitlines()[-1]}")
                continue
            found = json.loads(done.stdout)
            row = {
                "reader": name,
                "rows": found["rows"],
                "wall_s": f"{found['wall_s']:.3f}",
                "cpu_s": f"{found['cpu_s']:.3f}",
                "rows_per_s": f"{found['rows'] / found['wall_s']:.0f}",
                "rows_per_cpu_s": f"{found['rows'] / max(found['cpu_s'], 1e-9):.0f}",
                "peak_gib": f"{found['peak_gib']:.2f}",
            }
            harness.append_csv("reading", [row])
            print(*row.values())


if __name__ == "__main__":
    main()
