"""The decoder stage: a code for each ID, a vector for each code.

MP-Rec's decoder stage replaces the decoder by the nearest of some centroids of an intermediate value. For
deep hash embeddings that value had better be the *final* embedding: encodings of different IDs are nearly
orthogonal, so that the nearest one says little (:mod:`mprec.cache.centroids`). Then the search need not be
done when serving: each ID's code is found once, and serving reads a byte or two and a small table.

Codes are those of a residual quantiser (Chen et al., Sensors 2010): stage s holds 256 centroids of what
the stages before it left over, and an embedding is the sum of one centroid per stage.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from mprec import ops
from mprec.cache.budget import Counts, hottest
from mprec.nn import DeepHashEmbeddingBag
from mprec.ops.pooling import codebook_rows

__all__ = ["Codebook", "CodebookEmbeddingBag", "CodebookError"]

CENTROIDS = 256  # a stage's code is a byte
_SAMPLE = 32_768  # rows that centroids are fitted to


class CodebookError(ValueError):
    """A codebook's measured error exceeds the bound it was asked to keep."""


@dataclass(frozen=True)
class Codebook:
    """Codes uint8 ``[n, stages]`` and centroids float32 ``[stages * 256, D]`` of n rows.

    ``error`` is measured over all rows (weighted, if weights were given): the root of the mean squared
    distance to the row, over that of the rows to their mean. 0 is exact, 1 no better than one vector for all.
    """

    codes: Tensor
    centroids: Tensor
    error: float

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.centroids.nbytes

    def rows(self, ids: Tensor) -> Tensor:
        """The approximate rows ``[m, D]`` of row numbers int64 ``[m]``; ``IdOutOfRangeError`` if there is no
        such row."""
        return codebook_rows(self.codes, self.centroids, ids)

    @classmethod
    def fit(
        cls,
        rows: Tensor,
        stages: int = 2,
        weights: Tensor | None = None,
        max_error: float | None = 0.25,
        seed: int = 0,
    ) -> "Codebook":
        """Quantise ``rows`` float32 ``[n, D]``.

        Args:
            stages: bytes per code, 1 to 8.
            weights: how much each row matters ``[n]``, for example how often its ID was seen.
            max_error: the bound; ``None`` takes any error. On MovieLens-100k an error of 0.2 (3 stages) cost
                about 0.001 AUC, of 0.3 (2 stages) 0.002, of 0.5 (1 stage) 0.005.
            seed: of the centroids' start.

        Raises:
            CodebookError: the measured error exceeds ``max_error``.
            ValueError: empty or non-finite rows, weights that do not fit, a bad number of stages.
        """
        rows = rows.detach().to(torch.float32).contiguous()
        if rows.dim() != 2 or not rows.numel():
            raise ValueError(f"rows: expected [n, D] with n, D >= 1, got {list(rows.shape)}")
        if not 1 <= stages <= 8:
            raise ValueError(f"stages: expected 1 to 8, got {stages}")
        if not rows.isfinite().all():
            raise ValueError("rows: expected finite numbers")
        w = torch.ones(len(rows), dtype=torch.float64) if weights is None else weights.to(torch.float64)
        if w.shape != rows.shape[:1] or not (w >= 0).all() or not w.sum() > 0:
            raise ValueError(
                f"weights: expected {len(rows)} numbers >= 0, not all 0, got shape {list(w.shape)}"
            )
        rest, codes, centroids = rows.clone(), [], []
        for stage in range(stages):
            centres = centroids_of(rest, w, seed + stage)
            code = nearest(rest, centres)
            rest -= centres[code]
            codes.append(code.to(torch.uint8))
            centroids.append(torch.cat([centres, centres.new_zeros(CENTROIDS - len(centres), rows.shape[1])]))
        error = relative_error(rows, rows - rest, w)
        if max_error is not None and error > max_error:
            raise CodebookError(
                f"the error of {stages}-byte codes is {error:.3g} of the rows' spread, more than max_error, "
                f"{max_error:g}; more stages make it smaller"
            )
        return cls(torch.stack(codes, dim=1), torch.cat(centroids), error)


def relative_error(rows: Tensor, approximate: Tensor, weights: Tensor) -> float:
    """:attr:`Codebook.error` of ``approximate`` ``[n, D]`` for ``rows`` with weights ``[n]``."""
    rows, w = rows.double(), weights.double()
    spread = w @ (rows - (w @ rows) / w.sum()).square().sum(1)
    left = w @ (rows - approximate.double()).square().sum(1)
    return float((left / spread).sqrt()) if spread > 0 else float(left > 0)


def centroids_of(rows: Tensor, weights: Tensor, seed: int) -> Tensor:
    """At most 256 centroids of (a sample of) the rows."""
    try:
        from sklearn.cluster import KMeans  # slow to import, and only needed here
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "codebooks need scikit-learn: pip install 'mprec[cli]'", name=error.name
        ) from None

    rng = np.random.default_rng(seed)
    x, w = rows.numpy(), weights.numpy()
    if len(x) > _SAMPLE:
        # A weighted sample of equal weights stands for the weighted rows.
        chosen = rng.choice(len(x), _SAMPLE, p=w / w.sum())
        x, w = x[chosen], np.ones(_SAMPLE)
    different = np.unique(x[w > 0], axis=0)
    if len(different) <= CENTROIDS:
        return torch.from_numpy(different)
    means = KMeans(CENTROIDS, n_init=1, max_iter=25, random_state=seed).fit(x, sample_weight=w)
    return torch.from_numpy(means.cluster_centers_.astype(np.float32))


def nearest(rows: Tensor, centres: Tensor) -> Tensor:
    """The nearest centre's number for each row."""
    half = centres.square().sum(1) / 2
    return torch.cat([(half - part @ centres.T).argmin(1) for part in rows.split(1 << 14)])


class CodebookEmbeddingBag(nn.Module):
    """Embeds known IDs by their codes, others by the decoder, and pools.

    Approximate for IDs with a code (the error is ``codebook.error``), exact for the rest. For inference.

    Args:
        bag: the deep hash embedding to stand in for: pooling and arguments are its.
        ids: the IDs that get a code: ``[n]``, all different; default: ``0 .. bag.num_embeddings``.
        counts: or the IDs that were seen, weighted by how often.
        stages, max_error, seed: see :meth:`Codebook.fit`.

    Raises:
        CodebookError: the error exceeds ``max_error``; nothing is approximated then.
        ValueError: no IDs given and ``bag`` has no bound, or both ``ids`` and ``counts`` given.
    """

    def __init__(
        self,
        bag: DeepHashEmbeddingBag,
        ids: Tensor | None = None,
        counts: Counts | None = None,
        stages: int = 2,
        max_error: float | None = 0.25,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if ids is not None and counts is not None:
            raise ValueError("ids, counts: expected one of them, got both")
        weights = None
        if counts is not None:
            hot = hottest(counts)
            ids, order = hot.ids.sort()
            weights = hot.counts[order]
        elif ids is None:
            if bag.num_embeddings is None:
                raise ValueError("ids: bag has no bound (num_embeddings), so say which IDs get a code")
            ids = torch.arange(bag.num_embeddings)
        else:
            ids = ids.to(torch.int64).sort().values
            if len(ids) and (ids[0] < 0 or (ids.diff() == 0).any()):
                raise ValueError("ids: expected different IDs, none negative")
        if not len(ids):
            raise ValueError("ids: expected at least one")
        self.bag = bag
        with torch.no_grad():
            rows = torch.cat([decode(bag, part) for part in ids.split(1 << 14)])
        self.codebook = Codebook.fit(rows, stages, weights, max_error, seed)
        dense = int(ids[-1]) == len(ids) - 1
        self._ids = None if dense else ids  # sorted; None: 0 .. n - 1

    @property
    def nbytes(self) -> int:
        """Bytes of codes, centroids and (unless the IDs are 0 .. n - 1) IDs."""
        return self.codebook.nbytes + (0 if self._ids is None else self._ids.nbytes)

    @torch.no_grad()
    def rows(self, ids: Tensor) -> Tensor:
        """The rows ``[n, D]`` of IDs ``[n]``, not pooled."""
        ids = ids.to(torch.int64)
        n = len(self.codebook.codes)
        if self._ids is None:
            place, known = ids, ids < n
        else:
            place = torch.searchsorted(self._ids, ids).clamp_(max=n - 1)
            known = self._ids[place] == ids
        if bool(known.all()):
            return self.codebook.rows(place)
        rows = torch.empty(len(ids), self.bag.embedding_dim, dtype=torch.float32)
        rows[known] = self.codebook.rows(place[known])
        rows[~known] = decode(self.bag, ids[~known])
        return rows

    def forward(
        self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None
    ) -> Tensor:
        shape = input.shape
        ids = input.reshape(-1)
        if ids.numel() and int(ids.min()) < 0:
            self.bag(input, offsets, per_sample_weights)  # raises
        rows, numbers = self.rows(ids), torch.arange(ids.numel())
        padding = self.bag.padding_idx
        if padding is not None:  # one row more, which stands for padding
            numbers = torch.where(ids == padding, ids.numel(), numbers)
            rows = torch.cat([rows, rows.new_zeros(1, rows.shape[1])])
        return ops.embedding_bag(
            numbers.reshape(shape),
            rows,
            offsets,
            mode=self.bag.mode,
            per_sample_weights=per_sample_weights,
            include_last_offset=self.bag.include_last_offset,
            padding_idx=None if padding is None else ids.numel(),
        )


def decode(bag: DeepHashEmbeddingBag, ids: Tensor) -> Tensor:
    c = bag.config
    starts = torch.arange(len(ids) + 1)
    return ops.dhe_bag(
        ids,
        starts,
        *bag.stack(),
        c.family,
        c.activation,
        c.last_activation,
        include_last_offset=True,
    )
