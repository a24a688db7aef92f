"""Dense layers on the device: activations, tiles of `nn.Linear` weights, and how their products are made."""

import torch
import triton
import triton.language as tl

_RELU: tl.constexpr = tl.constexpr(1)
_SIGMOID: tl.constexpr = tl.constexpr(2)
_MISH: tl.constexpr = tl.constexpr(3)


@triton.constexpr_function
def is_float8(dtype) -> bool:
    """Whether weights are in float8: then outputs have scales, and biases are float32."""
    return dtype == tl.float8e4nv


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """The activation of a float32 tile; NaN stays NaN."""
    if ACTIVATION == _RELU:
        return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACTIVATION == _SIGMOID:
        return 1.0 / (1.0 + tl.exp(-x))
    elif ACTIVATION == _MISH:
        # x tanh(softplus(x)) = x n / (n + 2) with n = e^x (e^x + 2); above 20 the factor is 1 in float32
        e = tl.exp(tl.minimum(x, 20.0))
        n = e * (e + 2.0)
        return x * (n / (n + 2.0))
    else:
        return x


@triton.jit
def _load_row(row, n, N: tl.constexpr, EVEN: tl.constexpr):
    """float32 [1, BN]: entries n of a row [N], zero beyond N."""
    if EVEN:
        return tl.load(row + n).to(tl.float32)[None, :]
    else:
        return tl.load(row + n, mask=n < N, other=0.0).to(tl.float32)[None, :]


@triton.jit
def add_bias(x, bias, n, N: tl.constexpr, EVEN: tl.constexpr, SCALED: tl.constexpr):
    """x + bias, columns n of [N]; SCALED: x * scale + bias, of [2, N] with the scales first."""
    if SCALED:
        return x * _load_row(bias, n, N, EVEN) + _load_row(bias + N, n, N, EVEN)
    else:
        return x + _load_row(bias, n, N, EVEN)


@triton.jit
def multiply_add(left, tile, accumulator, PRECISION: tl.constexpr):
    """accumulator + left @ tile, in float32.

    sm_90's float8 products keep 14 bits of a sum: those of a tile are added to the others outside them.
    """
    if is_float8(left.dtype):
        return accumulator + tl.dot(left, tile)
    else:
        return tl.dot(left, tile, accumulator, input_precision=PRECISION)


@triton.jit
def load_weight(
    weight, n, k, N: tl.constexpr, K: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr,
    BACKWARD: tl.constexpr = False,
):  # fmt: skip
    """[BK, BN]: the transposed tile (rows n, columns k) of a contiguous weight [N, K], zero outside.

    BACKWARD: the tile as it is (rows k, columns n) of a weight [K, N].
    """
    if BACKWARD:
        where = weight + k[:, None] * N + n[None, :]
    else:
        where = weight + n[None, :] * K + k[:, None]
    if EVEN_N and EVEN_K:
        return tl.load(where)
    elif EVEN_N:
        return tl.load(where, mask=(k < K)[:, None], other=0.0)
    else:
        return tl.load(where, mask=(k < K)[:, None] & (n < N)[None, :], other=0.0)


def dot_precision(target: str) -> str:
    """How `tl.dot` may round float32 operands: as torch's setting for float32 matrix products allows."""
    if torch.get_float32_matmul_precision() != "highest":
        return "tf32"
    # tf32x3 keeps float32's accuracy on tensor cores; AMD's multiply float32 natively.
    return "ieee" if target == "gfx942" else "tf32x3"
