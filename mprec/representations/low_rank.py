"""A table of few columns, and a projection that a feature's IDs share: ``vector = P row``, P ``[D, r]``.

The size is ``N r + D r`` numbers instead of ``N D``. Bags are pooled before they are projected: of sums and
means that is the same, at one product per bag. Of maxima it is not, so there mode ``"max"`` is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mprec.bags import Bags
from mprec.layers import refuse_more
from mprec.ops import pooling
from mprec.representations.base import Part, Representation
from mprec.representations.embedding_bag import EmbeddingBag
from mprec.representations.members import pool_each, some_do_more
from mprec.row_formats import row_format

__all__ = ["LOW_RANK", "REPRESENTATION", "LowRankWeights"]


class LowRankWeights(nn.Module):
    """The weights of one feature.

    Attributes:
        rows: a table ``[N, r]``, uniform in +-1/sqrt(N) at first (or rows of another precision, for serving).
        projection: ``nn.Linear`` from r to D without bias, N(0, 1/r) at first: vectors then start with the
            variance of a plain table's.
    """

    rows: Any  # EmbeddingBag, or a quantised table
    projection: nn.Linear

    def __init__(self, rows: nn.Module, projection: nn.Linear) -> None:
        super().__init__()
        self.rows, self.projection = rows, projection

    @torch.no_grad()
    def reset_parameters(self) -> None:
        bound = self.rows.num_embeddings**-0.5
        self.rows.weight.uniform_(-bound, bound)
        self.projection.weight.normal_(std=self.projection.in_features**-0.5)


class LowRank(Part):
    """``FeatureConfig.parameters`` may give the ``rank`` r, 1 to D; default D / 4, at least 1."""

    name = "low_rank"
    container = "low_rank"
    has_rows = True
    parameters = ("rank",)

    def rank(self, feature) -> int:
        return feature.parameter("rank", max(1, feature.embedding_dim // 4))

    def check(self, feature) -> None:
        rank = self.rank(feature)
        if feature.mode == "max":
            raise ValueError(f"feature {feature.name!r}: mode: low_rank pools by sum or mean, got 'max'")
        if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= feature.embedding_dim:
            raise ValueError(
                f"feature {feature.name!r}: rank: expected an integer from 1 to embedding_dim, "
                f"{feature.embedding_dim}, got {rank!r}"
            )

    def num_parameters(self, feature) -> int:
        return (feature.num_embeddings + feature.embedding_dim) * self.rank(feature)

    def module(self, feature, *, sparse, device, dtype) -> LowRankWeights:
        options = {"device": device, "dtype": dtype}
        rank = self.rank(feature)
        rows = EmbeddingBag(feature.num_embeddings, rank, mode=feature.mode, sparse=sparse, **options)
        return LowRankWeights(rows, nn.Linear(rank, feature.embedding_dim, bias=False, **options))

    def id_bytes(self, feature, precision="float32") -> int:
        return row_format(precision).row_bytes(self.rank(feature))

    def shared_bytes(self, feature) -> int:
        return 4 * feature.embedding_dim * self.rank(feature)

    def flops(self, feature) -> int:
        return self.rank(feature) + 2 * self.rank(feature) * feature.embedding_dim

    def dtype(self, module) -> torch.dtype:
        return module.projection.weight.dtype

    def materialize(self, module, num_embeddings) -> Tensor:
        self._refuse_more(module)
        return module.rows.weight.detach()[:num_embeddings] @ module.projection.weight.detach().T

    def quantised(self, module, quantise) -> LowRankWeights:
        self._refuse_more(module)
        return LowRankWeights(quantise(module.rows.weight), module.projection)

    def pool(self, modules: Sequence[Any], bags: Bags, sparse: bool) -> Tensor:
        if some_do_more(modules):
            return pool_each(modules, bags, lambda module, own: self.pool([module], own, sparse))
        tables = [module.rows for module in modules]
        if some_do_more(tables):
            pooled = pool_each(tables, bags, lambda table, own: pool_rows([table], own, sparse))
        else:
            pooled = pool_rows(tables, bags, sparse)
        rows = pooled.split([module.projection.in_features for module in modules], dim=1)
        return torch.cat([m.projection(r) for m, r in zip(modules, rows, strict=True)], dim=1)

    def _refuse_more(self, module) -> None:
        for each in (module, module.rows, module.projection):
            refuse_more(each, self.container)


def pool_rows(tables: Sequence[Any], bags: Bags, sparse: bool) -> Tensor:
    """Pooled rows of tables, all in numbers or all quantised."""
    if hasattr(tables[0], "bits"):
        return pooling.pool_quantised([t.rows for t in tables], [t.bits for t in tables], bags)
    return pooling.pool_tables([table.weight for table in tables], bags, sparse)


LOW_RANK = LowRank()
REPRESENTATION = Representation("low_rank", (LOW_RANK,), "#E69F00")
