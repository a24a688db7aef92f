"""What an engine does in real time, beside other servers and beside its own simulation.

    python benchmarks/serving.py overload     # 3 times too much for 60 s
    python benchmarks/serving.py soak         # 10 minutes at 80 %
    python benchmarks/serving.py artifact     # the same engine over one path of plain torch
    python benchmarks/serving.py simulator    # throughput and p99, predicted and measured
    python benchmarks/serving.py single       # what the engine adds to a query of one sample

Loads of real queries at many shares and latency targets are ``mprec loadtest``'s. Here the model is a DLRM of
the Criteo Kaggle shape with random weights (tables of at most ``--rows`` rows), and qualities are those that
the paper gives for its representations: what is measured is time. Rows go to
``benchmarks/results/serving_*.csv``.
"""

from __future__ import annotations

import argparse
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from harness import append_csv
from torch import nn

from mprec.arrivals import LOGNORMAL_SIZES, Poisson
from mprec.bags import Bags
from mprec.data import Batch
from mprec.data.zipf import zipf_batches
from mprec.dispatch import Dispatcher, Profile, ScoringPath
from mprec.dispatch.microbenchmark import no_collection
from mprec.models import DLRM
from mprec.nn import DheConfig, FeatureConfig, with_representation
from mprec.paths import Scorer
from mprec.serving import Engine, LocalExecutor
from mprec.serving.engine import QueryRefusedError
from mprec.serving.loadtest import capacity as measured_capacity
from mprec.simulate import Result, SimulatedExecutor, simulate
from mprec.simulate.contest import measured
from mprec.simulate.shapes import PAPER_QUALITY, load_shape

DIM, NUM_DENSE = 16, 13
DHE = DheConfig(k=64, hidden=(64,))
QUALITY = PAPER_QUALITY["kaggle"]
DISTINCT = 4096  # queries that a load repeats
WARM_UP = 100  # queries before a load


def vocabularies(rows: int) -> list[int]:
    shape, _ = load_shape("kaggle")
    return [min(feature.num_embeddings, rows) for feature in shape.features]


def paths(rows: int, names=("table", "dhe", "hybrid"), dense: str = "float32") -> list[ScoringPath]:
    """Untrained models of the Kaggle shape, one for each representation, with dense layers in ``dense``."""
    made = []
    for name in names:
        features = [FeatureConfig(str(t), size, DIM) for t, size in enumerate(vocabularies(rows))]
        model = (
            DLRM(with_representation(features, name, dhe=DHE), NUM_DENSE, DIM).eval().requires_grad_(False)
        )
        made.append(Scorer(model, dense).path(name, name, QUALITY[name], name))
    return made


class Scores(nn.Module):
    """Click probabilities of a batch by a model of (dense, bags)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    @torch.inference_mode()
    def forward(self, batch: Batch) -> torch.Tensor:
        return self.model(batch.dense, batch.bags).sigmoid()


class PlainTorch(nn.Module):
    """The same DLRM as the paper's artifact has it: an ``nn.EmbeddingBag``, or hashes and an MLP, for each
    feature in turn, and the interaction by ``bmm``."""

    def __init__(self, rows: int, representation: str) -> None:
        super().__init__()
        sizes = vocabularies(rows)
        if representation == "table":
            self.features = nn.ModuleList(nn.EmbeddingBag(n, DIM, mode="sum") for n in sizes)
        else:
            self.features = nn.ModuleList(PlainDhe() for _ in sizes)
        pairs = len(sizes) * (len(sizes) + 1) // 2
        self.bottom = nn.Sequential(
            *(nn.Linear(NUM_DENSE, 512), nn.ReLU(), nn.Linear(512, 256), nn.ReLU()),
            *(nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, DIM), nn.ReLU()),
        )
        self.top = nn.Sequential(
            *(nn.Linear(DIM + pairs, 512), nn.ReLU(), nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 1))
        )
        rows_, columns = torch.tril_indices(len(sizes) + 1, len(sizes) + 1, offset=-1)
        self.register_buffer("pair_rows", rows_)
        self.register_buffer("pair_columns", columns)

    def forward(self, dense: torch.Tensor, bags: Bags) -> torch.Tensor:
        x, batch, vectors = self.bottom(dense), len(dense), []
        indices, offsets = bags.indices, bags.offsets
        for t, feature in enumerate(self.features):
            starts = offsets[t * batch : (t + 1) * batch + 1]
            vectors.append(feature(indices[starts[0] : starts[-1]], starts[:-1] - starts[0]))
        stacked = torch.stack([x, *vectors], dim=1)
        products = torch.bmm(stacked, stacked.transpose(1, 2))
        return self.top(torch.cat([x, products[:, self.pair_rows, self.pair_columns]], dim=1)).squeeze(1)


class PlainDhe(nn.Module):
    """The artifact's encoder, ((a x + b) mod p) mod m scaled to [-1, 1], and an MLP; bags of one ID."""

    P, M = 1_000_003, 1_000_000

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("a", torch.randint(1, self.P, (DHE.k,)))
        self.register_buffer("b", torch.randint(0, self.P, (DHE.k,)))
        widths = [DHE.k, *DHE.hidden]
        layers = [m for i, o in pairwise(widths) for m in (nn.Linear(i, o), nn.ReLU())]
        self.decoder = nn.Sequential(*layers, nn.Linear(widths[-1], DIM))

    def forward(self, ids: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        hashed = (ids[:, None] * self.a + self.b) % self.P % self.M
        return self.decoder(hashed.float() * (2 / (self.M - 1)) - 1)


@dataclass
class Watch:
    """What becomes of every query of a long run, in memory that is there from the start."""

    batches: list[Batch]
    which: np.ndarray  # of the batches, by query
    sla_s: float
    ended: np.ndarray = field(init=False)  # times that a query ended
    latencies: np.ndarray = field(init=False)  # seconds from its due time; NaN if it was not answered
    correct: np.ndarray = field(init=False)  # expected correct predictions of an answer in time
    refused: Counter = field(default_factory=Counter)
    failed: int = 0

    def __post_init__(self) -> None:
        count = len(self.which)
        self.ended = np.zeros(count, dtype=np.uint8)
        self.latencies = np.full(count, np.nan)
        self.correct = np.zeros(count)

    def end(self, i: int, due: float, future) -> None:
        self.ended[i] += 1
        error = future.exception()
        if isinstance(error, QueryRefusedError):
            self.refused[error.reason] += 1
        elif error is not None:
            self.failed += 1
        else:
            answer = future.result()
            self.latencies[i] = answer.finished_s - due
            if self.latencies[i] <= self.sla_s:
                self.correct[i] = sum(count * QUALITY[path] for path, count in answer.paths.items())


def run(engine: Engine, watch: Watch, times: np.ndarray) -> np.ndarray:
    """Submit queries when they are due and wait until each has ended. Resident bytes, every second."""
    for future in [engine.submit(batch, sla_s=60.0) for batch in watch.batches[:WARM_UP]]:
        future.result()  # first calls are slow, in a new process most of all
    memory, done = [], threading.Event()

    def look() -> None:
        while not done.wait(1.0):
            memory.append(int(Path("/proc/self/statm").read_text().split()[1]) * 4096)

    looker = threading.Thread(target=look, daemon=True)
    looker.start()
    start = engine.clock()
    for i, at in enumerate(times.tolist()):
        due = start + at
        if (wait := due - engine.clock()) > 0:
            time.sleep(wait)
        future = engine.submit(watch.batches[watch.which[i]], arrived_s=due)
        future.add_done_callback(lambda future, i=i, due=due: watch.end(i, due, future))
    engine.close()
    done.set()
    looker.join()
    return np.array(memory)


def loads(rate: float, seconds: float, seed: int, rows: int) -> tuple[np.ndarray, list[Batch], np.ndarray]:
    """(due times, distinct batches, the batch of each query)."""
    rng = np.random.default_rng(seed)
    times = Poisson(rate).times(seconds, rng)
    draw = zipf_batches(vocabularies(rows), NUM_DENSE)
    batches = [draw(int(size), rng) for size in LOGNORMAL_SIZES.draw(min(DISTINCT, len(times)), rng)]
    return times, batches, rng.integers(len(batches), size=len(times))


def profile_of(some: list[ScoringPath], rows: int, seconds: float = 8.0) -> Profile:
    draw = zipf_batches(vocabularies(rows), NUM_DENSE)
    return Profile.measure(some, make_input=draw, seconds=seconds)


def serve(
    some, profile: Profile, sla_s: float, share: float, capacity: float, args, seconds: float, seed: int
):
    times, batches, which = loads(share * capacity, seconds, seed, args.rows)
    watch = Watch(batches, which, sla_s)
    with no_collection():
        memory = run(Engine(Dispatcher(some, profile), sla_s=sla_s).start(), watch, times)
    return times, watch, memory


def capacity_of(some, profile: Profile, args) -> float:
    """Queries per second of the fastest path when all of them wait."""
    _, batches, _ = loads(400.0, 1.0, 99, args.rows)
    rates = {p.name: measured_capacity(Dispatcher([p], profile), batches[:300], repeats=3) for p in some}
    print({name: round(rate) for name, rate in rates.items()}, "queries per second")
    return max(rates.values())


def endurance(args, share: float, seconds: float) -> None:
    some = paths(args.rows)
    profile = profile_of(some, args.rows)
    capacity = capacity_of(some, profile, args)
    peak = 0.0
    for load in (0.9, 1.1, 1.3, 1.6):  # five seconds each
        times, watch, _ = serve(
            some, profile, args.sla_ms / 1e3, load, capacity, args, 5.0, seed=int(10 * load)
        )
        peak = max(peak, watch.correct.sum() / 5.0)
    times, watch, memory = serve(some, profile, args.sla_ms / 1e3, share, capacity, args, seconds, seed=1)
    answered = np.isfinite(watch.latencies)
    late = float((watch.latencies[answered] > watch.sla_s).mean())
    settled = memory[min(10, len(memory) // 4) :]
    row = {
        "load": share,
        "sla_ms": args.sla_ms,
        "qps": len(times) / seconds,
        "queries": len(times),
        "ended_once": bool((watch.ended == 1).all()),
        "refused": sum(watch.refused.values()) / len(times),
        "failed": watch.failed,
        "late_of_answered": late,
        "p99_ms": 1e3 * float(np.percentile(watch.latencies[answered], 99)),
        "correct_per_s": watch.correct.sum() / seconds,
        "of_peak": watch.correct.sum() / seconds / peak,
        "rss_growth": float(settled[-1] / settled[0] - 1),
    }
    report("endurance", row)


def artifact(args) -> None:
    ours = paths(args.rows, dense=args.dense)
    precision = "" if args.dense == "float32" else f"/{args.dense}"  # as recipes of mprec derive name paths
    for representation in ("table", "dhe"):
        model = PlainTorch(args.rows, representation).eval().requires_grad_(False)
        name = f"artifact {representation}"
        QUALITY[name] = QUALITY[representation]
        plain = [ScoringPath(name, representation, QUALITY[name], Scores(model))]
        # Ours may not be less accurate than theirs.
        better = [p for p in ours if p.quality >= QUALITY[representation]]
        profiles = {"artifact": profile_of(plain, args.rows), "mprec": profile_of(better, args.rows)}
        limit = capacity_of(plain, profiles["artifact"], args)
        for share in (1.0, 2.0, 4.0, 8.0):
            rates: dict[str, list[float]] = {"artifact": [], "mprec": []}
            for repetition in range(args.repetitions):
                for who, some in (("artifact", plain), ("mprec", better)):
                    _, watch, _ = serve(
                        some, profiles[who], args.sla_ms / 1e3, share, limit, args, args.seconds, repetition
                    )
                    rates[who].append(watch.correct.sum() / args.seconds)
            ratios = np.array(rates["mprec"]) / np.array(rates["artifact"])
            report(
                "artifact",
                {
                    "representation": f"{representation}{precision}",
                    "load": share,
                    "sla_ms": args.sla_ms,
                    "artifact_correct_per_s": float(np.mean(rates["artifact"])),
                    "correct_per_s": float(np.mean(rates["mprec"])),
                    "ratio": float(np.mean(ratios)),
                    "ratio_error": float(ratios.std(ddof=1) / len(ratios) ** 0.5),
                },
            )


def simulator(args) -> None:
    """Each path alone and all together, on one executor and on two, of a thread each."""
    some = paths(args.rows)
    for count in (1, 2):
        profile = profile_of(some, args.rows)
        limit = capacity_of(some, profile, args) * count
        for names in ([p.name] for p in some), [[p.name for p in some]]:
            for chosen in names:
                for share in (0.3, 0.6, 0.9, 1.2, 2.0):
                    compare_simulation(
                        [p for p in some if p.name in chosen], profile, count, share, limit, args
                    )


def compare_simulation(some, profile: Profile, count: int, share: float, limit: float, args) -> None:
    sla_s, seconds = args.sla_ms / 1e3, args.seconds
    times, batches, which = loads(share * limit, seconds, int(100 * share), args.rows)
    watch = Watch(batches, which, sla_s)
    if count == 1:
        engine = Engine(Dispatcher(some, profile), sla_s=sla_s)
    else:
        engine = Engine(
            executors=[LocalExecutor(f"cpu {i}", some, profile) for i in range(count)], sla_s=sla_s
        )
    with no_collection():
        run(engine.start(), watch, times)
    about = engine.statistics()
    sizes = np.array([len(b) for b in batches])[which]
    kept = [path for path in measured(profile, "cpu").paths if path.name in {p.name for p in some}]

    def predict(factors: dict[str, float]) -> Result:
        own = [replace(p, actual=[factors.get(p.name, 1.0) * s for s in p.curve]) for p in kept]
        executors = [SimulatedExecutor(f"cpu {i}", own) for i in range(count)]
        return simulate(executors, times, sizes, sla_s=sla_s, query_s=about["query_s"])

    # What the engine observed is told by path, and where there are several by executor too.
    observed = {path.partition("@")[0]: factor for path, factor in about["corrections"].items()}
    blind, informed = predict({}), predict(observed)
    answered = np.isfinite(watch.latencies)
    report(
        "simulator",
        {
            "executors": count,
            "path": some[0].name if len(some) == 1 else "dispatcher",
            "load": share,
            "sla_ms": args.sla_ms,
            "correct_per_s": watch.correct.sum() / seconds,
            "by_profile": blind.correct_per_s * blind.seconds / seconds,
            "by_observed_times": informed.correct_per_s * informed.seconds / seconds,
            "p99_ms": 1e3 * float(np.percentile(watch.latencies[answered], 99)),
            "p99_by_profile": blind.p99_ms,
            "p99_by_observed_times": informed.p99_ms,
            "observed": " ".join(f"{path} {factor:.2f}" for path, factor in observed.items()),
            "query_us": 1e6 * about["query_s"],
        },
    )


def single(args) -> None:
    """A bare call of the path, ``score``, and ``submit`` and ``result``, of the same sample in turns."""
    some = paths(args.rows, ("table",))
    draw, rng = zipf_batches(vocabularies(args.rows), NUM_DENSE), np.random.default_rng(0)
    queries = [draw(1, rng) for _ in range(200)]
    profile = profile_of(some, args.rows)
    with Engine(Dispatcher(some, profile), sla_s=args.sla_ms / 1e3) as engine, no_collection():
        calls = {
            "bare": some[0].model,
            "score": engine.score,
            "submit": lambda query: engine.submit(query).result(),
        }
        seconds = {name: [] for name in calls}
        end = time.perf_counter() + args.seconds
        while time.perf_counter() < end:
            for query in queries:
                for name in rng.permutation(list(calls)):  # each finds in the caches what another left there
                    start = time.perf_counter()
                    calls[name](query)
                    seconds[name].append(time.perf_counter() - start)
    for name, taken in seconds.items():
        p50, p99 = 1e6 * np.percentile(taken, [50, 99])
        added = p50 - 1e6 * np.median(seconds["bare"])
        report("single", {"call": name, "p50_us": p50, "p99_us": p99, "added_us": added})


def report(study: str, row: dict) -> None:
    shown = (
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()
    )
    print("  ".join(shown), flush=True)
    append_csv(f"serving_{study}", [row])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", choices=["overload", "soak", "artifact", "simulator", "single"])
    parser.add_argument("--rows", type=int, default=1_000_000, help="the most rows of a table")
    parser.add_argument("--sla-ms", type=float, default=50.0)
    parser.add_argument("--seconds", type=float, default=None, help="of each load")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument(
        "--dense",
        choices=["float32", "bfloat16", "int8"],
        default="float32",
        help="precision of our dense layers in the study artifact; int8 loses about 0.0001 of the accuracy",
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    sys.setswitchinterval(1e-4)  # as mprec serve and loadtest have it
    if args.study == "overload":
        endurance(args, 3.0, args.seconds or 60.0)
    elif args.study == "soak":
        endurance(args, 0.8, args.seconds or 600.0)
    else:
        args.seconds = args.seconds or 3.0
        {"artifact": artifact, "simulator": simulator, "single": single}[args.study](args)


if __name__ == "__main__":
    main()
