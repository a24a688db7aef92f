"""Rows of ``compare.py``: table gradients and optimizers in the backward pass, against torch and FBGEMM."""

from collections.abc import Iterator

import harness
import torch
from compare import Row
from embedding_bag_peers import KAGGLE, Batch, FbgemmTraining, capped, draw_ids, or_none

from mprec.nn import EmbeddingBag, EmbeddingBagCollection, FeatureConfig
from mprec.optim import SGD, RowWiseAdagrad

SGD_WORK = "sparse backward + SGD 10000 x 64 batch 2048 x 20"
ADAGRAD_WORK = "row-wise Adagrad step 26 tables kaggle d16 batch 2048 x 1"
THREADS_WORK = f"{ADAGRAD_WORK}, 2 threads"
NARROW = {f"{ADAGRAD_WORK}, {name}": name for name in ("bfloat16", "float16")}


def names() -> list[str]:
    return [SGD_WORK, ADAGRAD_WORK, THREADS_WORK, *NARROW]


def rows(seconds: float, only: str) -> Iterator[Row]:
    with torch.inference_mode(False), torch.enable_grad(), harness.threads(1):
        if only in SGD_WORK:
            yield _sgd(seconds)
        if only in ADAGRAD_WORK or only in THREADS_WORK:
            yield from _adagrad(seconds)
        if any(only in work for work in NARROW):
            yield from _narrow(seconds)


def _sgd(seconds: float, num_rows: int = 10_000, dim: int = 64, batch: int = 2048, pooling: int = 20) -> Row:
    """From the gradient of the pooled output to the updated table; the forward pass is not timed."""
    offsets = torch.arange(0, batch * pooling, pooling)
    grad = torch.randn(batch, dim)
    ours = EmbeddingBag(num_rows, dim, mode="sum", sparse=True)
    theirs = torch.nn.EmbeddingBag(num_rows, dim, mode="sum", sparse=True)
    # A table's optimizer of ours works in the backward pass, for as long as somebody holds it.
    holders = [SGD(ours.parameters(), lr=0.01), torch.optim.SGD(theirs.parameters(), lr=0.01)]

    def step_theirs(out):
        out.backward(grad)
        holders[1].step()
        holders[1].zero_grad()

    t = harness.interleaved(
        {"ours": lambda out: out.backward(grad), "theirs": step_theirs},
        lambda: draw_ids([num_rows], batch * pooling),
        seconds=seconds,
        prepare={"ours": lambda ids: ours(ids, offsets), "theirs": lambda ids: theirs(ids, offsets)},
    )
    return Row(SGD_WORK, "torch sparse + SGD", t["ours"].p50 * 1e6, t["theirs"].p50 * 1e6, 5)


def _adagrad(seconds: float, batch: int = 2048, dim: int = 16, most_rows: int = 1_000_000) -> Iterator[Row]:
    """Whole steps: forward, backward, update."""
    sizes, lr = capped(KAGGLE, most_rows), 0.01
    ours = EmbeddingBagCollection([FeatureConfig(f"f{t}", n, dim) for t, n in enumerate(sizes)])
    optimizer = RowWiseAdagrad(ours.parameters(), lr=lr)
    offsets = torch.arange(len(sizes) * batch + 1)
    grad = torch.ones(batch, len(sizes) * dim)

    def step(b):
        ours(b.ids, offsets).backward(grad)

    def step_with_two(b):
        with harness.threads(2):
            step(b)

    candidates = {"ours": step, "2 threads": step_with_two}
    fbgemm = or_none(FbgemmTraining, sizes, dim, batch, lr)
    if fbgemm is not None:
        candidates["FBGEMM"] = fbgemm
    t = harness.interleaved(candidates, lambda: Batch(sizes, batch, 1), seconds=seconds * 2, own_inputs=True)
    us = {name: timing.p50 * 1e6 for name, timing in t.items()}
    note = f"forward, backward and update; tables <= {most_rows:,} rows, {len(optimizer.state)} of them"
    if fbgemm is not None:
        yield Row(ADAGRAD_WORK, "FBGEMM training TBE", us["ours"], us["FBGEMM"], 1.8, note)
    yield Row(THREADS_WORK, "itself with 1", us["2 threads"], us["ours"], 1.5)


def _narrow(seconds: float, batch: int = 2048, dim: int = 16, most_rows: int = 1_000_000) -> Iterator[Row]:
    """The same step on tables of 16 bits, rounded stochastically, beside that on tables of float32."""
    sizes, offsets, optimizers = capped(KAGGLE, most_rows), torch.arange(len(KAGGLE) * batch + 1), []
    features = [FeatureConfig(f"f{t}", n, dim) for t, n in enumerate(sizes)]

    def step_of(dtype):
        tables = EmbeddingBagCollection(features, dtype=dtype)
        optimizers.append(RowWiseAdagrad(tables.parameters(), lr=0.01))
        grad = torch.ones(batch, len(sizes) * dim, dtype=dtype)
        return lambda b: tables(b.ids, offsets).backward(grad)

    candidates = {name: step_of(getattr(torch, name)) for name in ("float32", *NARROW.values())}
    t = harness.interleaved(candidates, lambda: Batch(sizes, batch, 1), seconds=seconds * 2, own_inputs=True)
    us = {name: timing.p50 * 1e6 for name, timing in t.items()}
    wide, state = sum(sizes) * dim * 4 / 1e6, sum(sizes) * 4 / 1e6
    note = f"tables of {wide / 2:.0f} MB in place of {wide:.0f}, states of {state:.0f} MB"
    for work, name in NARROW.items():
        yield Row(work, "itself in float32", us[name], us["float32"], 0.8, note)
