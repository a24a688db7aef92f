"""Hash families on the device: an int64 ID and a column of coefficients become one encoding in [-1, 1].

Formulas and layouts are those of `mprec.hashing`; every family but `artifact_gaussian` is bit-equal to it.
A kernel asks once per tile of IDs whether all of them are `is_narrow`: narrow IDs need one 32x32->64 bit
multiply per hash, wide ones three (or a 64-bit remainder).
"""

import torch
import triton
import triton.language as tl

from mprec.hashing import check_family
from mprec.names import FAMILIES

_UNIVERSAL: tl.constexpr = tl.constexpr(0)
_ARTIFACT: tl.constexpr = tl.constexpr(1)
_GAUSSIAN: tl.constexpr = tl.constexpr(2)
_SIGN: tl.constexpr = tl.constexpr(3)

_P31: tl.constexpr = tl.constexpr(2**31 - 1)
_LIMB: tl.constexpr = tl.constexpr(2**30 - 1)
_ARTIFACT_P: tl.constexpr = tl.constexpr(1000003)
_ARTIFACT_M: tl.constexpr = tl.constexpr(1000000)


#: Of each family by number: the bits of a hash that make its level; 0 if it has none.
_LEVEL_BITS = [check_family(name, 0).level_bits for name in FAMILIES]


@triton.constexpr_function
def _shift(family):
    return 31 - _LEVEL_BITS[family]


@triton.constexpr_function
def _most(family):
    return 2 ** _LEVEL_BITS[family] - 1


@triton.jit
def is_narrow(x, FAMILY: tl.constexpr):
    """Whether every ID of the tile fits the short formula (one limb; no int64 overflow for artifact)."""
    if FAMILY == _ARTIFACT or FAMILY == _GAUSSIAN:  # noqa: SIM109 (Triton knows no `in`)
        # a * x + b < 2^63 for a < p as long as x < 2^43; negative IDs wrap like the formula does.
        return tl.max(tl.where(x < 0, 1 << 43, x)) < (1 << 43)
    else:
        return tl.max(x.to(tl.uint64, bitcast=True)) < (1 << 30)


@triton.jit
def divide(h, DIVISOR: tl.constexpr):
    """The correctly rounded float32 quotient h / DIVISOR in three instructions (Markstein's correction)."""
    reciprocal: tl.constexpr = 1.0 / DIVISOR
    quotient = h * reciprocal
    return tl.fma(tl.fma(-quotient, DIVISOR, h), reciprocal, quotient)


@triton.jit
def _column(coefficients, row, k, K: tl.constexpr, EVEN: tl.constexpr):
    if EVEN:
        return tl.load(coefficients + row * K + k)[None, :]
    else:
        return tl.load(coefficients + row * K + k, mask=k < K, other=0)[None, :]


@triton.jit
def universal_hash(x, coefficients, k, K: tl.constexpr, WIDE: tl.constexpr, EVEN: tl.constexpr):
    """(a x0 + c x1 + d x2 + b) mod (2^31 - 1) as uint32 [M, BK], for x int64 [M, 1] in limbs of 30 bits."""
    a = _column(coefficients, 0, k, K, EVEN).to(tl.uint32).to(tl.uint64)
    b = _column(coefficients, 1, k, K, EVEN).to(tl.uint32).to(tl.uint64)
    v = a * (x & _LIMB).to(tl.uint64) + b
    if WIDE:
        c = _column(coefficients, 2, k, K, EVEN).to(tl.uint32).to(tl.uint64)
        d = _column(coefficients, 3, k, K, EVEN).to(tl.uint32).to(tl.uint64)
        v += c * ((x >> 30) & _LIMB).to(tl.uint64) + d * ((x >> 60) & 15).to(tl.uint64)
    # 2^31 = 1 (mod p): add the halves. min(s, s - p) on uint32 subtracts p exactly where s >= p.
    high = (v >> 31).to(tl.uint32)
    if WIDE:
        high = tl.minimum(high, high - _P31)  # up to 2^31 + 12 here: two terms below p must not overflow
    s = (v.to(tl.uint32) & _P31) + high
    return tl.minimum(s, s - _P31)


@triton.jit
def artifact_hash(x, coefficients, k, K: tl.constexpr, WIDE: tl.constexpr, EVEN: tl.constexpr):
    """((a x + b) mod 1000003) mod 10^6 as int32 [M, BK]; C remainders, int64 arithmetic that wraps."""
    a = _column(coefficients, 0, k, K, EVEN)
    b = _column(coefficients, 1, k, K, EVEN)
    if WIDE:
        return ((a.to(tl.int64) * x + b.to(tl.int64)) % _ARTIFACT_P % _ARTIFACT_M).to(tl.int32)
    else:
        # x may be reduced first (nothing overflows). The float quotient is off by less than 0.2 before it
        # is rounded, so the remainder lies in (-p, p), and all of it fits 32 bits that wrap.
        xp = (x % _ARTIFACT_P).to(tl.int32)
        inverse: tl.constexpr = 1.0 / 1000003
        estimate = tl.fma(a.to(tl.float32), xp.to(tl.float32) * inverse, b.to(tl.float32) * inverse)
        # adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits
        q = (estimate + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000
        r = (a * xp + b - q * _ARTIFACT_P).to(tl.uint32, bitcast=True)
        r = tl.minimum(r, r + _ARTIFACT_P)
        return tl.minimum(r, r - _ARTIFACT_M).to(tl.int32, bitcast=True)


@triton.jit
def _cosine_of_turns(turns, quarters):
    """cos(2 pi turns - quarters pi / 2) for turns in [0, 1]: no range reduction that spills registers."""
    nearest = tl.floor(4.0 * turns + 0.5)
    t = (turns - 0.25 * nearest) * 6.283185307179586
    t2 = t * t
    cosine = 1.0 + t2 * (-0.5 + t2 * (1.0 / 24 + t2 * (-1.0 / 720 + t2 * (1.0 / 40320))))
    sine = t + t * t2 * (-1.0 / 6 + t2 * (1.0 / 120 + t2 * (-1.0 / 5040 + t2 * (1.0 / 362880))))
    quadrant = nearest.to(tl.int32) - quarters
    value = tl.where((quadrant & 1) == 0, cosine, -sine)
    return tl.where((quadrant & 2) == 0, value, -value)


@triton.jit
def encode(x, coefficients, k, K: tl.constexpr, FAMILY: tl.constexpr, WIDE: tl.constexpr, EVEN: tl.constexpr):
    """Encodings float32 [M, BK] of IDs x int64 [M, 1] for columns k int32 [BK]; any value beyond K."""
    if FAMILY == _ARTIFACT:
        h = artifact_hash(x, coefficients, k, K, WIDE, EVEN)
        return divide(h.to(tl.float32), _ARTIFACT_M - 1.0) * 2.0 - 1.0
    elif FAMILY == _GAUSSIAN:
        # Box-Muller on the pair of columns (2i, 2i + 1); each column evaluates both hashes of its pair.
        even = artifact_hash(x, coefficients, k & -2, K, WIDE, EVEN)
        odd = artifact_hash(x, coefficients, k | 1, K, WIDE, EVEN)
        radius = tl.sqrt(-2.0 * tl.log((even + 1).to(tl.float32) * (1.0 / _ARTIFACT_M)))
        return radius * _cosine_of_turns((odd + 1).to(tl.float32) * (1.0 / _ARTIFACT_M), (k & 1)[None, :])
    else:
        h = universal_hash(x, coefficients, k, K, WIDE, EVEN)
        if FAMILY == _UNIVERSAL:
            return tl.fma(h.to(tl.int32, bitcast=True).to(tl.float32), 9.313225746154785e-10, -1.0)
        elif FAMILY == _SIGN:
            return tl.where(h >= (1 << 30), 0.5773502691896258, -0.5773502691896258)
        else:
            MOST: tl.constexpr = _most(FAMILY)
            level = (h >> _shift(FAMILY)).to(tl.int32, bitcast=True)
            return divide((2 * level - MOST).to(tl.float32), MOST + 0.0)


@triton.jit(do_not_specialize=["n"])
def _encode_kernel(
    ids,
    coefficients,
    out,
    n,
    K: tl.constexpr,
    FAMILY: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
):
    m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    k = tl.program_id(1) * BK + tl.arange(0, BK)
    x = tl.load(ids + m, mask=m < n, other=0).to(tl.int64)
    keep = (m < n)[:, None] & (k < K)[None, :]
    where = out + m[:, None] * K + k[None, :]
    if is_narrow(x, FAMILY):
        tl.store(where, encode(x[:, None], coefficients, k, K, FAMILY, False, K % BK == 0), mask=keep)
    else:
        tl.store(where, encode(x[:, None], coefficients, k, K, FAMILY, True, K % BK == 0), mask=keep)


def hash_encode(indices, coefficients, family: str):
    """Encodings float32 [n, k] of `indices` (int32 or int64 [n]) under int32 coefficients [R, k]."""
    n, k = indices.numel(), coefficients.shape[1]
    out = indices.new_empty((n, k), dtype=torch.float32)
    if n and k:
        grid = (triton.cdiv(n, 16), triton.cdiv(k, 128))
        _encode_kernel[grid](
            indices.contiguous(), coefficients.contiguous(), out, n, k, FAMILIES[family], 16, 128
        )
    return out
