"""Look-ups without pooling: ``[*]`` IDs to ``[*, D]`` vectors."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mprec import ops
from mprec.ops._embedding import singles
from mprec.options import Options
from mprec.representations import DheConfig
from mprec.representations.deep_hash import DeepHashEmbeddingBag
from mprec.representations.embedding_bag import EmbeddingBag, table_storage

__all__ = ["DeepHashEmbedding", "Embedding", "LowRankEmbedding", "LowRankEmbeddingBag"]


class Embedding(nn.Embedding):
    """``torch.nn.Embedding`` whose table the optimizers of :mod:`mprec.optim` can own: the same constructor,
    state_dict, repr and exceptions (see :func:`mprec.ops.embedding`).

    Args:
        huge_pages: as for :class:`EmbeddingBag`.

    The other arguments are torch's.

    Shape: ``input`` of any shape ``[*]``, output ``[*, embedding_dim]``.
    """

    is_embedding_table = True  # for mprec.optim.split_parameters

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        _weight: Tensor | None = None,
        _freeze: bool = False,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        huge_pages: bool | None = None,
    ) -> None:
        fresh = _weight is None
        if fresh:
            _weight = table_storage(num_embeddings, embedding_dim, device, dtype, huge_pages)
        super().__init__(
            num_embeddings,
            embedding_dim,
            padding_idx,
            max_norm,
            norm_type,
            scale_grad_by_freq,
            sparse,
            _weight,
            _freeze,
            device,
            dtype,
        )
        if fresh and _weight is not None:
            self.reset_parameters()  # torch leaves a given weight as it is

    def forward(self, input: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return F.embedding(
                input,
                self.weight,
                self.padding_idx,
                self.max_norm,
                self.norm_type,
                self.scale_grad_by_freq,
                self.sparse,
            )
        return ops.embedding(
            input,
            self.weight,
            self.padding_idx,
            self.max_norm,
            self.norm_type,
            self.scale_grad_by_freq,
            self.sparse,
        )


class DeepHashEmbedding(DeepHashEmbeddingBag):
    """A deep hash embedding without pooling: the stand-in for a ``torch.nn.Embedding`` without its table.

    Args:
        num_embeddings: IDs are to be below it; None takes any ID in ``[0, 2**63)``.
        embedding_dim: D.
        config: hashes and layers.
        padding_idx: this ID has a vector of zeros without a gradient; negative counts from the end.
        device, dtype: of the decoder.
        options: as for :class:`DeepHashEmbeddingBag`, of which this has the parameters and the methods.

    Shape: ``input`` of any shape ``[*]``, output ``[*, embedding_dim]``.

    Raises:
        IdOutOfRangeError: an ID is negative or not below ``num_embeddings``.
    """

    def __init__(
        self,
        num_embeddings: int | None,
        embedding_dim: int,
        config: DheConfig | None = None,
        padding_idx: int | None = None,
        device=None,
        dtype=None,
        options: Options = None,
    ) -> None:
        if padding_idx is not None and padding_idx < 0 and num_embeddings is not None:
            padding_idx += num_embeddings
        super().__init__(
            embedding_dim,
            config,
            padding_idx=padding_idx,
            include_last_offset=True,
            num_embeddings=num_embeddings,
            device=device,
            dtype=dtype,
            options=options,
        )

    def forward(self, input: Tensor) -> Tensor:
        if input.is_nested:
            if input.layout != torch.jagged:
                raise ValueError(
                    f"input: expected a nested tensor of layout torch.jagged, got {input.layout}"
                )
            vectors = self(input.values())
            return torch.nested.nested_tensor_from_jagged(vectors, input.offsets(), input.lengths())
        flat = input.reshape(-1)
        vectors = super().forward(flat, singles(flat.shape[0], flat.device))
        return vectors.view(*input.shape, self.embedding_dim)

    @property
    def weight(self) -> Tensor:
        """The table that this stands for, ``[num_embeddings, D]``, decoded anew at each read and with
        gradients: for models that score all items by it, or tie it to an output layer."""
        if self.num_embeddings is None:
            raise RuntimeError("weight: a deep hash embedding without num_embeddings has no table")
        return self(torch.arange(self.num_embeddings, device=self.coefficients.device))


class _LowRank(nn.Module):
    """What low-rank embeddings share with and without pooling."""

    rows: nn.Embedding | nn.EmbeddingBag
    projection: nn.Linear

    @property
    def num_embeddings(self) -> int:
        return self.rows.num_embeddings

    @property
    def embedding_dim(self) -> int:
        return self.projection.out_features

    @property
    def padding_idx(self) -> int | None:
        return self.rows.padding_idx

    @property
    def weight(self) -> Tensor:
        """The table that this stands for, ``[N, D]``, computed anew at each read and with gradients."""
        return self.projection(self.rows.weight)

    def reset_parameters(self) -> None:
        self.rows.reset_parameters()
        _reset_projection(self.projection)

    @torch.no_grad()
    def approximate(self, table: Tensor) -> None:
        """Become what of this rank is nearest to ``table`` ``[N, D]`` in squares: its rows in the coordinates
        of the directions of largest singular values."""
        wide = table.detach().to(torch.float64)
        directions = torch.linalg.eigh(wide.T @ wide).eigenvectors[:, -self.projection.in_features :]
        self.projection.weight.copy_(directions)
        self.rows.weight.copy_(wide @ directions)


class LowRankEmbedding(_LowRank):
    """A table of r columns and a projection that all IDs share, in place of one of ``embedding_dim`` columns:
    ``N r + r D`` numbers instead of ``N D``.

    Args:
        num_embeddings, embedding_dim: N and D, as in ``torch.nn.Embedding``.
        rank: r, 1 to D; default D / 4, at least 1.
        padding_idx: this ID has a vector of zeros at first, and no gradient.
        sparse: the gradient of the rows is a sparse tensor.
        device, dtype: of rows and projection.

    Shape: ``input`` of any shape ``[*]``, output ``[*, embedding_dim]``.

    Attributes:
        rows: an :class:`Embedding` of r columns, N(0, 1) at first.
        projection: ``nn.Linear`` without bias, N(0, 1/r) at first, so that vectors begin with the variance
            of ``torch.nn.Embedding``'s.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        rank: int | None = None,
        padding_idx: int | None = None,
        sparse: bool = False,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        rank = _checked_rank(rank, embedding_dim)
        options = {"sparse": sparse, "device": device, "dtype": dtype}
        self.rows = Embedding(num_embeddings, rank, padding_idx, **options)
        self.projection = _projection(rank, embedding_dim, device, dtype)

    def forward(self, input: Tensor) -> Tensor:
        return self.projection(self.rows(input))


class LowRankEmbeddingBag(_LowRank):
    """:class:`LowRankEmbedding` with pooling: bags are pooled in r columns and projected once.

    Arguments as those of :class:`LowRankEmbedding` and of ``torch.nn.EmbeddingBag``, but for mode ``"max"``:
    a maximum does not commute with a projection.

    Shape: ``input`` ``[n]`` with ``offsets`` ``[B]``, or ``[B, L]``; output ``[B, embedding_dim]``.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        rank: int | None = None,
        mode: str = "mean",
        sparse: bool = False,
        include_last_offset: bool = False,
        padding_idx: int | None = None,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        rank = _checked_rank(rank, embedding_dim)
        if mode not in ("sum", "mean"):
            raise ValueError(f"mode: low rank pools by 'sum' or 'mean', got {mode!r}")
        self.rows = EmbeddingBag(
            num_embeddings,
            rank,
            mode=mode,
            sparse=sparse,
            include_last_offset=include_last_offset,
            padding_idx=padding_idx,
            device=device,
            dtype=dtype,
        )
        self.projection = _projection(rank, embedding_dim, device, dtype)

    def forward(
        self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None
    ) -> Tensor:
        return self.projection(self.rows(input, offsets, per_sample_weights))


def _checked_rank(rank: int | None, embedding_dim: int) -> int:
    rank = max(1, embedding_dim // 4) if rank is None else rank
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= embedding_dim:
        raise ValueError(f"rank: expected an integer from 1 to embedding_dim, {embedding_dim}, got {rank!r}")
    return rank


def _projection(rank: int, dim: int, device, dtype) -> nn.Linear:
    projection = nn.Linear(rank, dim, bias=False, device=device, dtype=dtype)
    _reset_projection(projection)
    return projection


def _reset_projection(projection: nn.Linear) -> None:
    nn.init.normal_(projection.weight, std=math.sqrt(1 / projection.in_features))
