"""Deep hash embeddings in plain torch, as one would write them: what mprec's kernels are measured against."""

import torch
import torch.nn.functional as F
from torch import Tensor

from mprec.hashing import ARTIFACT_BUCKETS, ARTIFACT_PRIME, PRIME
from mprec.nn import DeepHashEmbeddingBag

SHAPES = {"1024-128-16": (1024, (128,), 16), "1024-512-256-64": (1024, (512, 256), 64)}


class GoodTorch(torch.nn.Module):
    """The universal family done well: one limb, two folds instead of a division, in place; ``F.linear``."""

    def __init__(self, module: DeepHashEmbeddingBag) -> None:
        super().__init__()
        self.a, self.b = (row.long() for row in module.coefficients[:2])
        self.layers = [(layer.weight.detach(), layer.bias.detach()) for layer in module.decoder]

    def encode(self, ids: Tensor) -> Tensor:
        v = torch.addcmul(self.b, ids[:, None], self.a)
        h = v.bitwise_and(PRIME).add_(v.bitwise_right_shift_(31))
        h = torch.where(h >= PRIME, h - PRIME, h)
        return h.float().mul_(2.0**-30).sub_(1)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.encode(ids)
        for weight, bias in self.layers[:-1]:
            x = F.linear(x, weight, bias).relu_()
        return F.linear(x, *self.layers[-1]).sigmoid_()


class Artifact(GoodTorch):
    """The formula of the paper's code: ``((a x + b) mod p) mod m`` in int64, scaled to [-1, 1]."""

    def encode(self, ids: Tensor) -> Tensor:
        h = torch.fmod(torch.fmod(self.a * ids[:, None] + self.b, ARTIFACT_PRIME), ARTIFACT_BUCKETS)
        return h.float() / (ARTIFACT_BUCKETS - 1) * 2 - 1


def zipf(n: int, exponent: float = 1.05, vocabulary: int = 10**6) -> Tensor:
    """IDs whose frequency falls as rank ** -exponent."""
    weights = torch.arange(1, vocabulary + 1, dtype=torch.float64).pow_(-exponent).cumsum_(0)
    return torch.searchsorted(weights, torch.rand(n, dtype=torch.float64) * weights[-1])
