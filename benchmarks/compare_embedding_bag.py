"""Rows of ``compare.py``: embedding bags against torch, FBGEMM and a hand-written gather.

FBGEMM is measured where it is installed: ``pip install --no-deps fbgemm-gpu-cpu==1.8.0``.
"""

from collections.abc import Callable, Iterator

import ceilings
import harness
import torch
from compare import Row
from embedding_bag_peers import (
    KAGGLE,
    TERABYTE,
    Batch,
    Fbgemm,
    Torch,
    TorchModules,
    capped,
    draw_ids,
    or_none,
)

from mprec import huge_pages
from mprec._native import _C
from mprec.nn import EmbeddingBagCollection, FeatureConfig

ZIPF = 1.05
#: (name, sizes, most rows of a table: so that three copies fit in memory beside others, dim)
LOGS = {"kaggle d16": (KAGGLE, 1_000_000, 16), "terabyte d64": (TERABYTE, 500_000, 64)}
#: (log, batch, pooling, Zipf exponent) -> targets against torch.embedding_bag, nn.EmbeddingBag, FBGEMM
TARGETS = {
    ("kaggle d16", 1, 1, 0): (25, 25, 10),
    ("kaggle d16", 128, 1, 0): (3.5, 3.5, 2.5),
    ("kaggle d16", 2048, 1, 0): (1.3, 1.3, 1.3),
    ("kaggle d16", 128, 1, ZIPF): (3.5, 3.5, 2.5),
    ("kaggle d16", 2048, 1, ZIPF): (1.3, 1.3, 1.3),
    ("terabyte d64", 128, 1, 0): (1.7, 1.7, 1.7),
    ("terabyte d64", 2048, 1, 0): (1.25, 1.25, 1.25),
    ("terabyte d64", 128, 20, 0): (1.3, 1.3, 1.3),
    ("terabyte d64", 2048, 20, 0): (1.3, 1.3, 1.3),
    ("terabyte d64", 2048, 20, ZIPF): (1.3, 1.3, 1.3),
}
#: (dim, Zipf exponent) of tables of ten million rows -> targets against the hand-written gather, torch
GATHERS = {(64, 0): (0.9, 1.6), (64, ZIPF): (0.9, 1.6), (16, 0): (0.9, 1.6), (16, ZIPF): (0.9, 1.6)}
#: row format -> target against torch's operator
FORMATS = {"int8": 1.5, "int4": 2, "float16": 1, "bfloat16": 1}
THREADS = (1, 128, 2048)


def _named(text: str, zipf: float) -> str:
    return f"{text}, Zipf({zipf})" if zipf else text


def _tables_name(log: str, batch: int, pooling: int, zipf: float) -> str:
    return _named(f"26 tables {log} batch {batch} x {pooling}", zipf)


def _gather_name(dim: int, zipf: float) -> str:
    return _named(f"out of cache 10M x {dim} batch 2048 x 20", zipf)


def _format_name(form: str) -> str:
    return f"{form} in cache 10000 x 64 batch 128 x 20"


def _threads_name(batch: int) -> str:
    return f"26 tables kaggle d16 batch {batch} x 1, 2 threads"


def names() -> list[str]:
    return [
        *(_tables_name(*key) for key in TARGETS),
        *(_gather_name(*key) for key in GATHERS),
        *map(_format_name, FORMATS),
        *map(_threads_name, THREADS),
    ]


def rows(seconds: float, only: str) -> Iterator[Row]:
    with harness.threads(1):
        for log in LOGS:
            yield from _tables(log, seconds, only)
        for dim in (64, 16):
            yield from _gathers(dim, seconds, only)
        yield from _formats(seconds, only)
    yield from _two_threads(seconds, only)


def _collection(sizes: list[int], dim: int) -> EmbeddingBagCollection:
    with torch.inference_mode(False):
        return EmbeddingBagCollection([FeatureConfig(f"f{t}", n, dim) for t, n in enumerate(sizes)])


def _native_call(weights, batch: int, pooling: int, threads: int = 1) -> Callable[[Batch], object]:
    """The kernel on given tables, into a buffer that is used again."""
    offsets = torch.arange(0, len(weights) * batch * pooling + 1, pooling)
    out = torch.empty(batch, sum(w.shape[1] for w in weights))
    return lambda b: _C.embedding_bag_multi(weights, b.ids, offsets, None, 0, -1, out, None, threads)


def _tables(log: str, seconds: float, only: str) -> Iterator[Row]:
    wanted = {key: name for key in TARGETS if key[0] == log and only in (name := _tables_name(*key))}
    if not wanted:
        return
    sizes, most, dim = LOGS[log]
    sizes = capped(sizes, most)
    ours, raw = _collection(sizes, dim), Torch(sizes, dim, 1, 1)
    modules, fbgemm = TorchModules(raw), or_none(Fbgemm, sizes, dim, 1, 1)
    for key, name in wanted.items():
        _, batch, pooling, zipf = key
        offsets = torch.arange(0, 26 * batch * pooling + 1, pooling)
        out = torch.empty(batch, 26 * dim)
        raw.at(batch, pooling)
        candidates = {
            "ours": lambda b, offsets=offsets: ours(b.ids, offsets),
            "out=": lambda b, offsets=offsets, out=out: ours(b.ids, offsets, out=out),
            "small pages": _native_call(raw.weights, batch, pooling),
            "torch.embedding_bag": raw,
            "nn.EmbeddingBag": modules,
        }
        if fbgemm is not None:
            candidates["FBGEMM int-N-bit FP32"] = fbgemm.at(batch, pooling)
        t = harness.interleaved(
            candidates,
            lambda b=batch, p=pooling, z=zipf: Batch(sizes, b, p, z),
            seconds=seconds * len(candidates) / 2,
            own_inputs=True,
        )
        us = {name: timing.p50 * 1e6 for name, timing in t.items()}
        note = (
            f"out=: {us['out=']:.1f} us; kernel, small pages: {us['small pages']:.1f} us; "
            f"tables <= {most:,} rows"
        )
        for peer, target in zip(list(candidates)[3:], TARGETS[key], strict=False):
            yield Row(name, peer, us["ours"], us[peer], target, note)


def _gathers(dim: int, seconds: float, only: str, num_rows: int = 10_000_000) -> Iterator[Row]:
    wanted = {key: name for key in GATHERS if key[0] == dim and only in (name := _gather_name(*key))}
    if not wanted:
        return
    large = huge_pages.empty(num_rows, dim).uniform_(-1, 1)
    small = torch.empty(num_rows, dim).uniform_(-1, 1)
    for key, name in wanted.items():
        yield from _gather(name, large, small, key[1], GATHERS[key], seconds)


def _gather(name: str, large, small, zipf: float, targets, seconds: float) -> Iterator[Row]:
    (num_rows, dim), batch, pooling = large.shape, 2048, 20
    n, offsets = batch * pooling, torch.arange(0, batch * pooling + 1, pooling)
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
        draw = lambda: draw_ids([num_rows], n, zipf)  # noqa: E731
        t = harness.interleaved(candidates, draw, seconds=seconds * 2, min_rounds=40, own_inputs=True)
        us = {name: timing.p50 * 1e6 for name, timing in t.items()}
        # The fastest of the distances is the ceiling.
        return us, min(us[f"gather {ahead}"] for ahead in (16, 32, 64))

    in_huge, best_in_huge = measure(large)
    as_shipped = {"torch": lambda ids: bag(small, ids, last, False, 0, False, None)}
    in_small, best_in_small = measure(small, as_shipped)
    note = f"{huge_pages.resident(large) / large.nbytes:.0%} of the table in huge pages"
    ceiling, shipped = "hand-written gather, same pages", "torch as shipped"
    yield Row(name, ceiling, in_huge["ours"], best_in_huge, targets[0], note)
    yield Row(f"{name}, small pages", ceiling, in_small["ours"], best_in_small, targets[0])
    yield Row(name, shipped, in_huge["ours"], in_small["torch"], targets[1], note)
    yield Row(f"{name}, small pages", shipped, in_small["ours"], in_small["torch"], 1)


def _formats(seconds: float, only: str, num_rows: int = 10_000, dim: int = 64) -> Iterator[Row]:
    batch, pooling = 128, 20
    quantized = torch.ops.quantized
    weight = torch.rand(num_rows, dim)
    offsets = torch.arange(0, batch * pooling + 1, pooling)
    last = offsets[:-1].clone()
    for form, target in FORMATS.items():
        if only not in (name := _format_name(form)):
            continue
        out, bits = torch.empty(batch, dim), None
        if form == "int8":
            table, bits = quantized.embedding_bag_byte_prepack(weight), 8
            op = quantized.embedding_bag_byte_rowwise_offsets
            theirs = lambda ids, t=table, op=op: op(t, ids, offsets, include_last_offset=True)  # noqa: E731
        elif form == "int4":
            table, bits = quantized.embedding_bag_4bit_prepack(weight), 4
            op = quantized.embedding_bag_4bit_rowwise_offsets
            theirs = lambda ids, t=table, op=op: op(t, ids, offsets, include_last_offset=True)  # noqa: E731
        else:
            table = weight.to(getattr(torch, form))
            out = out.to(table.dtype)
            theirs = lambda ids, t=table: torch.embedding_bag(t, ids, last, False, 0, False, None)  # noqa: E731

        def ours(ids, table=table, out=out, bits=bits):
            _C.embedding_bag(table, ids, offsets, None, 0, True, -1, out, 1, bits)

        t = harness.interleaved(
            {"ours": ours, "theirs": theirs}, lambda: draw_ids([num_rows], batch * pooling), seconds=seconds
        )
        peer = "torch.ops.quantized" if bits else "torch.embedding_bag"
        yield Row(name, peer, t["ours"].p50 * 1e6, t["theirs"].p50 * 1e6, target)


def _two_threads(seconds: float, only: str) -> Iterator[Row]:
    sizes = capped(KAGGLE, 1_000_000)
    wanted = [batch for batch in THREADS if only in _threads_name(batch)]
    weights = [huge_pages.empty(n, 16).uniform_(-0.01, 0.01) for n in sizes] if wanted else []
    note = ceilings.two_threads_note() if wanted else ""
    for batch in wanted:
        t = harness.interleaved(
            {str(k): _native_call(weights, batch, 1, threads=k) for k in (1, 2)},
            lambda b=batch: Batch(sizes, b, 1),
            seconds=seconds,
            own_inputs=True,
        )
        target = 1.8 if batch > 1 else 0.95
        yield Row(_threads_name(batch), "itself with 1", t["2"].p50 * 1e6, t["1"].p50 * 1e6, target, note)
