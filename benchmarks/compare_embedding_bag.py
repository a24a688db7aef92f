"""Rows of ``compare.py``: embedding bags against torch, FBGEMM and a hand-written gather.

FBGEMM is measured where it is installed: ``pip install --no-deps fbgemm-gpu-cpu==1.8.0``.
"""

from collections.abc import Iterator

import ceilings
import harness
import torch
from compare import Row
from embedding_bag_peers import KAGGLE, TERABYTE, Batch, Torch, TorchModules, capped, fbgemm_or_none

from mprec import huge_pages
from mprec._native import _C
from mprec.nn import EmbeddingBagCollection, FeatureConfig

#: (name, sizes, most rows of a table: so that three copies fit in memory beside others, dim)
LOGS = {"kaggle d16": (KAGGLE, 1_000_000, 16), "terabyte d64": (TERABYTE, 500_000, 64)}
#: (log, batch, pooling) -> targets against torch.embedding_bag, nn.EmbeddingBag, FBGEMM
TARGETS = {
    ("kaggle d16", 1, 1): (25, 25, 10),
    ("kaggle d16", 128, 1): (3.5, 3.5, 2.5),
    ("kaggle d16", 2048, 1): (1.3, 1.3, 1.3),
    ("terabyte d64", 128, 1): (1.7, 1.7, 1.7),
    ("terabyte d64", 2048, 1): (1.25, 1.25, 1.25),
    ("terabyte d64", 128, 20): (1.3, 1.3, 1.3),
    ("terabyte d64", 2048, 20): (1.3, 1.3, 1.3),
}


def rows(seconds: float, only: str) -> Iterator[Row]:
    with harness.threads(1):
        for log in LOGS:
            yield from _tables(log, seconds, only)
        yield from _gather(seconds, only)
        yield from _quantised(seconds, only)
    yield from _two_threads(seconds, only)


def _interleaved(candidates, draw, **options):
    """`harness.interleaved` with a draw for each candidate: the rows of one are not in cache for the next."""
    own = {name: lambda draws, name=name, call=call: call(draws[name]) for name, call in candidates.items()}
    return harness.interleaved(own, lambda: {name: draw() for name in candidates}, **options)


def _collection(sizes: list[int], dim: int) -> EmbeddingBagCollection:
    with torch.inference_mode(False):
        return EmbeddingBagCollection([FeatureConfig(f"f{t}", n, dim) for t, n in enumerate(sizes)])


def _native_call(weights, batch: int, pooling: int, threads: int = 1):
    """The kernel on given tables, into a buffer that is used again."""
    offsets = torch.arange(0, len(weights) * batch * pooling + 1, pooling)
    out = torch.empty(batch, sum(w.shape[1] for w in weights))
    return lambda b: _C.embedding_bag_multi(weights, b.ids, offsets, None, 0, -1, out, None, threads)


def _tables(log: str, seconds: float, only: str) -> Iterator[Row]:
    names = {
        shape: f"26 tables {shape[0]} batch {shape[1]} x {shape[2]}" for shape in TARGETS if shape[0] == log
    }
    if not any(only in name for name in names.values()):
        return
    sizes, most, dim = LOGS[log]
    sizes = capped(sizes, most)
    ours, raw = _collection(sizes, dim), Torch(sizes, dim, 1, 1)
    modules, fbgemm = TorchModules(raw), fbgemm_or_none(sizes, dim, 1, 1)
    for (_, batch, pooling), name in names.items():
        if only not in name:
            continue
        offsets = torch.arange(0, 26 * batch * pooling + 1, pooling)
        raw.at(batch, pooling)
        candidates = {
            "ours": lambda b, offsets=offsets: ours(b.ids, offsets),
            "small pages": _native_call(raw.weights, batch, pooling),
            "torch.embedding_bag": raw,
            "nn.EmbeddingBag": modules,
        }
        if fbgemm is not None:
            candidates["FBGEMM int-N-bit FP32"] = fbgemm.at(batch, pooling)
        t = _interleaved(
            candidates, lambda b=batch, p=pooling: Batch(sizes, b, p), seconds=seconds * len(candidates) / 2
        )
        on_small = t["small pages"].p50 * 1e6
        note = f"kernel, small pages: {on_small:.1f} us; tables <= {most:,} rows"
        peers = list(candidates)[2:]
        for peer, target in zip(peers, TARGETS[log, batch, pooling], strict=False):
            yield Row(name, peer, t["ours"].p50 * 1e6, t[peer].p50 * 1e6, target, note)


def _gather(seconds: float, only: str, num_rows: int = 10_000_000, dim: int = 64) -> Iterator[Row]:
    batch, pooling = 2048, 20
    name = f"out of cache {num_rows // 1_000_000}M x {dim} batch {batch} x {pooling}"
    if only not in name:
        return
    n, offsets = batch * pooling, torch.arange(0, batch * pooling + 1, pooling)
    large = huge_pages.empty(num_rows, dim).uniform_(-1, 1)
    in_huge_pages = huge_pages.resident(large) / large.nbytes
    small = torch.empty(num_rows, dim).uniform_(-1, 1)
    out = torch.empty(batch, dim)
    bag, last = torch.embedding_bag, offsets[:-1].clone()

    def ours(table):
        return lambda ids: _C.embedding_bag(table, ids, offsets, None, 0, True, -1, out, 1)

    def measure(table, others=None):
        # Candidates of one table only: small pages leave nothing in the address caches for the others.
        candidates = {"ours": ours(table), **(others or {})}
        for ahead in (16, 32, 64):
            candidates[f"gather {ahead}"] = lambda ids, ahead=ahead: ceilings.gather(
                table, ids, pooling, out, ahead
            )
        draw = lambda: torch.randint(0, num_rows, (n,))  # noqa: E731
        return _interleaved(candidates, draw, seconds=seconds * 2, min_rounds=40)

    t = {"huge": measure(large)}
    t["small"] = measure(small, {"torch": lambda ids: bag(small, ids, last, False, 0, False, None)})
    # The fastest of the distances is the ceiling.
    best = {
        pages: min(t[pages][f"gather {ahead}"].p50 for ahead in (16, 32, 64)) * 1e6
        for pages in ("huge", "small")
    }
    us = {
        "ours": t["huge"]["ours"].p50 * 1e6,
        "ours, small pages": t["small"]["ours"].p50 * 1e6,
        "torch": t["small"]["torch"].p50 * 1e6,
    }
    note = f"{in_huge_pages:.0%} of the table in huge pages"
    yield Row(name, "hand-written gather, same pages", us["ours"], best["huge"], 0.9, note)
    yield Row(
        f"{name}, small pages", "hand-written gather, same pages", us["ours, small pages"], best["small"], 0.9
    )
    yield Row(name, "torch as shipped", us["ours"], us["torch"], 1.6, note)
    yield Row(f"{name}, small pages", "torch as shipped", us["ours, small pages"], us["torch"], 1)


def _quantised(seconds: float, only: str, num_rows: int = 10_000, dim: int = 64) -> Iterator[Row]:
    batch, pooling = 128, 20
    quantized = torch.ops.quantized
    weight = torch.rand(num_rows, dim)
    offsets = torch.arange(0, batch * pooling + 1, pooling)
    out = torch.empty(batch, dim)
    for bits, prepack, op, target in (
        (8, quantized.embedding_bag_byte_prepack, quantized.embedding_bag_byte_rowwise_offsets, 1.5),
        (4, quantized.embedding_bag_4bit_prepack, quantized.embedding_bag_4bit_rowwise_offsets, 2),
    ):
        name = f"int{bits} in cache {num_rows} x {dim} batch {batch} x {pooling}"
        if only not in name:
            continue
        table = prepack(weight)

        def ours(ids, table=table, bits=bits):
            _C.embedding_bag(table, ids, offsets, None, 0, True, -1, out, 1, bits)

        def theirs(ids, table=table, op=op):
            return op(table, ids, offsets, include_last_offset=True)

        t = harness.interleaved(
            {"ours": ours, "theirs": theirs},
            lambda: torch.randint(0, num_rows, (batch * pooling,)),
            seconds=seconds,
        )
        yield Row(name, "torch.ops.quantized", t["ours"].p50 * 1e6, t["theirs"].p50 * 1e6, target)


def _two_threads(seconds: float, only: str) -> Iterator[Row]:
    sizes = capped(KAGGLE, 1_000_000)
    for batch in (1, 128, 2048):
        name = f"26 tables kaggle d16 batch {batch} x 1, 2 threads"
        if only not in name:
            continue
        weights = [huge_pages.empty(n, 16).uniform_(-0.01, 0.01) for n in sizes]
        t = harness.interleaved(
            {str(k): _native_call(weights, batch, 1, threads=k) for k in (1, 2)},
            lambda b=batch: Batch(sizes, b, 1),
            seconds=seconds,
        )
        yield Row(name, "itself with 1", t["2"].p50 * 1e6, t["1"].p50 * 1e6, 1.8 if batch > 1 else 0.95)
