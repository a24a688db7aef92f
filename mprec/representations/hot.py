"""Rows for the most frequent IDs, over a compact representation of all others.

An ID among the N hot ones has a row of D numbers of its own; any other is embedded by the *rest*, a deep hash
embedding or rows of low rank. The hot IDs are those that occur most in training; they are kept as a sorted
list, so IDs need no order of their own: a look-up searches it. The size is N (4 D + 8) bytes and the rest's.

Bags are divided by ID, both halves are summed and the sums added; means are divided afterwards. Maxima could
not be put together so, and mode ``"max"`` is refused. How many IDs of a batch are hot is known only when it
is there: compilers break the graph at that place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mprec.bags import Bags
from mprec.layers import refuse_more
from mprec.names import MODES
from mprec.representations.base import Part, Representation
from mprec.representations.dhe import DHE
from mprec.representations.embedding_bag import EmbeddingBag
from mprec.representations.low_rank import LOW_RANK, pool_rows
from mprec.representations.members import pool_each, some_do_more
from mprec.row_formats import row_format
from mprec.tracing import eager

__all__ = ["REPRESENTATIONS", "HotWeights"]


class HotWeights(nn.Module):
    """The weights of one feature.

    Attributes:
        hot: a table ``[N, D]`` (or rows of another precision, for serving).
        rest: the module of the other IDs.
        ids: int64 ``[N]``, rising: the ID of each row. A buffer, saved with the model.
        num_embeddings: IDs are below it.
    """

    ids: Tensor

    def __init__(self, hot: nn.Module, rest: nn.Module, ids: Tensor, num_embeddings: int) -> None:
        super().__init__()
        self.hot, self.rest, self.num_embeddings = hot, rest, num_embeddings
        self.register_buffer("ids", ids)

    def find(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """(the row of each ID, whether it is its own)."""
        rows = torch.searchsorted(self.ids, ids.to(torch.int64)).clamp(max=len(self.ids) - 1)
        return rows, self.ids[rows] == ids


class Hot(Part):
    """Rows of hot IDs over ``rest``, the part that serves the others.

    ``FeatureConfig.parameters`` may give ``hot``, the number N of hot IDs; default a sixteenth of the
    vocabulary, and at most all of it. Beside it, what the rest takes."""

    has_rows = True

    def __init__(self, rest: Part) -> None:
        self.rest = rest
        self.name = self.container = f"hot_{rest.name}"
        self.hashes = rest.hashes
        self.parameters = ("hot", *rest.parameters)

    def count(self, feature) -> int:
        size = feature.num_embeddings
        return min(feature.parameter("hot", max(1, size // 16)), size)

    def check(self, feature) -> None:
        hot = feature.parameter("hot", 1)
        if feature.mode == "max":
            raise ValueError(f"feature {feature.name!r}: mode: {self.name} pools by sum or mean, got 'max'")
        if isinstance(hot, bool) or not isinstance(hot, int) or hot < 1:
            raise ValueError(f"feature {feature.name!r}: hot: expected a positive integer, got {hot!r}")
        self.rest.check(feature)

    def num_parameters(self, feature) -> int:
        return self.count(feature) * feature.embedding_dim + self.rest.num_parameters(feature)

    def module(self, feature, *, sparse, device, dtype) -> HotWeights:
        options = {"sparse": sparse, "device": device, "dtype": dtype}
        count = self.count(feature)
        hot = EmbeddingBag(count, feature.embedding_dim, mode="sum", **options)
        rest = self.rest.module(feature, **options)
        return HotWeights(hot, rest, torch.arange(count, device=device), feature.num_embeddings)

    def reset(self, module) -> None:
        """As a table of the whole vocabulary starts; the first IDs are the hot ones."""
        bound = module.num_embeddings**-0.5
        module.hot.weight.uniform_(-bound, bound)
        self.rest.reset(module.rest)
        module.ids.copy_(torch.arange(len(module.ids)))

    def prepare(self, module, ids) -> None:
        """The IDs that occur most become the hot ones; of equals the smaller."""
        occurring, counts = torch.from_numpy(np.ascontiguousarray(ids)).unique(return_counts=True)
        most = counts.argsort(descending=True, stable=True)[: len(module.ids)]
        seen = occurring[most].to(torch.int64)
        if missing := len(module.ids) - len(seen):  # some never occur
            others = torch.ones(module.num_embeddings, dtype=torch.bool)
            others[seen] = False
            seen = torch.cat([seen, others.nonzero()[:missing, 0]])
        module.ids.copy_(seen.sort().values)

    def id_bytes(self, feature, precision="float32") -> int:
        """Of a hot ID."""
        return row_format(precision).row_bytes(feature.embedding_dim)

    def shared_bytes(self, feature) -> int:
        return self.rest.shared_bytes(feature)

    def nbytes(self, feature, precision="float32") -> int:
        hot = self.count(feature) * (8 + self.id_bytes(feature, precision))
        return hot + self.rest.nbytes(feature, precision)

    def flops(self, feature) -> int:
        """Of an ID that is not hot."""
        return self.rest.flops(feature)

    def dtype(self, module) -> torch.dtype:
        return self.rest.dtype(module.rest)

    def materialize(self, module, num_embeddings) -> Tensor:
        self._refuse_more(module)
        rows = self.rest.materialize(module.rest, num_embeddings).clone()
        kept = module.ids < num_embeddings
        rows[module.ids[kept]] = module.hot.weight.detach()[kept].to(rows.dtype)
        return rows

    def quantised(self, module, quantise) -> HotWeights:
        self._refuse_more(module)
        rest = module.rest if self.rest.hashes else self.rest.quantised(module.rest, quantise)
        return HotWeights(quantise(module.hot.weight), rest, module.ids, module.num_embeddings)

    def _refuse_more(self, module) -> None:
        refuse_more(module, self.container)
        refuse_more(module.hot, self.container)

    def pool(self, modules: Sequence[Any], bags: Bags, sparse: bool) -> Tensor:
        if eager() and not bags.indices.is_meta:
            bags = bags.of_kernels()
            bags.check_offsets()
            bags.check_ids([module.num_embeddings for module in modules])
        return pool_each(modules, bags, lambda module, own: self._pool(module, own, sparse))

    def _pool(self, module: HotWeights, bags: Bags, sparse: bool) -> Tensor:
        """Of one feature, whose bags are alone."""
        ids = bags.indices
        rows, is_hot = module.find(ids)
        if not eager():  # nobody has looked at the IDs, and a deep hash embedding would take any
            outside = (ids < 0) | (ids >= module.num_embeddings)
            rows, is_hot = torch.where(outside, ids, rows), is_hot | outside  # which the look-up refuses
        before = torch.nn.functional.pad(is_hot.cumsum(0), (1, 0))  # hot IDs before each index
        hot_offsets = before[bags.offsets]
        weights = bags.per_sample_weights

        def half(ids: Tensor, offsets: Tensor, mask: Tensor) -> Bags:
            return Bags(ids[mask], offsets, MODES["sum"], None if weights is None else weights[mask])

        hot = half(rows, hot_offsets, is_hot)
        rest = half(ids, bags.offsets - hot_offsets, ~is_hot)
        table: Any = module.hot  # of rows, or of quantised ones
        if some_do_more([table]):
            pooled = pool_each([table], hot, lambda table, own: pool_rows([table], own, sparse))
        else:
            pooled = pool_rows([table], hot, sparse)
        pooled = pooled + self.rest.pool([module.rest], rest, sparse)
        if bags.mode == MODES["mean"]:  # over the number of IDs, also where they are weighted
            return pooled / bags.offsets.diff().clamp(min=1)[:, None]
        return pooled


REPRESENTATIONS = (
    Representation("hot_dhe", (Hot(DHE),), "#56B4E9"),
    Representation("hot_low_rank", (Hot(LOW_RANK),), "#F0E442"),
)
