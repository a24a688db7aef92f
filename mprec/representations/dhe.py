"""A deep hash embedding: hashes of the ID, decoded by an MLP."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Sequence

from torch import Tensor

from mprec.hashing import coefficient_rows
from mprec.layers import refuse_more
from mprec.ops import pooling
from mprec.representations.base import Part, Representation
from mprec.representations.deep_hash import DeepHashEmbeddingBag
from mprec.representations.members import pool_each, some_do_more

__all__ = ["DHE", "REPRESENTATION", "stacks_of"]


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

    def pool(self, modules, bags, sparse) -> Tensor:
        if some_do_more(modules) or any(module.runs_layers() for module in modules):
            return pool_each(modules, bags, lambda module, own: module.pool_by_layers(own))
        config = modules[0].config
        options = config.family, config.activation, config.last_activation
        return pooling.pool_decoders(*stacks_of(modules), options, bags)

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
        refuse_more(module, self.container)
        return module.materialize(num_embeddings)


def stacks_of(
    modules: Sequence[DeepHashEmbeddingBag],
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[int]]:
    """Coefficients, weights, biases and numbers of layers: what operators take. ``TypeError`` for modules
    that do more than those say."""
    for module in modules:
        refuse_more(module, "dhe")
    stacks = [module.stack() for module in modules]
    return (
        [hashes for hashes, _, _ in stacks],
        [weight for _, weights, _ in stacks for weight in weights],
        [bias for _, _, biases in stacks for bias in biases],
        [len(weights) for _, weights, _ in stacks],
    )


DHE = Dhe()
REPRESENTATION = Representation("dhe", (DHE,), "#D55E00")
