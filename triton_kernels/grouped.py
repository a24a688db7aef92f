"""One launch for many features: tables of device pointers, and which tile of IDs belongs to which feature.

IDs are feature-major (FBGEMM's layout), and how many each feature has is known on the device only: a launch
is sized for the most tiles there can be, and each program finds its feature from the offsets. Nothing waits
for the GPU, and a captured CUDA graph stays right when the numbers of IDs change.
"""

import collections
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from . import capturing
from .tuning import multiprocessors

_CAPACITY = 256
_tables: collections.OrderedDict = collections.OrderedDict()


def device_table(rows: Sequence[Sequence[torch.Tensor | int]], device: torch.device) -> torch.Tensor:
    """int64 [rows, columns] on `device`: numbers as they are, tensors as their addresses.

    Copied there on first use and kept for as long as the same addresses come again, so that a CUDA graph
    that was captured after one warm-up call finds it in place.
    """
    values = tuple(
        tuple(item.data_ptr() if isinstance(item, torch.Tensor) else int(item) for item in row)
        for row in rows
    )
    key = (device, values)
    table = _tables.get(key)
    if table is None:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("mprec: call the module once before capturing it in a CUDA graph")
        table = _tables[key] = torch.tensor(values, dtype=torch.int64, device=device)
        if len(_tables) > _CAPACITY:
            _tables.popitem(last=False)
    else:
        _tables.move_to_end(key)
    if (capture := capturing.current()) is not None:
        capture.tables.append(table)
    return table


@triton.jit
def pointer(table, column, dtype: tl.constexpr):
    """The 16-byte aligned address in `table[column]` as a pointer to `dtype`."""
    return tl.multiple_of(tl.load(table + column).to(tl.pointer_type(dtype), bitcast=True), 16)


@triton.jit
def address(given, table, column, dtype: tl.constexpr):
    """The tensor `given` to the launch, or, where a group's tensors are in a table, what stands there."""
    if given is None:
        return pointer(table, column, dtype)
    else:
        return given


@triton.jit
def bag_range(offsets, bag, count):
    """[begin, end) of a bag's IDs (int64), whatever the offsets say: within 0 .. count, never reversed."""
    begin = tl.minimum(tl.maximum(tl.load(offsets + bag).to(tl.int64), 0), count)
    end = tl.minimum(tl.load(offsets + bag + 1).to(tl.int64), count)
    return begin, tl.maximum(begin, end)


@triton.jit
def id_ranges(offsets, table, batch, count, T: tl.constexpr, STRIDE: tl.constexpr, LANES: tl.constexpr):
    """Where each group member's IDs begin and end (int64 [LANES]); column 0 of `table` is its feature.

    Without offsets there is one feature, and it has all `count` IDs.
    """
    t = tl.arange(0, LANES)
    if offsets is None:
        begin = tl.zeros((LANES,), tl.int64)
        end = tl.where(t == 0, begin + count, 0)
    else:
        feature = tl.zeros((LANES,), tl.int64)  # of one that comes without a table
        if table is not None:
            feature = tl.load(table + t * STRIDE, mask=t < T, other=0)
        begin = tl.load(offsets + feature * batch, mask=t < T, other=0).to(tl.int64)
        end = tl.load(offsets + (feature + 1) * batch, mask=t < T, other=0).to(tl.int64)
        begin = tl.minimum(tl.maximum(begin, 0), count)
        end = tl.maximum(tl.minimum(end, count), begin)
    return begin, end


@triton.jit
def count_tiles(offsets, table, batch, count, T: tl.constexpr, STRIDE: tl.constexpr, LANES: tl.constexpr,
                BM: tl.constexpr):  # fmt: skip
    """How many tiles of BM IDs the group has."""
    begin, end = id_ranges(offsets, table, batch, count, T, STRIDE, LANES)
    return tl.sum((end - begin + BM - 1) // BM).to(tl.int32)


@triton.jit
def find_tile(tile, offsets, table, batch, count, T: tl.constexpr, STRIDE: tl.constexpr, LANES: tl.constexpr,
              BM: tl.constexpr):  # fmt: skip
    """(group member, first ID, end of its IDs) of tile number `tile` of BM IDs."""
    begin, end = id_ranges(offsets, table, batch, count, T, STRIDE, LANES)
    t = tl.arange(0, LANES)
    last_tile = tl.cumsum((end - begin + BM - 1) // BM)
    member = tl.sum((last_tile <= tile).to(tl.int32))
    mine = t == member
    before = tl.max(tl.where(t < member, last_tile, 0))
    first = tl.sum(tl.where(mine, begin, 0)) + (tile - before) * BM
    return member, first, tl.sum(tl.where(mine, end, 0))


def lanes(features: int) -> int:
    """The power of two that holds `features` values."""
    return triton.next_power_of_2(max(features, 2))


def programs(tiles: int, warps: int, device: torch.device) -> int:
    """How many persistent programs to launch for at most `tiles` tiles: what fits on the device at once."""
    if device.type != "cuda":
        return min(tiles, 3)  # the interpreter: few enough that each takes several tiles
    return torch.sym_min(tiles, max(1, 8 // warps) * multiprocessors(device))
