"""Rows of hot IDs on the device: a hash table in which every ID is looked up at once, and misses are listed.

The table is open addressing with linear probing, built once on the host: `keys` int64 [slots] (-1: empty) and
the rows beside them. A look-up reads at most `probes` slots, where `probes` is the longest way that any key
was pushed from its home. Misses come out as a list of positions and their number, both on the device: a
decoder can be run over them without the host knowing how many there are.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

_MULTIPLIER = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: spreads consecutive IDs over the table
_MULTIPLIER_C: tl.constexpr = tl.constexpr(_MULTIPLIER)


class RowCache(NamedTuple):
    """`rows` [slots, D] of the IDs in `keys`; slots is a power of two."""

    keys: torch.Tensor
    rows: torch.Tensor
    probes: int


def build(ids: torch.Tensor, rows: torch.Tensor) -> RowCache:
    """A cache of `rows` [n, D] of distinct `ids` [n] (int64, >= 0), on the device of `rows`. Half is empty.

    Raises:
        ValueError: for negative or repeated IDs, or shapes that do not agree.
    """
    if ids.dim() != 1 or rows.dim() != 2 or len(ids) != len(rows):
        raise ValueError(f"ids, rows: [n] and [n, D], got {list(ids.shape)} and {list(rows.shape)}")
    values = ids.cpu().to(torch.int64)
    if len(values) and int(values.min()) < 0:
        raise ValueError(f"ids: 0 or more, got {int(values.min())}")
    if len(values.unique()) != len(values):
        raise ValueError("ids: repeated")
    slots = triton.next_power_of_2(max(2 * len(values), 2))
    keys = torch.full((slots,), -1, dtype=torch.int64)
    slot_of = torch.empty(len(values), dtype=torch.int64)
    home, waiting, distance = _home(values, slots), torch.arange(len(values)), 0
    while len(waiting):
        at = (home[waiting] + distance) & (slots - 1)
        free = keys[at] < 0
        keys[at[free]] = values[waiting[free]]  # where several want one slot, one of them gets it
        placed = keys[at] == values[waiting]
        slot_of[waiting[placed]] = at[placed]
        waiting, distance = waiting[~placed], distance + 1
    table = torch.zeros(slots, rows.shape[1], dtype=rows.dtype, device=rows.device)
    table[slot_of.to(rows.device)] = rows
    return RowCache(keys.to(rows.device), table, max(distance, 1))


def _home(ids: torch.Tensor, slots: int) -> torch.Tensor:
    bits = slots.bit_length() - 1
    mixed = ids * (_MULTIPLIER - 2**64)  # int64 arithmetic wraps
    return (mixed >> (64 - bits)) & (slots - 1)


@triton.jit(do_not_specialize=["n"])
def lookup_kernel(
    ids, keys, rows, out, missed, n, stride_out, D: tl.constexpr, BITS: tl.constexpr, PROBES: tl.constexpr,
    BM: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """out[i] = row of ids[i] where it is cached; missed[i] = 1 elsewhere, and out[i] is left alone."""
    m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    present = m < n
    x = tl.load(ids + m, mask=present, other=-2).to(tl.int64)
    home = ((x.to(tl.uint64, bitcast=True) * _MULTIPLIER_C) >> (64 - BITS)).to(tl.int64)
    slot = tl.full((BM,), -1, tl.int64)
    for distance in tl.static_range(PROBES):
        at = (home + distance) & ((1 << BITS) - 1)
        key = tl.load(keys + at, mask=present & (slot < 0), other=-1)
        slot = tl.where((slot < 0) & (x >= 0) & (key == x), at, slot)
    hit = present & (slot >= 0)
    d = tl.arange(0, LANES)
    mask = hit[:, None] & (d < D)[None, :]
    values = tl.load(rows + slot[:, None] * D + d[None, :], mask=mask, other=0.0)
    tl.store(out + m[:, None] * stride_out + d[None, :], values.to(out.dtype.element_ty), mask=mask)
    tl.store(missed + m, 1 - hit.to(tl.int32), mask=present)


@triton.jit(do_not_specialize=["n"])
def list_kernel(ids, missed, before, miss_ids, miss_positions, n, BM: tl.constexpr):
    """Gather the misses, in order: before[i] misses come before or at i."""
    m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    miss = (m < n) & (tl.load(missed + m, mask=m < n, other=0) > 0)
    place = tl.load(before + m, mask=miss, other=1) - 1
    tl.store(miss_ids + place, tl.load(ids + m, mask=miss, other=0).to(tl.int64), mask=miss)
    tl.store(miss_positions + place, m, mask=miss)


class Misses(NamedTuple):
    """The IDs that were not cached: the first `bounds[1]` entries of `ids` and `positions` [n]."""

    ids: torch.Tensor
    positions: torch.Tensor
    bounds: torch.Tensor  # int64 [2]: 0 and how many; offsets of one bag, as the decoders take them


def lookup(cache: RowCache, ids: torch.Tensor, out: torch.Tensor) -> Misses:
    """Write the rows of cached IDs into out [n, >= D]; return which were not. Waits for nothing."""
    n, dim, device = len(ids), cache.rows.shape[1], ids.device
    missed = torch.zeros(n, dtype=torch.int32, device=device)
    miss_ids = torch.zeros(n, dtype=torch.int64, device=device)
    positions = torch.zeros(n, dtype=torch.int64, device=device)
    bounds = torch.zeros(2, dtype=torch.int64, device=device)
    if n:
        lanes = triton.next_power_of_2(dim)
        tile = max(1, min(128, 4096 // lanes))
        lookup_kernel[(triton.cdiv(n, tile),)](
            ids, cache.keys, cache.rows, out, missed, n, out.stride(0), dim,
            len(cache.keys).bit_length() - 1, cache.probes, tile, lanes,
        )  # fmt: skip
        before = torch.cumsum(missed, 0)
        list_kernel[(triton.cdiv(n, 1024),)](ids, missed, before, miss_ids, positions, n, 1024)
        bounds[1:] = before[-1:]
    return Misses(miss_ids, positions, bounds)


@triton.jit(do_not_specialize=["n"])
def scatter_kernel(
    rows, positions, bounds, out, n, stride_rows, stride_out, D: tl.constexpr, BM: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    """out[positions[j]] = rows[j] for j < bounds[1]."""
    m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    present = m < tl.minimum(tl.load(bounds + 1), n)
    to = tl.load(positions + m, mask=present, other=0)
    d = tl.arange(0, LANES)
    mask = present[:, None] & (d < D)[None, :]
    values = tl.load(rows + m[:, None] * stride_rows + d[None, :], mask=mask, other=0.0)
    tl.store(out + to[:, None] * stride_out + d[None, :], values.to(out.dtype.element_ty), mask=mask)


def cached_dhe_forward(
    cache: RowCache, indices, coefficients, weights, biases, family, activation, last_activation
) -> torch.Tensor:
    """`dhe_forward`, but IDs in the cache are read from it and only the others are decoded. Never waits."""
    from .dhe import decode_grouped

    n, dim = len(indices), weights[-1].shape[0]
    out = weights[0].new_empty(n, dim)
    misses = lookup(cache, indices, out)
    decoded = torch.empty_like(out)
    decode_grouped(
        misses.ids, misses.bounds, 1, [0], [coefficients], [list(weights)], [list(biases)],
        family, activation, last_activation, decoded,
    )  # fmt: skip
    if n:
        lanes = triton.next_power_of_2(dim)
        tile = max(1, min(128, 4096 // lanes))
        scatter_kernel[(triton.cdiv(n, tile),)](
            decoded, misses.positions, misses.bounds, out, n, decoded.stride(0), out.stride(0), dim, tile,
            lanes,
        )  # fmt: skip
    return out
