"""Embedding bags of many tables in one launch, and pooling of vectors that are already there.

    out[b, columns of t] = pool of weight_t[i] over the indices i of bag b of table t

Indices are feature-major CSR (FBGEMM's layout). A program owns BB bags of one table and walks all of them a
row at a time: the loads of a step are independent, BB x D elements wide, and each bag's sum has one fixed
order. Rows may be float32, float16, bfloat16, or 8- or 4-bit in FBGEMM's fused layout:

    8 bits: D bytes, then scale and bias as float32        value = byte * scale + bias
    4 bits: D / 2 bytes (low half first), then scale and bias as float16
"""

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from mprec.row_formats import ROW_FORMATS, quantised_format

from . import faults
from .faults import count_faults
from .grouped import address, bag_range, device_table
from .launching import launchable

#: Kinds of rows: the weight's own float type, or FBGEMM's fused bytes.
FLOAT, INT8, INT4 = 0, 1, 2
#: Quantised kinds by the name of the row format.
QUANTISED = {INT8: "int8", INT4: "int4"}
_INT8: tl.constexpr = tl.constexpr(INT8)
_INT4: tl.constexpr = tl.constexpr(INT4)
_FLOAT: tl.constexpr = tl.constexpr(FLOAT)
_MEAN: tl.constexpr = tl.constexpr(1)
_MAX: tl.constexpr = tl.constexpr(2)

# Columns of the table of tables: feature, weight, rows, dim, elements from row to row, first output column.
_COLUMNS: tl.constexpr = tl.constexpr(6)


@triton.jit
def load_rows(weight, row, d, dim, stride, keep, KIND: tl.constexpr):
    """float32 [BB, LANES] of rows int64 [BB], columns d int32 [LANES]; for 4 bits low and high halves."""
    if KIND == _FLOAT:
        mask = keep[:, None] & (d < dim)[None, :]
        values = tl.load(weight + row[:, None] * stride + d[None, :], mask=mask, other=0.0).to(tl.float32)
        return values, values
    elif KIND == _INT8:
        line = weight + row * stride
        mask = keep[:, None] & (d < dim)[None, :]
        bytes8 = tl.load(line[:, None] + d[None, :], mask=mask, other=0)
        tail = (line + dim).to(tl.pointer_type(tl.float32), bitcast=True)
        scale = tl.load(tail, mask=keep, other=0.0)
        bias = tl.load(tail + 1, mask=keep, other=0.0)
        values = tl.fma(bytes8.to(tl.float32), scale[:, None], bias[:, None])
        return values, values
    else:
        half = dim // 2
        line = weight + row * stride
        mask = keep[:, None] & (d < half)[None, :]
        bytes4 = tl.load(line[:, None] + d[None, :], mask=mask, other=0)
        tail = (line + half).to(tl.pointer_type(tl.float16), bitcast=True)
        scale = tl.load(tail, mask=keep, other=0.0).to(tl.float32)
        bias = tl.load(tail + 1, mask=keep, other=0.0).to(tl.float32)
        low = tl.fma((bytes4 & 15).to(tl.float32), scale[:, None], bias[:, None])
        return low, tl.fma((bytes4 >> 4).to(tl.float32), scale[:, None], bias[:, None])


@triton.jit
def _accumulate(total, values, weight, keep, first, MODE: tl.constexpr, WEIGHTED: tl.constexpr):
    if MODE == _MAX:
        # as torch: the first row whatever it is, later ones where they are greater (a late NaN is not)
        better = keep[:, None] & (first[:, None] | (values > total))
        return tl.where(better, values, total)
    elif WEIGHTED:
        return total + tl.where(keep[:, None], values * weight[:, None], 0.0)
    else:
        return total + tl.where(keep[:, None], values, 0.0)


@triton.jit(do_not_specialize=["batch", "count", "padding", "own_rows", "own_dim", "own_stride"])
def embedding_bag_kernel(
    table, own_weight, own_rows, own_dim, own_stride, vectors, indices, offsets, sample_weights, out,
    fault_counter, batch, count, stride_out, padding,
    DTYPE: tl.constexpr, KIND: tl.constexpr, MODE: tl.constexpr,
    BB: tl.constexpr, LANES: tl.constexpr, ALIGN: tl.constexpr, STRIDE_ALIGN: tl.constexpr,
    UNROLL: tl.constexpr,
):  # fmt: skip
    """BB bags of one table; with `vectors` entry i is row i of those, and indices only tell padding.

    A table that is alone is described by the `own` arguments, those of a group by `table`.
    ALIGN divides dims, output strides and columns, STRIDE_ALIGN row strides: how wide accesses may be.
    """
    INDEXED: tl.constexpr = vectors is None
    feature, rows, dim, stride, column = tl.program_id(1), own_rows, own_dim, own_stride, tl.program_id(1)
    if table is not None:
        entry = table + tl.program_id(1) * _COLUMNS
        feature, rows, column = tl.load(entry), tl.load(entry + 2), tl.load(entry + 5)
        dim, stride = tl.load(entry + 3).to(tl.int32), tl.load(entry + 4)
    weight = address(own_weight, table, tl.program_id(1) * _COLUMNS + 1, DTYPE) if INDEXED else vectors
    dim, column = tl.multiple_of(dim, ALIGN), tl.multiple_of(column, ALIGN)
    stride = tl.multiple_of(stride, STRIDE_ALIGN)
    bag = tl.program_id(0).to(tl.int64) * BB + tl.arange(0, BB)
    present = bag < batch
    begin, end = bag_range(offsets, feature * batch + tl.minimum(bag, batch - 1), count)
    end = tl.where(present, end, begin)
    d = tl.arange(0, LANES)
    low = tl.zeros((BB, LANES), tl.float32)
    high = low
    pooled = tl.zeros((BB,), tl.int32)
    wrong, wrong_at = tl.zeros((BB,), tl.int64), begin  # counted here, reported once: no branch in the loop
    for step in tl.range(0, tl.max(end - begin), loop_unroll_factor=UNROLL):
        i = begin + step
        keep = i < end
        index = i
        if indices is not None:
            index = tl.load(indices + i, mask=keep, other=0).to(tl.int64)
            bad = keep & ((index < 0) | (index >= rows))
            wrong += bad.to(tl.int64)
            wrong_at = tl.where(bad, i, wrong_at)
            keep = keep & ~bad & (index != padding)
        if not INDEXED:
            index = i
        values_low, values_high = load_rows(weight, index, d, dim, stride, keep, KIND)
        if sample_weights is not None:
            w = tl.load(sample_weights + i, mask=keep, other=0.0).to(tl.float32)
        else:
            w = pooled.to(tl.float32)  # unused
        WEIGHTED: tl.constexpr = sample_weights is not None
        low = _accumulate(low, values_low, w, keep, pooled == 0, MODE, WEIGHTED)
        if KIND == _INT4:
            high = _accumulate(high, values_high, w, keep, pooled == 0, MODE, WEIGHTED)
        pooled += keep.to(tl.int32)
    if indices is not None:
        count_faults(fault_counter, wrong, wrong_at, feature, indices)
    if MODE == _MEAN:
        share = tl.maximum(pooled, 1).to(tl.float32)[:, None]
        low = tl.div_rn(low, share + tl.zeros_like(low))
        high = tl.div_rn(high, share + tl.zeros_like(high))
    where = out + bag[:, None] * tl.multiple_of(stride_out, ALIGN) + column
    if KIND == _INT4:
        d2 = tl.arange(0, 2 * LANES)
        mask = present[:, None] & (d2 < dim)[None, :]
        tl.store(where + d2[None, :], tl.interleave(low, high).to(out.dtype.element_ty), mask=mask)
    else:
        mask = present[:, None] & (d < dim)[None, :]
        tl.store(where + d[None, :], low.to(out.dtype.element_ty), mask=mask)


_DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.uint8: tl.uint8,
}


def row_dim(weight: torch.Tensor, kind: int) -> int:
    """Embedding dimension of a table [rows, columns] of this kind of rows."""
    columns = weight.shape[1]
    return columns if kind == FLOAT else ROW_FORMATS[QUANTISED[kind]].dim(columns)


def kind_of(code: int) -> int:
    """The kind of quantised rows of this code. ``NotImplementedError`` for a format without a kernel here."""
    found = quantised_format(code).name
    for kind, name in QUANTISED.items():
        if name == found:
            return kind
    raise NotImplementedError(f"rows of {found} have no kernel for GPUs")


def embedding_bag_grouped(
    weights: Sequence[torch.Tensor],
    indices: torch.Tensor,
    offsets: torch.Tensor,
    batch: int,
    features: Sequence[int],
    mode: int,
    sample_weights: torch.Tensor | None,
    padding: int,
    out: torch.Tensor,
    columns: Sequence[int],
    kind: int = FLOAT,
) -> None:
    """Pool the bags of `features` into columns of out [batch, total]. IDs out of range are left out.

    Args:
        weights: per table [rows, dim]; contiguous, of one dtype (uint8 for the quantised kinds).
        indices: [n]; those equal to `padding` are left out (-1: none are).
        offsets: [features in the batch * batch + 1].
        mode: 0 sum, 1 mean, 2 max. With sample_weights [n], mean divides the weighted sum by the number.
        columns: where in `out` each table's part begins.
    """
    dims = [row_dim(weight, kind) for weight in weights]
    if kind != FLOAT and any(dim % 4 for dim in dims):
        raise ValueError(f"weights: quantised rows need a dim that is a multiple of 4, got {dims}")
    entries = [(weight, len(weight), weight.stride(0)) for weight in weights]
    _launch(
        None, entries, dims, weights[0].dtype, indices, offsets, batch, features, mode, sample_weights,
        padding, out, columns, kind,
    )  # fmt: skip


def pool_grouped(
    vectors: torch.Tensor,
    dims: Sequence[int],
    indices: torch.Tensor,
    offsets: torch.Tensor,
    batch: int,
    features: Sequence[int],
    mode: int,
    sample_weights: torch.Tensor | None,
    padding: int,
    out: torch.Tensor,
    columns: Sequence[int],
) -> None:
    """Pool vectors [n, >= max(dims)], one per index, as `embedding_bag_grouped` pools rows.

    Feature t uses the first dims[t] columns. Vectors of negative IDs are left out and counted.
    """
    entries = [(0, 2**63 - 1, vectors.stride(0))] * len(dims)
    _launch(
        vectors, entries, dims, vectors.dtype, indices, offsets, batch, features, mode, sample_weights,
        padding, out, columns, FLOAT,
    )  # fmt: skip


def _launch(
    vectors, entries, dims, dtype, indices, offsets, batch, features, mode, sample_weights, padding, out,
    columns, kind,
):  # fmt: skip
    if not batch or not dims:
        return
    device, counter = out.device, faults.counter(out.device)
    # int(): sizes that are compiled in; what torch.compile took for a variable is fixed here
    dims, stride_out = [int(dim) for dim in dims], int(out.stride(0))
    entries = [(weight, rows, int(stride)) for weight, rows, stride in entries]
    alone = list(features) == list(columns) == [0]
    if alone:
        (weight, rows, stride), table = entries[0], None
        own = (weight if vectors is None else None, rows, dims[0], stride)
    else:
        together = zip(features, entries, dims, columns, strict=True)
        rows = [(feature, *entry[:2], dim, entry[2], column) for feature, entry, dim, column in together]
        table, own = device_table(rows, device), (None, 0, 0, 0)
    lanes = triton.next_power_of_2(max(dims)) // (2 if kind == INT4 else 1)
    bags, warps = tile_shape(lanes, dtype.itemsize)
    launchable(embedding_bag_kernel)[(triton.cdiv(batch, bags), len(dims))](
        table, *own, vectors, indices, offsets, sample_weights, out, counter, batch, len(indices),
        stride_out, padding, _DTYPES[dtype], kind, mode, bags, lanes,
        math.gcd(16, stride_out, *dims, *columns), math.gcd(16, *(stride for *_, stride in entries)), 4,
        num_warps=warps,
    )  # fmt: skip
    faults.after_launch(counter, out)


def tile_shape(lanes: int, element_size: int) -> tuple[int, int]:
    """(bags, warps) of a program: 16 bytes of row per thread, so that each load is as wide as loads get."""
    threads_per_row = max(1, lanes * element_size // 16)
    warps = 4
    return max(1, min(64, warps * 32 // threads_per_row)), warps
