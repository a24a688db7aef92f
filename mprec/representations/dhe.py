"""A deep hash embedding: hashes of the ID, decoded by an MLP."""

from __future__ import annotations

import itertools
from collections.abc import Hashable

from torch import Tensor

from mprec.hashing import coefficient_rows
from mprec.representations.base import Part, Representation
from mprec.representations.deep_hash import DeepHashEmbeddingBag

__all__ = ["DHE", "REPRESENTATION"]


class Dhe(Part):
    name = "dhe"
    container = "dhe"
    hashes = True

    def num_parameters(self, feature) -> int:
        return feature.dhe.num_parameters(feature.embedding_dim)

    def module(self, feature, *, sparse, device, dtype) -> DeepHashEmbeddingBag:
        return DeepHashEmbeddingBag(
            feature.embedding_dim,
            feature.dhe,
            feature.mode,
            include_last_offset=True,
            device=device,
            dtype=dtype,
        )

    def group(self, feature) -> Hashable:
        return feature.dhe.family, feature.dhe.activation, feature.dhe.last_activation

    def id_bytes(self, feature, precision="float32") -> int:
        return 4 * feature.embedding_dim  # written

    def shared_bytes(self, feature) -> int:
        return 4 * feature.dhe.num_parameters(feature.embedding_dim)

    def nbytes(self, feature, precision="float32") -> int:
        coefficients = 4 * coefficient_rows(feature.dhe.family) * feature.dhe.k
        return self.shared_bytes(feature) + coefficients

    def flops(self, feature) -> int:
        widths = feature.dhe.widths(feature.embedding_dim)
        return feature.embedding_dim + sum(2 * a * b for a, b in itertools.pairwise(widths))

    def materialize(self, module, num_embeddings) -> Tensor:
        return module.materialize(num_embeddings)


DHE = Dhe()
REPRESENTATION = Representation("dhe", (DHE,), "#D55E00")
