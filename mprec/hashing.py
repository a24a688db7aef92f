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

import numpy as np
import torch

from mprec.names import FAMILIES, code

__all__ = ["ARTIFACT_BUCKETS", "ARTIFACT_PRIME", "PRIME", "coefficient_rows", "coefficients"]

PRIME = 2**31 - 1
ARTIFACT_PRIME = 1_000_003
ARTIFACT_BUCKETS = 1_000_000


def coefficient_rows(family: str) -> int:
    """Rows of the coefficients: ``a, b, c, d`` (limb 0, constant, limbs 1 and 2), or ``a, b`` for
    artifact."""
    code(FAMILIES, family, "family")
    return 2 if family.startswith("artifact") else 4


def coefficients(k: int, family: str = "universal", seed: int = 0) -> torch.Tensor:
    """Draw ``k`` hash functions: int32 ``[rows, k]``, row ``a`` in [1, p), the others in [0, p).

    Raw 64-bit words of the counter-based Philox generator, reduced modulo the range (bias below 2**-32).

    Raises:
        ValueError: unknown family, negative seed, ``k`` not positive or (``artifact_gaussian``) not even.
    """
    rows = coefficient_rows(family)
    if k < 1:
        raise ValueError(f"k: expected at least 1 hash function, got {k}")
    if family == "artifact_gaussian" and k % 2:
        raise ValueError(f"k: artifact_gaussian turns pairs of hashes into pairs of values, got an odd {k}")
    if not 0 <= seed < 2**128:
        raise ValueError(f"seed: expected a number in [0, 2**128), got {seed}")
    p = np.uint64(ARTIFACT_PRIME if family.startswith("artifact") else PRIME)
    words = np.random.Philox(key=seed).random_raw(rows * k).reshape(rows, k)
    words[0] = 1 + words[0] % (p - np.uint64(1))
    words[1:] %= p
    return torch.from_numpy(words.astype(np.int32))
