"""A table: a row of numbers for each ID."""

from __future__ import annotations

from torch import Tensor

from mprec.layers import refuse_more
from mprec.representations.base import Part, Representation
from mprec.representations.embedding_bag import EmbeddingBag
from mprec.row_formats import row_format

__all__ = ["REPRESENTATION", "TABLE"]


class Table(Part):
    name = "table"
    container = "tables"
    has_rows = True

    def num_parameters(self, feature) -> int:
        return feature.num_embeddings * feature.embedding_dim

    def module(self, feature, *, sparse, device, dtype) -> EmbeddingBag:
        return EmbeddingBag(
            feature.num_embeddings,
            feature.embedding_dim,
            mode=feature.mode,
            sparse=sparse,
            include_last_offset=True,
            device=device,
            dtype=dtype,
        )

    def reset(self, module) -> None:
        """Uniform in +-1/sqrt(num_embeddings)."""
        bound = module.num_embeddings**-0.5
        module.weight.uniform_(-bound, bound)

    def id_bytes(self, feature, precision="float32") -> int:
        return row_format(precision).row_bytes(feature.embedding_dim)

    def shared_bytes(self, feature) -> int:
        return 0

    def flops(self, feature) -> int:
        return feature.embedding_dim

    def materialize(self, module, num_embeddings) -> Tensor:
        refuse_more(module, self.container)
        return module.weight.detach()[:num_embeddings]


TABLE = Table()
REPRESENTATION = Representation("table", (TABLE,), "#0072B2")
