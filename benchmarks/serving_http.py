"""Requests per second over HTTP, by the client's clock, beside other servers.

    python benchmarks/serving_http.py
    python benchmarks/serving_http.py --server before=http://127.0.0.1:9000   # another, which runs already

A client in a process of its own keeps 1, 4, 16 and 64 connections busy: each asks again once it is answered.
The contestants serve the same DLRM of the Criteo Kaggle shape (random weights, tables of at most ``--rows``
rows, MLPs of the sizes that ``mprec train`` has by default) and take turns; FastAPI with a pydantic model of
the query is one where it is installed. An answer is late if it is whole at the client after the latency
target, counted from before the request was sent. Refused requests are counted apart, and the client asks
again at once. ``--client h2load`` takes the client of that name (nghttp2), which is written in C++ and takes
less of the server's cores; it sends one query again and again. Rows go to
``benchmarks/results/serving_http.csv``.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import resource
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import orjson
import torch
from harness import append_csv
from rich.console import Console
from rich.table import Table

from mprec import checkpoint
from mprec.data.zipf import zipf_batches
from mprec.models import DLRM
from mprec.nn import FeatureConfig
from mprec.serving.http import encode_query
from mprec.simulate.shapes import load_shape

DIM, NUM_DENSE = 16, 13
DISTINCT = 64  # queries that the client repeats
HERE = Path(__file__).parent
BODIES = {"json": "application/json", "binary": "application/octet-stream"}
READY_S = 180.0


def vocabularies(rows: int) -> list[int]:
    shape, _ = load_shape("kaggle")
    return [min(feature.num_embeddings, rows) for feature in shape.features]


def save_model(folder: Path, rows: int, hidden: list[int]) -> Path:
    torch.manual_seed(0)
    features = [FeatureConfig(f"C{t + 1}", size, DIM) for t, size in enumerate(vocabularies(rows))]
    model = DLRM(features, NUM_DENSE, DIM, bottom=hidden, top=hidden)
    file = folder / "table.pt"
    checkpoint.save(
        file, model, {"representation": "table", "metrics": {"valid": {"accuracy": 0.79, "auc": 0.79}}}
    )
    return file


def save_bodies(folder: Path, rows: int, samples: int) -> dict[str, list[str]]:
    """Files of the same queries in each form."""
    draw, rng = zipf_batches(vocabularies(rows), NUM_DENSE), np.random.default_rng(0)
    files = defaultdict(list)
    for number in range(DISTINCT):
        batch = draw(samples, rng)
        ids = batch.indices.numpy().reshape(-1, samples).T
        dense = batch.dense.numpy().round(4)
        rows_of_dense = [[round(value, 4) for value in row] for row in dense.tolist()]
        forms = {
            "json": orjson.dumps({"ids": ids.tolist(), "dense": rows_of_dense}),
            "binary": encode_query(ids, dense),
        }
        for form, body in forms.items():
            file = folder / f"{samples}-{number}.{form}"
            file.write_bytes(body)
            files[form].append(str(file))
    return files


@contextlib.contextmanager
def process(arguments: list) -> Iterator[subprocess.Popen]:
    child = subprocess.Popen([str(a) for a in arguments], stdout=subprocess.PIPE, text=True)
    try:
        yield child
    finally:
        child.terminate()
        child.communicate()


@contextlib.contextmanager
def ours(file: Path, sla_ms: float, options: list[str]) -> Iterator[tuple[str, int]]:
    command = [sys.executable, "-c", "import sys; from mprec.cli import main; sys.exit(main())", "serve"]
    command += ["--json", "--port", 0, "--sla-ms", sla_ms, *options, "--checkpoints", file]
    with process(command) as child:
        address = address_of(json.loads(child.stdout.readline())["url"])
        wait_until_ready(f"http://{address[0]}:{address[1]}/readyz", child)
        yield address


@contextlib.contextmanager
def fastapi(file: Path) -> Iterator[tuple[str, int]]:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = taken.getsockname()
    with process([sys.executable, HERE / "serving_http_peer.py", file, address[1]]) as child:
        wait_until_ready(f"http://{address[0]}:{address[1]}/openapi.json", child)
        yield address


def bodies_of(url: str) -> list[str]:
    """In what forms a server takes queries."""
    try:
        with urllib.request.urlopen(f"{url}/openapi.json", timeout=5) as reply:
            text = reply.read().decode()
    except OSError:
        return ["json"]
    return [form for form, content_type in BODIES.items() if form == "json" or content_type in text]


def address_of(url: str) -> tuple[str, int]:
    parts = urlsplit(url)
    return parts.hostname, parts.port


def wait_until_ready(url: str, child: subprocess.Popen) -> None:
    deadline = time.monotonic() + READY_S
    while True:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            if child.poll() is not None or time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def by_python(about: dict) -> dict:
    """What ``serving_http_client.py`` finds."""
    done = subprocess.run(
        [sys.executable, HERE / "serving_http_client.py"],
        input=json.dumps(about),
        stdout=subprocess.PIPE,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"the client failed at {about['address']}")
    return json.loads(done.stdout)


def by_h2load(about: dict) -> dict:
    """The same, from h2load's log: when each request was sent, its status, and how long it took, in us."""
    host, port = about["address"]
    with tempfile.TemporaryDirectory() as name:
        log = Path(name) / "log"
        ms = round(1e3 * (about["seconds"] + about["warm"]))
        command = ["h2load", "--h1", "-c", about["connections"], "-D", f"{ms}ms"]
        command += ["-d", about["bodies"][0], "-H", f"content-type: {about['content_type']}"]
        command += ["--log-file", log, f"http://{host}:{port}/score"]
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([str(word) for word in command], stdout=subprocess.DEVNULL, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        sent, status, took = np.loadtxt(log, dtype=np.int64, delimiter="\t", unpack=True, ndmin=2)
    counted = sent + took >= sent.min() + about["warm"] * 1e6
    statuses, counts = np.unique(status[counted & (status != 200)], return_counts=True)
    return {
        "latencies": took[counted & (status == 200)] / 1e6,
        "others": {str(s): int(n) for s, n in zip(statuses, counts, strict=True)},
        "seconds": about["seconds"],
        "cpu": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
    }


CLIENTS = {"python": by_python, "h2load": by_h2load}


def measure(address, form: str, files: list[str], connections: int, args) -> dict:
    about = {
        "address": address,
        "bodies": files,
        "content_type": BODIES[form],
        "connections": connections,
        "seconds": args.seconds,
        "warm": args.warm_seconds,
    }
    found = CLIENTS[args.client](about)
    latencies = np.array(found["latencies"]) * 1e3
    refused = sum(n for status, n in found["others"].items() if status in ("429", "503", "504"))
    late = latencies > args.sla_ms
    return {
        "answered_per_s": len(latencies) / found["seconds"],
        "in_time_per_s": float((~late).sum()) / found["seconds"],
        "late_share": float(late.mean()) if len(late) else float("nan"),
        "refused_per_s": refused / found["seconds"],
        "failed": sum(found["others"].values()) - refused,
        "p50_ms": float(np.median(latencies)) if len(late) else float("nan"),
        "p99_ms": float(np.percentile(latencies, 99)) if len(late) else float("nan"),
        "machine_load": os.getloadavg()[0],
        "client_cpu": found["cpu"] / (args.seconds + args.warm_seconds),
    }


def show(rows: list[dict]) -> None:
    """Means over the repetitions."""
    groups = defaultdict(list)
    for row in rows:
        groups[row["samples"], row["connections"], row["server"], row["body"]].append(row)
    table = Table("samples", "connections", "server", "body", "answered/s", "in time/s", "late", "refused/s")
    table.add_column("p50 ms")
    table.add_column("p99 ms")
    for (samples, connections, server, body), some in groups.items():

        def mean(key: str, some=some) -> float:
            return float(np.mean([row[key] for row in some]))

        rates = [row["answered_per_s"] for row in some]
        error = np.std(rates, ddof=1) / len(rates) ** 0.5 if len(rates) > 1 else float("nan")
        table.add_row(
            *(str(samples), str(connections), server, body, f"{mean('answered_per_s'):.0f} ± {error:.0f}"),
            *(f"{mean('in_time_per_s'):.0f}", f"{100 * mean('late_share'):.1f} %"),
            *(f"{mean('refused_per_s'):.0f}", f"{mean('p50_ms'):.2f}", f"{mean('p99_ms'):.2f}"),
        )
    Console(width=110).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=100_000, help="the most rows of a table (100000)")
    parser.add_argument("--hidden", type=int, nargs="+", default=[64, 32], help="sizes of each MLP (64 32)")
    parser.add_argument("--sla-ms", type=float, default=10.0)
    parser.add_argument("--seconds", type=float, default=1.5, help="of each measurement (1.5)")
    parser.add_argument("--warm-seconds", type=float, default=0.3, help="before it (0.3)")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--samples", type=int, nargs="+", default=[128, 1])
    parser.add_argument("--connections", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--bodies", nargs="+", choices=list(BODIES), default=list(BODIES))
    parser.add_argument("--client", choices=list(CLIENTS), default="python")
    parser.add_argument("--server", action="append", default=[], metavar="NAME=URL", help="takes our JSON")
    parser.add_argument(
        "--serve", action="append", metavar="NAME=OPTIONS", help="of mprec serve (mprec=, several in turn)"
    )
    parser.add_argument("--only-running", action="store_true", help="no contestants but those of --server")
    parser.add_argument("--no-csv", action="store_true")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        file = save_model(folder, args.rows, args.hidden)
        contestants = {}
        for entry in [] if args.only_running else args.serve or ["mprec="]:
            who, _, options = entry.partition("=")
            address = stack.enter_context(ours(file, args.sla_ms, options.split()))
            contestants[who] = address, args.bodies
        if not args.only_running and importlib.util.find_spec("fastapi") is not None:
            contestants["fastapi"] = stack.enter_context(fastapi(file)), ["json"]
        for entry in args.server:
            who, _, url = entry.partition("=")
            contestants[who] = address_of(url), bodies_of(url)
        for samples in args.samples:
            bodies = save_bodies(folder, args.rows, samples)
            for connections in args.connections:
                for repetition in range(args.repetitions):
                    for who, (address, forms) in contestants.items():
                        for form in forms:
                            if form in args.bodies:
                                cell = {"samples": samples, "connections": connections, "server": who}
                                cell |= {"body": form, "sla_ms": args.sla_ms, "repetition": repetition}
                                cell |= measure(address, form, bodies[form], connections, args)
                                rows.append(cell)
    show(rows)
    if not args.no_csv:
        append_csv("serving_http", rows)


if __name__ == "__main__":
    main()
