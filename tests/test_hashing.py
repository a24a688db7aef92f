"""Hash families: coefficients that never change, and the reference against Python integers."""

import pytest
import torch

from mprec import ops, reference
from mprec.hashing import ARTIFACT_BUCKETS, ARTIFACT_PRIME, PRIME, coefficient_rows, coefficients
from mprec.names import FAMILIES

EDGE_IDS = [0, 1, PRIME - 1, PRIME, PRIME + 1, 2**30 - 1, 2**30, 2**31, 2**31 + 1, 2**60, 2**63 - 1]
GOLDEN_UNIVERSAL = [
    [347587116, 335639013, 1336528144],
    [1355852008, 158428682, 1982482769],
    [593615318, 1619133582, 2037817919],
    [1246120281, 1594297456, 91047980],
]
GOLDEN_ARTIFACT = [[917131, 939696, 887033], [990495, 644674, 496574]]


def test_coefficients_are_the_same_for_ever():
    assert coefficients(3, "universal", 0).tolist() == GOLDEN_UNIVERSAL
    assert coefficients(3, "artifact", 7).tolist() == GOLDEN_ARTIFACT


@pytest.mark.parametrize("family", FAMILIES)
def test_coefficients_are_in_range(family):
    c = coefficients(4096, family, seed=3)
    assert c.shape == (coefficient_rows(family), 4096)
    assert c.dtype == torch.int32
    p = ARTIFACT_PRIME if family.startswith("artifact") else PRIME
    assert c.min() >= 0
    assert c[0].min() >= 1
    assert c.max() < p
    assert not torch.equal(c, coefficients(4096, family, seed=4))


def by_definition(coefficient_columns, x: int, family: str) -> list[int]:
    def wrapped(v):  # int64
        return (v + 2**63) % 2**64 - 2**63

    if family.startswith("artifact"):
        values = [wrapped(wrapped(a * x) + b) for a, b in coefficient_columns]
        return [c_mod(c_mod(v, ARTIFACT_PRIME), ARTIFACT_BUCKETS) for v in values]
    limbs = x & (2**30 - 1), (x >> 30) & (2**30 - 1), x >> 60
    return [(a * limbs[0] + c * limbs[1] + d * limbs[2] + b) % PRIME for a, b, c, d in coefficient_columns]


def c_mod(v: int, m: int) -> int:
    """C's remainder: the sign of the dividend."""
    return abs(v) % m * (1 if v >= 0 else -1)


@pytest.mark.parametrize("family", FAMILIES)
def test_hash_values_against_python_integers(family):
    c = coefficients(64, family, seed=1)
    c[:, 0] = (ARTIFACT_PRIME if family.startswith("artifact") else PRIME) - 1  # the largest sums
    columns = c.t().tolist()
    got = reference.hash_values(c, torch.tensor(EDGE_IDS), family).tolist()
    assert got == [by_definition(columns, x, family) for x in EDGE_IDS]


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "artifact_gaussian"])
def test_native_encoding_equals_the_reference_bit_for_bit(family):
    c = coefficients(96, family, seed=2)
    ids = torch.cat([torch.tensor(EDGE_IDS), torch.arange(1000)])
    assert torch.equal(ops.hash_encode(c, ids, family), reference.encode(c, ids, family))


def test_native_gaussian_encoding_is_close():
    c = coefficients(96, "artifact_gaussian", seed=2)
    ids = torch.arange(1000)
    expected = reference.encode(c, ids, "artifact_gaussian")
    torch.testing.assert_close(ops.hash_encode(c, ids, "artifact_gaussian"), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("family", "variance"), [("universal", 1 / 3), ("sign", 1 / 3), ("u7", 1 / 3)])
def test_encodings_are_centred_and_have_the_uniform_variance(family, variance):
    u = reference.encode(coefficients(256, family, 5), torch.arange(4096), family).double()
    assert abs(u.mean()) < 0.02
    assert abs(u.var() - variance) < 0.02
    assert u.abs().max() <= 1


@pytest.mark.parametrize(
    ("k", "family", "seed", "argument"),
    [
        (0, "universal", 0, "k"),
        (3, "artifact_gaussian", 0, "k"),
        (4, "sign", -1, "seed"),
        (4, "md5", 0, "family"),
    ],
)
def test_bad_arguments(k, family, seed, argument):
    with pytest.raises(ValueError, match=f"^{argument}:"):
        coefficients(k, family, seed)
