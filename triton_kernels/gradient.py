"""Gradients of table-batched embedding bags, and optimizers fused with them; deterministic.

Entries are sorted by (table, row), stably, so that each row's entries stand together in the order of the
batch. A segment is cut into chunks of CHUNK entries: `segment_kernel` sums each chunk, and where a segment is
one chunk (most are) it finishes the row at once; `combine_kernel` adds up the chunks of long segments, in
order. So no row's sum depends on timing, and one hot ID does not hold up a launch.

Nothing waits for the device: sizes are those of the batch, and programs beyond the last segment return.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .grouped import device_table, lanes, pointer

CHUNK = 64
#: What happens to a row's summed gradient g.
STORE, SGD, ROWWISE_ADAGRAD = 0, 1, 2
_STORE: tl.constexpr = tl.constexpr(STORE)
_ADAGRAD: tl.constexpr = tl.constexpr(ROWWISE_ADAGRAD)

# Columns of the table of tables: first key, weight, state, dim, column of the gradient, and where the table's
# gradient begins in the buffer of all.
_COLUMNS: tl.constexpr = tl.constexpr(6)


class Segments(NamedTuple):
    """Entries sorted by key = first key of the table + row; entries without a row have the key `keys_end`."""

    keys: torch.Tensor  # [n] sorted
    bags: torch.Tensor  # [n] the sample whose gradient each takes
    scale: torch.Tensor | None  # [n] float32 factors: per-sample weights, 1 / size for mean
    start: torch.Tensor  # [n] where each entry's segment begins


def sort_entries(
    rows: Sequence[int],
    indices: torch.Tensor,
    offsets: torch.Tensor,
    batch: int,
    features: Sequence[int],
    num_features: int,
    mode: int,
    sample_weights: torch.Tensor | None,
    padding: int,
) -> Segments:
    """The entries of `features` (table t has rows[t] rows), sorted. Plain torch, without waiting."""
    n, device = len(indices), indices.device
    first, feature_first, feature_rows = 0, [-1] * num_features, [0] * num_features
    for feature, count in zip(features, rows, strict=True):
        feature_first[feature], feature_rows[feature] = first, count
        first += count
    lookup = device_table([feature_first, feature_rows], device)
    bag = torch.searchsorted(offsets, torch.arange(n, device=device, dtype=offsets.dtype), right=True) - 1
    feature = (bag // max(batch, 1)).clamp(0, num_features - 1)
    valid = (bag >= 0) & (bag < num_features * batch) & (indices >= 0) & (indices < lookup[1][feature])
    valid &= indices != padding
    scale = None if sample_weights is None else sample_weights.float()
    if mode == 1:
        sizes = torch.zeros(num_features * batch + 1, device=device)
        sizes.index_add_(0, torch.where(valid, bag, num_features * batch), torch.ones(n, device=device))
        share = 1 / sizes[torch.where(valid, bag, 0)].clamp(min=1)
        scale = share if scale is None else scale * share
    keys = torch.where(valid, lookup[0][feature] + indices, first)
    keys, order = torch.sort(keys, stable=True)
    position = torch.arange(n, device=device)
    head = torch.ones(n, dtype=torch.bool, device=device)
    head[1:] = keys[1:] != keys[:-1]
    start = torch.cummax(torch.where(head, position, 0), 0).values if n else position
    scale = None if scale is None else scale[order]
    return Segments(keys, (bag % max(batch, 1))[order], scale, start)


@triton.jit
def _finish_row(
    table, member, key, total, d, weights_gradient, rate, epsilon, DTYPE: tl.constexpr, ACTION: tl.constexpr
):
    """Apply a row's gradient: float32 [LANES]."""
    entry = table + member * _COLUMNS
    row, dim = key - tl.load(entry), tl.load(entry + 3)
    mask = d < dim
    if ACTION == _STORE:
        where = weights_gradient + tl.load(entry + 5) + row * dim + d
        tl.store(where, total.to(weights_gradient.dtype.element_ty), mask=mask)
    else:
        where = pointer(entry, 1, DTYPE) + row * dim + d
        weight = tl.load(where, mask=mask, other=0.0).to(tl.float32)
        if ACTION == _ADAGRAD:
            state = pointer(entry, 2, tl.float32) + row
            squares = tl.sum(tl.where(mask, total * total, 0.0)) / dim.to(tl.float32)
            sum_of_squares = tl.load(state) + squares
            tl.store(state, sum_of_squares)
            total = total / (tl.sqrt(sum_of_squares) + epsilon)
        tl.store(where, (weight - rate * total).to(DTYPE), mask=mask)


@triton.jit
def _member_of(table, key, T: tl.constexpr, TABLES: tl.constexpr):
    t = tl.arange(0, TABLES)
    first = tl.load(table + t * _COLUMNS, mask=t < T, other=0)
    return tl.sum(((t < T) & (first <= key)).to(tl.int32)) - 1


@triton.jit(do_not_specialize=["n", "keys_end", "rate", "epsilon"])
def segment_kernel(
    table, keys, bags, scale, start, gradient, stride_gradient, partial, weights_gradient, n, keys_end, rate,
    epsilon, T: tl.constexpr, TABLES: tl.constexpr, DTYPE: tl.constexpr, ACTION: tl.constexpr,
    CHUNK: tl.constexpr, BL: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """One program per entry; the first of each chunk sums it."""
    i = tl.program_id(0).to(tl.int64)
    key, begin = tl.load(keys + i), tl.load(start + i)
    if (key < keys_end) & ((i - begin) % CHUNK == 0):
        member = _member_of(table, key, T, TABLES)
        entry = table + member * _COLUMNS
        dim, column = tl.load(entry + 3), tl.load(entry + 4)
        d = tl.arange(0, LANES)
        total = tl.zeros((LANES,), tl.float32)
        end = tl.minimum(i + CHUNK, n)
        for j in tl.range(i, end, BL):
            at = j + tl.arange(0, BL)
            mine = (at < end) & (tl.load(keys + at, mask=at < end, other=-1) == key)
            bag = tl.load(bags + at, mask=mine, other=0)
            mask = mine[:, None] & (d < dim)[None, :]
            where = gradient + bag[:, None] * stride_gradient + column + d[None, :]
            values = tl.load(where, mask=mask, other=0.0).to(tl.float32)
            if scale is not None:
                values = values * tl.load(scale + at, mask=mine, other=0.0)[:, None]
            total += tl.sum(values, 0)
        more = tl.load(keys + i + CHUNK, mask=i + CHUNK < n, other=-1) == key
        if (i == begin) & (more == 0):
            _finish_row(table, member, key, total, d, weights_gradient, rate, epsilon, DTYPE, ACTION)
        else:
            # Of the entries i .. i + CHUNK - 1 of one block at most two start chunks of long segments: the
            # last chunk of one and the first of the next.
            slot = i // CHUNK * 2 + (i == begin).to(tl.int64)
            tl.store(partial + slot * LANES + d, total)


@triton.jit(do_not_specialize=["n", "keys_end", "rate", "epsilon"])
def combine_kernel(
    table, keys, start, partial, weights_gradient, n, keys_end, rate, epsilon, T: tl.constexpr,
    TABLES: tl.constexpr, DTYPE: tl.constexpr, ACTION: tl.constexpr, CHUNK: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    """One program per CHUNK entries: a segment of more than CHUNK that begins among them, of which is one."""
    d = tl.arange(0, LANES)
    lane = tl.arange(0, CHUNK)
    i = tl.program_id(0).to(tl.int64) * CHUNK + lane
    key = tl.load(keys + i, mask=i < n, other=keys_end)
    begins = (i < n) & (key < keys_end) & (tl.load(start + i, mask=i < n, other=-1) == i)
    begins = begins & (tl.load(keys + i + CHUNK, mask=i + CHUNK < n, other=-1) == key)
    if tl.sum(begins.to(tl.int32)) > 0:
        first = tl.max(tl.where(begins, i, -1))
        mine = tl.max(tl.where(begins, key, -1))
        total = tl.zeros((LANES,), tl.float32)
        at = first
        while (at < n) & (tl.load(keys + at, mask=at < n, other=-1) == mine):
            slot = at // CHUNK * 2 + (at == first).to(tl.int64)
            total += tl.load(partial + slot * LANES + d)
            at += CHUNK
        member = _member_of(table, mine, T, TABLES)
        _finish_row(table, member, mine, total, d, weights_gradient, rate, epsilon, DTYPE, ACTION)


_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def _run(weights, states, segments, gradient, columns, action, rate, epsilon, weights_gradient=None):
    n, device = len(segments.keys), gradient.device
    dims, rows = [w.shape[1] for w in weights], [w.shape[0] for w in weights]
    first_key = [sum(rows[:t]) for t in range(len(rows))]
    begin = [sum(d * r for d, r in zip(dims[:t], rows[:t], strict=True)) for t in range(len(rows))]
    kept = (
        weights if action != STORE else [0] * len(weights)
    )  # only what stays where it is: the table is kept
    table = device_table(list(zip(first_key, kept, states, dims, columns, begin, strict=True)), device)
    keys_end, width = sum(rows), triton.next_power_of_2(max(dims))
    partial = torch.empty(2 * (n // CHUNK + 1), width, device=device)
    common = {"T": len(weights), "TABLES": lanes(len(weights)), "DTYPE": _DTYPES[weights[0].dtype]}
    common |= {"ACTION": action, "CHUNK": CHUNK, "LANES": width, "num_warps": 1}
    if n:
        segment_kernel[(n,)](
            table, segments.keys, segments.bags, segments.scale, segments.start, gradient,
            gradient.stride(0), partial, weights_gradient, n, keys_end, rate, epsilon,
            BL=max(1, min(16, 512 // width)), **common,
        )  # fmt: skip
        combine_kernel[(triton.cdiv(n, CHUNK),)](
            table, segments.keys, segments.start, partial, weights_gradient, n, keys_end, rate, epsilon,
            **common,
        )  # fmt: skip


def weight_gradients(
    weights: Sequence[torch.Tensor], segments: Segments, gradient: torch.Tensor, columns: Sequence[int]
) -> list[torch.Tensor]:
    """Dense gradients of the tables for gradient [batch, total] of the pooled output (sum and mean)."""
    sizes = [weight.numel() for weight in weights]
    flat = weights[0].new_zeros(sum(sizes))
    _run(weights, [0] * len(weights), segments, gradient, columns, STORE, 0.0, 0.0, flat)
    return [part.view(w.shape) for part, w in zip(flat.split(sizes), weights, strict=True)]


def sgd_(weights, segments: Segments, gradient, columns, rate: float) -> None:
    """In place: w -= rate * g for the rows that occur."""
    _run(weights, [0] * len(weights), segments, gradient, columns, SGD, rate, 0.0)


def rowwise_adagrad_(weights, states, segments: Segments, gradient, columns, rate: float, epsilon: float):
    """In place, FBGEMM's row-wise Adagrad: s += mean(g^2); w -= rate * g / (sqrt(s) + epsilon).

    states: float32 [rows] of each table.
    """
    _run(weights, states, segments, gradient, columns, ROWWISE_ADAGRAD, rate, epsilon)
