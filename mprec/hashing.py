"""Hash families of deep hash embeddings: k functions from an int64 ID to a number near [-1, 1].

* ``universal``, the default: ``h = (a x0 + c x1 + d x2 + b) mod p`` over the ID's 30-bit limbs,
  ``u = 2h/(p-1) - 1``;
* ``sign``: the high bit of that ``h``: ``u = +-1/sqrt(3)``, the variance of the uniform encoding;
* ``u7``: the high seven bits of that ``h``: 128 evenly spaced levels in [-1, 1];
* ``artifact``: ``h = ((a x + b) mod 1000003) mod 10**6``, ``u = 2h/(10**6-1) - 1``: bit-compatible with the
  code of the DHE and MP-Rec papers. IDs equal modulo 1000003 share all k values;
* ``artifact_gaussian``: the Box-Muller transform of pairs of ``artifact`` hashes; k must be even;

with ``p = 2**31 - 1``. The first three are pairwise independent for every ID in ``[0, 2**63)``. The formulas
themselves are in :mod:`mprec.reference`. Coefficients are a buffer of the model, so a checkpoint means
the same for ever; they also follow from the seed alone, on every machine and with every NumPy version.
"""

from typing import NamedTuple

import numpy as np
import torch

from mprec._native import hash_families
from mprec.errors import DtypeError
from mprec.names import FAMILIES, code

__all__ = [
    "ARTIFACT_BUCKETS",
    "ARTIFACT_PRIME",
    "PRIME",
    "Family",
    "check_family",
    "coefficient_rows",
    "coefficients",
    "families_for",
    "ids_of_keys",
]

PRIME = 2**31 - 1
MAX_ID = 2**63 - 1
ARTIFACT_PRIME = 1_000_003
ARTIFACT_BUCKETS = 1_000_000


class Family(NamedTuple):
    """What native code says of a hash family.

    Attributes:
        name: as users write it.
        artifact: the hash modulo 1000003, of two rows of coefficients; else modulo 2**31 - 1, of four.
        together: so many hashes are transformed together, so k is a multiple of it.
        level_bits: values are ``2**level_bits`` evenly spaced levels, from the hash's high bits; 0: they are
            not.
        int8, lut: whether a decoder's first layer can have that precision.
    """

    name: str
    artifact: bool
    together: int
    level_bits: int
    int8: bool
    lut: bool


_FAMILIES = {family["name"]: Family(**family) for family in hash_families()}


def families_for(precision: str) -> tuple[str, ...]:
    """The families for which a decoder's first layer can have this precision, ``"int8"`` or ``"lut"``."""
    return tuple(name for name, family in _FAMILIES.items() if getattr(family, precision))


def check_family(name: str, k: int) -> Family:
    """The family of this name. ``ValueError`` for an unknown one, or one that does not take ``k`` hashes."""
    code(FAMILIES, name, "family")
    family = _FAMILIES[name]
    if k % family.together:
        raise ValueError(
            f"k: expected a multiple of {family.together} (hashes that {name} transforms at once), got {k}"
        )
    return family


def ids_of_keys(keys: torch.Tensor) -> torch.Tensor:
    """IDs of deep hash embeddings, in ``[0, 2**63)``, from 64-bit keys, such as hashes of text: int64, of the
    shape of ``keys``, which may be of any integer type.

    A key that is not negative is its own ID, and of a negative one the sign bit is left out. So two keys
    share an ID if they differ in the sign bit alone: of n random keys two do with a probability of about
    n² / 2^64, and a small negative number shares its ID with none that occurs.
    """
    if keys.is_floating_point() or keys.is_complex() or keys.dtype == torch.bool:
        raise DtypeError(f"keys: expected integers, got {keys.dtype}")
    wide = keys.view(torch.int64) if keys.dtype == torch.uint64 else keys.to(torch.int64)
    return wide & MAX_ID


def coefficient_rows(family: str) -> int:
    """Rows of the coefficients: ``a, b, c, d`` (limb 0, constant, limbs 1 and 2), or ``a, b`` for
    artifact."""
    return 2 if check_family(family, 0).artifact else 4


def coefficients(k: int, family: str = "universal", seed: int = 0) -> torch.Tensor:
    """Draw ``k`` hash functions: int32 ``[rows, k]``, row ``a`` in [1, p), the others in [0, p).

    Raw 64-bit words of the counter-based Philox generator, reduced modulo the range (bias below 2**-32).

    Raises:
        ValueError: unknown family, negative seed, ``k`` not positive or (``artifact_gaussian``) not even.
    """
    rows = coefficient_rows(family)
    if k < 1:
        raise ValueError(f"k: expected at least 1 hash function, got {k}")
    artifact = check_family(family, k).artifact
    if not 0 <= seed < 2**128:
        raise ValueError(f"seed: expected a number in [0, 2**128), got {seed}")
    p = np.uint64(ARTIFACT_PRIME if artifact else PRIME)
    words = np.random.Philox(key=seed).random_raw(rows * k).reshape(rows, k)
    words[0] = 1 + words[0] % (p - np.uint64(1))
    words[1:] %= p
    return torch.from_numpy(words.astype(np.int32))
