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


def rows(seconds: float, only: str) -> Iterator[Row]:
    wanted = [f"cache of 1 % of IDs {shape}, Zipf(1.05), batch 128" for shape in bench_cache.SHAPES]
    many = [f"cache of {share:.0%} of IDs {SHAPE}, Zipf({a}), batch 128" for a, share in MOST_HITS]
    collection = f"cache of 1 % of IDs {SHAPE}, 26 features, Zipf(1.05), batch 128"
    real = "cache of 10 % of IDs 1024-128-16, "
    # Not inference tensors: they carry no version counter, by which a cache sees that weights change.
    with torch.inference_mode(False), torch.no_grad(), harness.threads(1):
        for work, shape in zip(wanted, bench_cache.SHAPES, strict=True):
            if only in work:
                yield _over_dhe(work, bench_cache.zipf(), shape, 0.01, seconds)
        for work, (exponent, share) in zip(many, MOST_HITS, strict=True):
            if only in work:
                yield _against_table(work, bench_cache.zipf(exponent), share, seconds)
        if only in collection:
            line = bench_cache.collection_row(bench_cache.collection_streams(), SHAPE, 0.01, seconds)
            yield _row(collection, line, "dhe", 3)
        for stream in bench_cache.real_streams():
            if only in (work := real + stream.name):
                yield _over_dhe(work, stream, SHAPE, 0.1, seconds)


def _over_dhe(work: str, stream: bench_cache.Stream, shape: str, share: float, seconds: float) -> Row:
    (line,) = bench_cache.bag_rows(stream, shape, (share,), seconds)
    return _row(work, line, "dhe", 3)


def _against_table(work: str, stream: bench_cache.Stream, share: float, seconds: float) -> Row:
    (line,) = bench_cache.bag_rows(stream, SHAPE, (share,), seconds)
    return _row(work, line, "table", 0.5)


def _row(work: str, line: dict, peer: str, target: float) -> Row:
    names = {"dhe": "the same without a cache", "table": "a table of all IDs"}
    note = f"{float(line['hits']):.1%} hits, {line['cache_bytes']:,} bytes; module calls"
    return Row(work, names[peer], float(line["cached_us"]), float(line[f"{peer}_us"]), target, note)
