"""Rows of ``compare.py``: deep hash embeddings behind a cache of hot IDs, against themselves without it and
against tables."""

from collections.abc import Iterator

import bench_cache
import harness
import torch
from compare import Row

SHAPE = "1024-128-16"
#: A share of the IDs that leaves at least 95 % hits on the stream of that exponent.
MOST_HITS = ((1.2, 0.15), (1.4, 0.01))
PEERS = {
    "dhe": "the same without a cache",
    "every": "every ID decoded, without a cache",
    "table": "a table of all IDs",
}
TARGETS = {"dhe": 3, "every": 3, "table": 0.5}


def rows(seconds: float, only: str) -> Iterator[Row]:
    # Not inference tensors: they carry no version counter, by which a cache sees that weights change.
    with torch.inference_mode(False), torch.no_grad(), harness.threads(1):
        for work, peers, measure in _works():
            if only in work:
                line, us = measure(seconds)
                note = f"{float(line['hits']):.1%} hits, {line['cache_bytes']:,} bytes; module calls"
                for peer in peers:
                    yield Row(work, PEERS[peer], us["cached"], us[peer], TARGETS[peer], note)


def _works():
    """(name, peers, function of seconds that measures it)."""
    of_one = "cache of 1 % of IDs"
    for shape in bench_cache.SHAPES:
        yield (
            f"{of_one} {shape}, Zipf(1.05), batch 128",
            ("dhe", "every"),
            lambda s, shape=shape: bench_cache.measure_bag(bench_cache.zipf(), shape, 0.01, s),
        )
    for shape in bench_cache.SHAPES:
        yield (
            f"{of_one}, the others by code, {shape}, Zipf(1.05), batch 128",
            ("dhe", "table"),
            lambda s, shape=shape: bench_cache.measure_bag(bench_cache.zipf(), shape, 0.01, s, by_code=True),
        )
    for a, share in MOST_HITS:
        yield (
            f"cache of {share:.0%} of IDs {SHAPE}, Zipf({a}), batch 128",
            ("table",),
            lambda s, a=a, share=share: bench_cache.measure_bag(bench_cache.zipf(a), SHAPE, share, s),
        )
    yield f"{of_one} {SHAPE}, 26 features, Zipf(1.05), batch 128", ("dhe",), _collection
    for stream in bench_cache.real_streams():
        for coded, peers in ((False, ("dhe", "every")), (True, ("dhe", "table"))):
            yield (
                f"cache of 10 % of IDs{', the others by code,' * coded} {SHAPE}, {stream.name}",
                peers,
                lambda s, stream=stream, c=coded: bench_cache.measure_bag(stream, SHAPE, 0.1, s, by_code=c),
            )


def _collection(seconds: float) -> tuple[dict, dict[str, float]]:
    line = bench_cache.collection_row(bench_cache.collection_streams(), SHAPE, 0.01, seconds)
    return line, {name: float(line[f"{name}_us"]) for name in ("cached", "dhe", "table")}
