"""A DHE in Python's integers and float64, beside its native handle; for the kernels' tests."""

import itertools
import math

import numpy as np
import torch

from mprec._native import _C

P = 2**31 - 1
ARTIFACT_P, ARTIFACT_M = 1_000_003, 1_000_000
FAMILIES = {"universal": 0, "artifact": 1, "artifact_gaussian": 2, "sign": 3, "u7": 4}
ACTIVATIONS = {"none": 0, "relu": 1, "sigmoid": 2, "mish": 3}
EDGE_IDS = [0, 1, P - 1, P, P + 1, 2**30 - 1, 2**30, 2**31, 2**31 + 1, 2**60, 2**63 - 1]


def make_coefficients(family: str, k: int, seed: int = 0, edges: bool = False) -> torch.Tensor:
    """Random rows for `family`; with `edges`, the first columns hold the extremes of their range."""
    g = torch.Generator().manual_seed(seed)
    rows, p = (2, ARTIFACT_P) if family.startswith("artifact") else (4, P)
    c = torch.randint(0, p, (rows, k), generator=g)
    c[0].clamp_(min=1)
    if edges:
        c[:, 0] = p - 1
        c[0, 1], c[1:, 1] = 1, 0
    return c.to(torch.int32)


def wrap_int64(x: int) -> int:
    return (x + 2**63) % 2**64 - 2**63


def hash_reference(coefficients: torch.Tensor, ids, family: str) -> list[list[int]]:
    """h by the definition, in Python's integers."""
    rows = coefficients.tolist()
    if family.startswith("artifact"):

        def h(x, a, b):  # C's remainder takes the sign of the dividend
            return int(math.copysign(1, v := wrap_int64(a * x + b))) * (abs(v) % ARTIFACT_P % ARTIFACT_M)
    else:

        def h(x, a, b, c, d):
            return (a * (x & (2**30 - 1)) + c * ((x >> 30) & (2**30 - 1)) + d * (x >> 60) + b) % P

    return [[h(x, *column) for column in zip(*rows, strict=True)] for x in ids]


def unit_reference(h: torch.Tensor, family: str) -> torch.Tensor:
    """u from h, in float32 arithmetic as the definition says."""
    if family == "universal":
        return h.float() * 2.0**-30 - 1
    if family == "sign":
        s = torch.tensor(1 / math.sqrt(3), dtype=torch.float32)
        return torch.where(h >= 2**30, s, -s)
    if family == "u7":
        return (2 * (h >> 24) - 127).float() / 127
    if family == "artifact":
        return h.float() / torch.tensor(float(ARTIFACT_M - 1)) * 2 - 1
    u = (h.double() + 1) / ARTIFACT_M
    radius, angle = (-2 * u[:, 0::2].log()).sqrt(), 2 * math.pi * u[:, 1::2]
    return torch.stack([radius * angle.cos(), radius * angle.sin()], dim=2).flatten(1).float()


def hash_values(coefficients, ids, family):
    out = torch.full((len(ids), coefficients.shape[1]), -7, dtype=torch.int64)
    _C.hash_values(coefficients, ids, FAMILIES[family], out)
    return out


def hash_encode(coefficients, ids, family):
    out = torch.full((len(ids), coefficients.shape[1]), math.nan)
    _C.hash_encode(coefficients, ids, FAMILIES[family], out)
    return out


def sample_ids(seed: int, n: int) -> torch.Tensor:
    """The edge IDs, then IDs of every magnitude."""
    g = np.random.default_rng(seed)
    random = g.integers(0, 2**63, size=n, dtype=np.int64) >> g.integers(0, 63, size=n)
    return torch.from_numpy(np.concatenate([np.array(EDGE_IDS, dtype=np.int64), random]))


def make_layers(dims, seed=0, bias=True):
    g = torch.Generator().manual_seed(seed)
    weights, biases = [], []
    for k, n in itertools.pairwise(dims):
        weights.append(torch.randn(n, k, generator=g) / math.sqrt(k) * 1.5)
        biases.append(torch.randn(n, generator=g) * 0.3 if bias else torch.zeros(n))
    return weights, biases


ACTIVATE = {
    "none": lambda x: x,
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "mish": torch.nn.functional.mish,
}


def decode_reference(u, weights, biases, activation, last_activation):
    y = u.double()
    for i, (w, b) in enumerate(zip(weights, biases, strict=True)):
        y = y @ w.double().T + b.double()
        y = ACTIVATE[last_activation if i == len(weights) - 1 else activation](y)
    return y


def pool_reference(vectors, ids, offsets, mode, weights, padding_idx):
    """vectors [n, D] float64; offsets with the end."""
    out = []
    for begin, end in itertools.pairwise(offsets):
        keep = [i for i in range(begin, end) if ids[i] != padding_idx]
        rows = vectors[keep]
        if weights is not None:
            rows = rows * weights[keep].double()[:, None]
        if not keep:
            out.append(torch.zeros(vectors.shape[1], dtype=torch.float64))
        elif mode == 0:
            out.append(rows.sum(0))
        elif mode == 1:
            out.append(rows.sum(0) / len(keep))
        else:
            out.append(rows.amax(0))
    return torch.stack(out) if out else torch.zeros(0, vectors.shape[1], dtype=torch.float64)


class Net:
    """A decoder and its float64 twin."""

    def __init__(self, dims, family="universal", activation="relu", last="sigmoid", seed=0):
        self.family, self.activation, self.last = family, activation, last
        self.coefficients = make_coefficients(family, dims[0], seed)
        self.weights, self.biases = make_layers(dims, seed)
        self.handle = _C.Decoder(
            self.coefficients,
            self.weights,
            self.biases,
            FAMILIES[family],
            ACTIVATIONS[activation],
            ACTIVATIONS[last],
        )

    def vectors(self, ids):
        h = torch.tensor(hash_reference(self.coefficients, ids.tolist(), self.family)).reshape(len(ids), -1)
        u = unit_reference(h, self.family)
        return decode_reference(u, self.weights, self.biases, self.activation, self.last)

    def __call__(self, ids, offsets, weights=None, mode=0, padding_idx=-1, threads=1, dedupe=None):
        """offsets with the end."""
        out = torch.full((len(offsets) - 1, self.handle.dim), math.nan)
        _C.dhe_bag(self.handle, ids, offsets, weights, mode, True, padding_idx, out, threads, dedupe)
        return out

    def one_each(self, ids, **options):
        return self(ids, torch.arange(len(ids) + 1), **options)


def assert_close(actual, expected, tolerance=2e-5):
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)
