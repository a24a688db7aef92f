"""Tables as codes of a few numbers a row and one projection a feature, for serving.

The row of ID i of feature f is ``codes[i] @ projection_f + bias_f``. The projection is linear, so bags are
pooled in codes and projected once (see :mod:`mprec.nn.mapped` for what becomes of the bias). Codes in int8
have a scale for each column of a feature, which is folded into the projection: a row of rank r is r bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mprec import ops
from mprec.bags import Bags
from mprec.nn.collection import EmbeddingBagCollection
from mprec.nn.mapped import pooled_ones
from mprec.ops._decoders import check_float16
from mprec.representations import FeatureConfig
from mprec.tracing import eager

__all__ = ["CODE_PRECISIONS", "LowRankEmbeddingBagCollection", "LowRankTable"]

CODE_PRECISIONS = ("float32", "float16", "int8")


class LowRankTable(NamedTuple):
    """``codes`` ``[N, r]``, ``projection`` ``[r, D]`` and ``bias`` ``[D]``, float32: rows are ``codes @
    projection + bias``."""

    codes: Tensor
    projection: Tensor
    bias: Tensor


class LowRankEmbeddingBagCollection(EmbeddingBagCollection):
    """An :class:`EmbeddingBagCollection` of low-rank tables, for serving: it takes the same calls, and its
    results carry no gradients.

    Args:
        features: all with ``representation="table"``, one ``embedding_dim``, and pooled by sum or mean. They
            name what the tables stand for: a model's inputs and outputs stay as they are.
        tables: by feature, all of one rank. None: zeros of ``rank``, to load a state_dict into.
        rank: of the tables, if ``tables`` is None.
        precision: of codes: ``"float32"``, ``"float16"`` or ``"int8"``. The scale of an int8 column takes its
            largest code to 127; give ``limits`` by feature (``[r]``) to take a smaller number there and clip.

    Attributes:
        codes: ``[sum of N, r]``, feature after feature, so that a batch is one gather.
        projections, biases: float32 ``[F, r, D]`` and ``[F, D]``.

    Raises:
        ValueError: a feature or table that does not fit.
    """

    codes: Tensor
    projections: Tensor
    biases: Tensor

    def __init__(
        self,
        features: Sequence[FeatureConfig],
        tables: Mapping[str, LowRankTable] | None = None,
        rank: int | None = None,
        precision: str = "float32",
        limits: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__(features, device="meta")
        _check_features(self.features)
        if precision not in CODE_PRECISIONS:
            raise ValueError(f"precision: expected one of {', '.join(CODE_PRECISIONS)}, got {precision!r}")
        dim = self.features[0].embedding_dim
        if tables is not None:
            _check_tables(self.features, tables)
            rank = tables[self.features[0].name].codes.shape[1]
        if rank is None or not 1 <= rank <= dim:
            raise ValueError(f"rank: expected 1 to embedding_dim, {dim}, got {rank}")
        self.rank, self.precision = rank, precision
        self.tables = nn.ModuleDict()
        count, rows = len(self.features), sum(f.num_embeddings for f in self.features)
        self.register_buffer("_starts", self._first_rows().to(torch.empty(0).device), persistent=False)
        self.register_buffer("codes", torch.zeros(rows, rank, dtype=getattr(torch, precision)))
        self.register_buffer("projections", torch.zeros(count, rank, dim, dtype=torch.float32))
        self.register_buffer("biases", torch.zeros(count, dim, dtype=torch.float32))
        for t, f in enumerate(self.features if tables is not None else ()):
            limit = None if limits is None else limits[f.name]
            self._fill(t, tables[f.name], limit)

    def _first_rows(self) -> Tensor:
        """Where each feature's codes begin: int64 ``[F, 1]``."""
        sizes = torch.tensor([f.num_embeddings for f in self.features], device="cpu")
        return (sizes.cumsum(0) - sizes)[:, None]

    @torch.no_grad()
    def _fill(self, t: int, table: LowRankTable, limit: Tensor | None) -> None:
        codes, projection = table.codes.float(), table.projection.float()
        if self.precision == "int8" and not bool(codes.isfinite().all()):
            raise ValueError(
                f"tables: feature {self.features[t].name!r}: precision: int8 is for finite codes; got others"
            )
        if self.precision == "int8":
            limit = codes.abs().amax(0) if limit is None else limit.float()
            scale = torch.where(limit > 0, limit / 127, torch.ones_like(limit))
            codes = (codes / scale).round().clamp(-127, 127)
            projection = scale[:, None] * projection
        elif self.precision == "float16":
            check_float16([codes], f"tables: feature {self.features[t].name!r}")
        start = int(self._first_rows()[t])
        self.codes[start : start + len(codes)] = codes.to(self.codes.dtype)
        self.projections[t], self.biases[t] = projection, table.bias

    def forward(
        self,
        indices: Tensor,
        offsets: Tensor | None = None,
        per_sample_weights: Tensor | None = None,
        *,
        out: Tensor | None = None,
    ) -> Tensor:
        """As :meth:`EmbeddingBagCollection.forward`; float32 results without gradients."""
        if not eager():  # exporters write no_grad() down, and an error would leave it switched on
            return super().forward(indices, offsets, per_sample_weights, out=out)
        with torch.no_grad():
            return super().forward(indices, offsets, per_sample_weights, out=out)

    def _forward_direct(self, batch: Bags, out=None) -> None:
        return None

    def _forward_ops(self, batch: Bags) -> Tensor:
        watched = batch.indices.is_meta or not eager()
        bounds = [f.num_embeddings for f in self.features]
        if not watched:
            batch = batch.of_kernels()
            batch.check_offsets()
            batch.check_ids(bounds)
        indices, offsets, _, per_sample_weights, _, count, _, _ = batch
        samples, lengths = (offsets.shape[0] - 1) // count, offsets.diff()
        singles = not watched and len(indices) == count * samples and per_sample_weights is None
        if singles and bool((lengths == 1).all()):
            codes = self.codes.index_select(0, (indices.view(count, samples) + self._starts).flatten())
            pooled = codes.to(torch.float32).view(count, samples, -1)
            bias = self.biases[:, None]
        else:
            of_feature = lengths.view(count, samples).sum(1)
            starts = torch.repeat_interleave(self._starts[:, 0], of_feature, output_size=indices.shape[0])
            if watched:  # values are looked at when this runs; an ID too large would be another feature's
                sizes = torch.repeat_interleave(
                    torch.tensor(bounds, device=indices.device), of_feature, output_size=indices.shape[0]
                )
                inside = (indices >= 0) & (indices < sizes)
                message = "IdOutOfRangeError: an index is not below its num_embeddings"
                torch._assert_async(inside.all(), message)
                # A trace of torch.jit has no such assertions: the row of such an ID is one that is not there.
                indices = torch.where(inside, indices, self.codes.shape[0])
            rows = self.codes.index_select(0, indices + starts).to(torch.float32)
            # Each row is its own table's: pooled by the native kernel.
            each = torch.arange(rows.shape[0], device=rows.device)
            pooled = ops.embedding_bag(
                each,
                rows,
                offsets.to(torch.int64),
                mode="sum",
                per_sample_weights=per_sample_weights,
                include_last_offset=True,
            ).view(count, samples, -1)
            modes = [f.mode for f in self.features]
            if "mean" in modes:
                mean = torch.tensor([mode == "mean" for mode in modes], device=offsets.device)
                by = lengths.view(count, samples).clamp(min=1).where(mean[:, None], 1)
                pooled = pooled / by[:, :, None]
            ones = pooled_ones(offsets, per_sample_weights, modes, torch.float32)
            bias = ones[:, :, None] * self.biases[:, None]
        return torch.baddbmm(bias, pooled, self.projections).transpose(0, 1).flatten(1).detach()

    def rows(self, name: str) -> Tensor:
        """The table that a feature's codes stand for: float32 ``[num_embeddings, embedding_dim]``."""
        t = [f.name for f in self.features].index(name)
        start = int(self._starts[t])
        codes = self.codes[start : start + self.features[t].num_embeddings].to(torch.float32)
        return torch.addmm(self.biases[t], codes, self.projections[t])

    def _dtype(self) -> torch.dtype:
        return torch.float32

    @property
    def nbytes(self) -> int:
        """Bytes of codes, projections and biases."""
        return self.codes.nbytes + self.projections.nbytes + self.biases.nbytes

    def _apply(self, fn, recurse=True):
        if fn(torch.empty(0, dtype=torch.float32)).dtype != torch.float32:
            raise TypeError("low-rank tables keep their precision: convert the tables that they came from")
        was_meta = self._starts.is_meta
        super()._apply(fn, recurse)
        if was_meta and not self._starts.is_meta:  # to_empty: no state_dict has it
            self._starts.copy_(self._first_rows())
        return self


def _check_features(features: Sequence[FeatureConfig]) -> None:
    for f in features:
        if f.representation != "table":
            raise ValueError(f"feature {f.name!r}: expected a table, got {f.representation!r}")
        if f.mode == "max":
            raise ValueError(f"feature {f.name!r}: a projection does not commute with mode 'max'")
        if f.embedding_dim != features[0].embedding_dim:
            raise ValueError(
                f"feature {f.name!r}: expected embedding_dim {features[0].embedding_dim} as of "
                f"{features[0].name!r}, got {f.embedding_dim}"
            )


def _check_tables(features: Sequence[FeatureConfig], tables: Mapping[str, LowRankTable]) -> None:
    if missing := [f.name for f in features if f.name not in tables]:
        raise ValueError(f"tables: none for feature {missing[0]!r}")
    rank = tables[features[0].name].codes.shape[1]
    for f in features:
        shapes = [tuple(tensor.shape) for tensor in tables[f.name]]
        wanted = [(f.num_embeddings, rank), (rank, f.embedding_dim), (f.embedding_dim,)]
        if shapes != wanted:
            raise ValueError(f"tables: feature {f.name!r}: expected shapes {wanted}, got {shapes}")
