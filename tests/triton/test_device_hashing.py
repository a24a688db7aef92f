"""Hash families on the device against Python's exact integers."""

import math

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from mprec.triton_kernels.hashing import divide, hash_encode

from mprec import _C
from mprec.names import FAMILIES

P31, P, M = 2**31 - 1, 1000003, 10**6
EDGES = [0, 1, P, P - 1, P31 - 1, P31, P31 + 1, 2**30 - 1, 2**30, 2**31, 2**31 + 1]
WIDE_EDGES = [2**43 - 1, 2**43, 9223353590074, 9223353590075, 2**60, 2**60 + 1, 2**63 - 1]


def coefficients_of(family: str, k: int, seed: int = 0) -> torch.Tensor:
    generator = np.random.default_rng(seed)
    rows, p = (2, P) if family.startswith("artifact") else (4, P31)
    c = generator.integers(0, p, (rows, k))
    c[0] = generator.integers(1, p, k)
    c[:, 0], c[:, 1] = p - 1, 0  # the largest sums that can occur, and the smallest
    c[0, 1] = 1
    return torch.tensor(c, dtype=torch.int32)


def exact_hash(x: int, c: list[int], family: str) -> int:
    if family.startswith("artifact"):
        a, b = c
        wrapped = (a * x + b + 2**63) % 2**64 - 2**63
        return int(math.fmod(math.copysign(abs(wrapped) % P, wrapped), M))
    a, b, c1, c2 = c
    return (a * (x & (2**30 - 1)) + c1 * ((x >> 30) & (2**30 - 1)) + c2 * ((x >> 60) & 15) + b) % P31


def exact_encoding(h: int, family: str) -> np.float32:
    f = np.float32
    if family == "artifact":
        return f(h) / f(M - 1) * f(2) - f(1)
    if family == "universal":
        return f(h) * f(2.0**-30) - f(1)
    if family == "sign":
        return f(1 / math.sqrt(3)) if h >= 2**30 else f(-1 / math.sqrt(3))
    return f(2 * (h >> 24) - 127) / f(127)


@pytest.mark.parametrize("ids", [EDGES, WIDE_EDGES + EDGES], ids=["narrow", "wide"])
@pytest.mark.parametrize("family", ["universal", "artifact", "sign", "u7"])
def test_bit_equal_with_exact_integers(family, ids, device):
    generator = np.random.default_rng(1)
    ids = ids + [int(i) for i in generator.integers(0, max(ids), 20)]
    c = coefficients_of(family, 37)
    got = hash_encode(torch.tensor(ids, device=device), c.to(device), family).cpu().numpy()
    want = np.array(
        [[exact_encoding(exact_hash(x, column, family), family) for column in c.T.tolist()] for x in ids]
    )
    np.testing.assert_array_equal(got.view(np.int32), want.view(np.int32))


@pytest.mark.parametrize("family", ["universal", "artifact", "sign", "u7"])
def test_bit_equal_with_the_native_kernels(family, device):
    ids = torch.cat([torch.tensor(EDGES + WIDE_EDGES), torch.randint(0, 2**62, (500,))])
    c = coefficients_of(family, 64)
    native = torch.empty(len(ids), 64)
    _C.hash_encode(c, ids, FAMILIES[family], native)
    got = hash_encode(ids.to(device), c.to(device), family).cpu()
    assert torch.equal(got.view(torch.int32), native.view(torch.int32))


@triton.jit
def _divide_kernel(dividends, out, n, DIVISOR: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, divide(tl.load(dividends + i, mask=i < n, other=0.0), DIVISOR), mask=i < n)


@pytest.mark.parametrize(("low", "high", "divisor"), [(-M, M, M - 1), (-127, 128, 127)])
def test_division_is_correctly_rounded_for_every_hash(low, high, divisor, device):
    dividends = torch.arange(low + 1, high, dtype=torch.float32, device=device)
    out = torch.full_like(dividends, math.nan)
    n = dividends.numel()
    _divide_kernel[(triton.cdiv(n, 1 << 16),)](dividends, out, n, float(divisor), 1 << 16)
    assert torch.equal(out, dividends / divisor)  # torch divides by IEEE rules


def test_gaussian_is_box_muller(device):
    c, ids = coefficients_of("artifact_gaussian", 40), torch.tensor(EDGES + WIDE_EDGES[:2])
    got = hash_encode(ids.to(device), c.to(device), "artifact_gaussian").cpu()
    h = torch.tensor([[exact_hash(x, column, "artifact") for column in c.T.tolist()] for x in ids.tolist()])
    u1, u2 = (h[:, 0::2] + 1).double() / M, (h[:, 1::2] + 1).double() / M
    radius = torch.sqrt(-2 * torch.log(u1))
    want = torch.stack([radius * torch.cos(2 * math.pi * u2), radius * torch.sin(2 * math.pi * u2)], -1)
    torch.testing.assert_close(got.double(), want.flatten(1), rtol=1e-4, atol=1e-5)
