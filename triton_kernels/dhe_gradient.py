"""Gradients of deep hash embeddings, for any number of features of equal shape; encodings are made again.

    dW[n, k] = sum over rows i of dz[i, n] * left[i, k]        db[n] = sum over rows i of dz[i, n]

A program owns a [BK inputs, BN outputs] tile for one slice of a feature's rows; the left operand comes out
transposed, hashed in the registers that the matrix unit takes it from, or read from memory for layers after
the first. Slices are summed afterwards, in order, so that results do not depend on timing.

Which rows are a feature's is known on the device only (`grouped.py`): nothing here waits for it.
"""

import torch
import triton
import triton.language as tl

from mprec.names import FAMILIES

from .dense import dot_precision
from .grouped import address, count_tiles, device_table, find_tile, id_ranges, lanes
from .hashing import encode, is_narrow
from .launching import launchable
from .tuning import target_of, tile_width


@triton.jit
def _load_gradient(gradient, i, n, stop, N: tl.constexpr, EVEN: tl.constexpr):
    mask = (i < stop)[:, None]
    if not EVEN:
        mask = mask & (n < N)[None, :]
    return tl.load(gradient + i[:, None] * N + n[None, :], mask=mask, other=0.0)


@triton.jit
def _slice_product(
    inputs, source, gradient, first, stop, k, n, K: tl.constexpr, N: tl.constexpr, FAMILY: tl.constexpr,
    HASHED: tl.constexpr, WIDE: tl.constexpr, SLICE: tl.constexpr, BI: tl.constexpr, BK: tl.constexpr,
    BN: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    total = tl.zeros((BK, BN), tl.float32)
    for i0 in tl.range(0, SLICE, BI, num_stages=STAGES):
        i = first + i0 + tl.arange(0, BI)
        if HASHED:
            x = tl.load(inputs + i, mask=i < stop, other=0).to(tl.int64)
            left = encode(x[:, None], source, k, K, FAMILY, WIDE, K % BK == 0).to(gradient.dtype.element_ty)
        else:
            keep = (i < stop)[:, None] & (k < K)[None, :]
            left = tl.load(inputs + i[:, None] * K + k[None, :], mask=keep, other=0.0)
        dz = _load_gradient(gradient, i, n, stop, N, N % BN == 0)
        total = tl.dot(tl.trans(left), dz, total, input_precision=PRECISION)
    return total


@triton.jit(do_not_specialize=["batch", "count"])
def layer_gradient_kernel(
    inputs, table, hashes, offsets, gradient, partial, partial_bias, batch, count, T: tl.constexpr,
    LANES: tl.constexpr, STRIDE: tl.constexpr, K: tl.constexpr, N: tl.constexpr, FAMILY: tl.constexpr,
    HASHED: tl.constexpr, SLICE: tl.constexpr, BI: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """partial[s, n, k] = sum of gradient[i, n] * left[i, k] over the rows of slice s; partial_bias[s, n]."""
    slice_ = tl.program_id(2)
    if slice_ < count_tiles(offsets, table, batch, count, T, STRIDE, LANES, SLICE):
        member, first, stop = find_tile(slice_, offsets, table, batch, count, T, STRIDE, LANES, SLICE)
        stop = tl.minimum(first + SLICE, stop)
        k = tl.program_id(0) * BK + tl.arange(0, BK)
        n = tl.program_id(1) * BN + tl.arange(0, BN)
        if HASHED:
            source = address(hashes, table, member * STRIDE + 1, tl.int32)
            lane = tl.arange(0, 128)
            narrow = first >= 0
            for i0 in tl.range(0, SLICE, 128):
                i = first + i0 + lane
                narrow = narrow & is_narrow(tl.load(inputs + i, mask=i < stop, other=0).to(tl.int64), FAMILY)
            if narrow:
                total = _slice_product(
                    inputs, source, gradient, first, stop, k, n, K, N, FAMILY, True, False, SLICE, BI, BK,
                    BN, STAGES, PRECISION,
                )  # fmt: skip
            else:
                total = _slice_product(
                    inputs, source, gradient, first, stop, k, n, K, N, FAMILY, True, True, SLICE, BI, BK,
                    BN, STAGES, PRECISION,
                )  # fmt: skip
        else:
            total = _slice_product(
                inputs, inputs, gradient, first, stop, k, n, K, N, FAMILY, False, False, SLICE, BI, BK,
                BN, STAGES, PRECISION,
            )  # fmt: skip
        where = partial + (slice_.to(tl.int64) * N + n[None, :]) * K + k[:, None]
        tl.store(where, total, mask=(k < K)[:, None] & (n < N)[None, :])
        if tl.program_id(0) == 0:  # one column of programs reads its gradients once more
            sums = tl.zeros((BN,), tl.float32)
            for i0 in tl.range(0, SLICE, BI):
                i = first + i0 + tl.arange(0, BI)
                sums += tl.sum(_load_gradient(gradient, i, n, stop, N, N % BN == 0).to(tl.float32), 0)
            tl.store(partial_bias + slice_ * N + n, sums, mask=n < N)


@triton.jit(do_not_specialize=["batch", "count"])
def sum_slices_kernel(
    partial, table, offsets, out, batch, count, T: tl.constexpr, LANES: tl.constexpr, STRIDE: tl.constexpr,
    SIZE: tl.constexpr, SLICE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[member] = sum of the partial results [SIZE] of its slices, first to last."""
    begin, end = id_ranges(offsets, table, batch, count, T, STRIDE, LANES)
    slices = (end - begin + SLICE - 1) // SLICE
    t = tl.arange(0, LANES)
    member = tl.program_id(1)
    first = tl.sum(tl.where(t < member, slices, 0))
    mine = tl.sum(tl.where(t == member, slices, 0))
    e = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for s in tl.range(first, first + mine):
        total += tl.load(partial + s * SIZE + e, mask=e < SIZE, other=0.0)
    where = out + member.to(tl.int64) * SIZE + e
    tl.store(where, total.to(out.dtype.element_ty), mask=e < SIZE)


def layer_gradients(
    inputs: torch.Tensor, coefficients, gradient: torch.Tensor, offsets, batch: int, features, family: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """(dW [features, N, K], db [features, N]) of a layer, of the dtype of gradient [n, N] of its sums.

    Args:
        inputs: what the layer took: IDs [n], hashed by the `coefficients` of each feature, or vectors [n, K].
        coefficients: int32 [R, K] per feature; None for vectors.
        offsets, batch, features: which rows are whose, as in `dhe.decode_grouped`.
    """
    hashed, count, device = coefficients is not None, len(inputs), inputs.device
    k, width = int((coefficients[0] if hashed else inputs).shape[1]), int(gradient.shape[1])
    members = len(features)
    if not count:
        return gradient.new_zeros(members, width, k), gradient.new_zeros(members, width)
    table, alone = None, list(features) == [0]
    if not alone:
        table = device_table(list(zip(features, coefficients or [0] * members, strict=True)), device)
    slice_ = 512 if count <= 8192 else 4096
    slices = triton.cdiv(count, slice_) + (0 if offsets is None else members)
    partial = torch.empty(slices, width, k, device=device)
    partial_bias = torch.empty(slices, width, device=device)
    half = gradient.dtype.itemsize == 2
    bk, bn, bi = 64, min(tile_width(width), 128 if half else 64), 64 if half else 32
    group = {"T": members, "LANES": lanes(members), "STRIDE": 2, "SLICE": slice_}
    launchable(layer_gradient_kernel)[(triton.cdiv(k, bk), triton.cdiv(width, bn), slices)](
        inputs, table, coefficients[0] if alone and hashed else None, offsets, gradient, partial,
        partial_bias, batch, count, K=k, N=width, FAMILY=FAMILIES[family], HASHED=hashed, BI=bi, BK=bk,
        BN=bn, STAGES=2, PRECISION=dot_precision(target_of(device)), num_warps=4, **group,
    )  # fmt: skip
    grads = gradient.new_empty(members, width, k), gradient.new_empty(members, width)
    for out, parts, size in zip(grads, (partial, partial_bias), (width * k, width), strict=True):
        launchable(sum_slices_kernel)[(triton.cdiv(size, 1024), members)](
            parts, table, offsets, out, batch, count, SIZE=size, BLOCK=1024, **group
        )
    return grads


def first_layer_gradient(
    indices: torch.Tensor, coefficients: torch.Tensor, gradient: torch.Tensor, family: str
) -> torch.Tensor:
    """gradient^T @ encode(indices): [N, k] of gradient's dtype, for gradient [n, N] of the layer's sums."""
    grads, _ = layer_gradients(
        indices.contiguous(), [coefficients.contiguous()], gradient.contiguous(), None, 1, [0], family
    )
    return grads[0]
