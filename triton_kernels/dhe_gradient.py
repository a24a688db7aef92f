"""Gradient of a deep hash embedding's first layer, whose input is not in memory: the hashes are made again.

    dW1[n, k] = sum over IDs i of dz[i, n] * encode(i)[k]

A program owns a [BK hashes, BN outputs] tile for one slice of the IDs; encodings come out transposed, in the
registers that the matrix unit takes its left operand from. Slices are summed afterwards, in order, so that
results do not depend on timing.
"""

import torch
import triton
import triton.language as tl

from mprec.names import FAMILIES

from .dense import dot_precision
from .hashing import encode, is_narrow
from .tuning import target_of, tile_width


@triton.jit
def _slice_product(
    ids, coefficients, gradient, first, stop, k, n, K: tl.constexpr, N: tl.constexpr, FAMILY: tl.constexpr,
    WIDE: tl.constexpr, SLICE: tl.constexpr, BI: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    total = tl.zeros((BK, BN), tl.float32)
    for i0 in tl.range(0, SLICE, BI, num_stages=STAGES):
        i = first + i0 + tl.arange(0, BI)
        x = tl.load(ids + i, mask=i < stop, other=0).to(tl.int64)
        encodings = tl.trans(encode(x[:, None], coefficients, k, K, FAMILY, WIDE, K % BK == 0))
        mask = (i < stop)[:, None]
        if N % BN != 0:
            mask = mask & (n < N)[None, :]
        dz = tl.load(gradient + i[:, None] * N + n[None, :], mask=mask, other=0.0)
        total = tl.dot(encodings.to(gradient.dtype.element_ty), dz, total, input_precision=PRECISION)
    return total


@triton.jit(do_not_specialize=["count"])
def first_layer_gradient_kernel(
    ids, coefficients, gradient, partial, count, K: tl.constexpr, N: tl.constexpr, FAMILY: tl.constexpr,
    SLICE: tl.constexpr, BI: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """partial[s, n, k] = sum of gradient[i, n] * encode(ids[i])[k] over the IDs of slice s."""
    k = tl.program_id(0) * BK + tl.arange(0, BK)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    first = tl.program_id(2).to(tl.int64) * SLICE
    stop = tl.minimum(first + SLICE, count)
    lane = tl.arange(0, 128)
    narrow = first >= 0
    for i0 in tl.range(0, SLICE, 128):
        i = first + i0 + lane
        narrow = narrow & is_narrow(tl.load(ids + i, mask=i < stop, other=0).to(tl.int64), FAMILY)
    if narrow:
        total = _slice_product(
            ids, coefficients, gradient, first, stop, k, n, K, N, FAMILY, False, SLICE, BI, BK, BN, STAGES,
            PRECISION,
        )  # fmt: skip
    else:
        total = _slice_product(
            ids, coefficients, gradient, first, stop, k, n, K, N, FAMILY, True, SLICE, BI, BK, BN, STAGES,
            PRECISION,
        )  # fmt: skip
    where = partial + (tl.program_id(2).to(tl.int64) * N + n[None, :]) * K + k[:, None]
    tl.store(where, total, mask=(k < K)[:, None] & (n < N)[None, :])


def first_layer_gradient(
    indices: torch.Tensor, coefficients: torch.Tensor, gradient: torch.Tensor, family: str
) -> torch.Tensor:
    """gradient^T @ encode(indices): [N, k] of gradient's dtype, for gradient [n, N] of the layer's sums."""
    count, width, k = len(indices), gradient.shape[1], coefficients.shape[1]
    if not count:
        return gradient.new_zeros(width, k)
    slice_ = 512 if count <= 8192 else 4096
    slices = triton.cdiv(count, slice_)
    partial = torch.empty(slices, width, k, device=indices.device)
    half = gradient.dtype.itemsize == 2
    bk, bn, bi, warps = 64, min(tile_width(width), 128 if half else 64), 64 if half else 32, 4
    grid = (triton.cdiv(k, bk), triton.cdiv(width, bn), slices)
    first_layer_gradient_kernel[grid](
        indices.contiguous(), coefficients.contiguous(), gradient.contiguous(), partial, count, k, width,
        FAMILIES[family], slice_, bi, bk, bn, 2, dot_precision(target_of(indices.device)), num_warps=warps,
    )  # fmt: skip
    return (partial[0] if slices == 1 else partial.sum(0)).to(gradient.dtype)
