"""MP-Rec's decoder stage in its published form, for comparison.

Centroids of an intermediate value of known IDs are kept with the embeddings that the rest of the decoder
makes of them. An ID's intermediate value is computed, and the nearest centroid's embedding is the answer.

The intermediate values of deep hash embeddings do not lend themselves to this: encodings of different IDs are
nearly orthogonal, and the first layer, behind which neighbours are somewhat nearer, is most of the work. So
the error is measured, and unless it is within the bound the stage refuses to be made;
:class:`mprec.cache.Codebook` does what it is meant to do.
"""

import torch
from torch import Tensor, nn

from mprec import ops
from mprec.cache.codebook import CodebookError, centroids_of, decode, nearest, relative_error
from mprec.nn import DeepHashEmbeddingBag

__all__ = ["CentroidEmbeddingBag"]

_ACTIVATIONS = {
    "none": lambda x: x,
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "mish": nn.functional.mish,
}


class CentroidEmbeddingBag(nn.Module):
    """Embeds an ID by the nearest of ``centroids`` intermediate values, and pools. For inference.

    Args:
        bag: the deep hash embedding to stand in for.
        ids: the IDs whose intermediate values are clustered, int64 ``[n]``.
        layer: what is clustered: 0 the hash encodings, l the output of hidden layer l.
        weights: how much each ID matters ``[n]``.
        max_error: bound on the error over ``ids`` (as :attr:`mprec.cache.Codebook.error`); ``None``: any.
        seed: of the centroids' start.

    Raises:
        CodebookError: the error exceeds ``max_error``.
        ValueError: no IDs, or no such layer.
    """

    def __init__(
        self,
        bag: DeepHashEmbeddingBag,
        ids: Tensor,
        layer: int = 1,
        weights: Tensor | None = None,
        max_error: float | None = 0.1,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not 0 <= layer < len(bag.decoder):
            raise ValueError(f"layer: expected 0 to {len(bag.decoder) - 1}, got {layer}")
        if not len(ids):
            raise ValueError("ids: expected at least one")
        self.bag, self.layer = bag, layer
        weights = torch.ones(len(ids), dtype=torch.float32) if weights is None else weights
        with torch.no_grad():
            values = self._intermediate(ids)
            self.centroids = centroids_of(values, weights.double(), seed)
            self.outputs = self._layers(self.centroids, layer, len(bag.decoder))
            rows = torch.cat([decode(bag, part) for part in ids.split(1 << 14)])
            self.error = relative_error(rows, self.rows(ids), weights)
        if max_error is not None and self.error > max_error:
            raise CodebookError(
                f"the error of centroids of layer {layer} is {self.error:.3g} of the rows' spread, more than "
                f"max_error, {max_error:g}"
            )

    def _intermediate(self, ids: Tensor) -> Tensor:
        encoded = ops.hash_encode(self.bag.coefficients, ids, self.bag.config.family)
        return self._layers(encoded, 0, self.layer)

    def _layers(self, x: Tensor, begin: int, end: int) -> Tensor:
        config = self.bag.config
        for layer in range(begin, end):
            last = layer == len(self.bag.decoder) - 1
            x = self.bag.decoder[layer](x)
            x = _ACTIVATIONS[config.last_activation if last else config.activation](x)
        return x

    @torch.no_grad()
    def rows(self, ids: Tensor) -> Tensor:
        """The approximate rows ``[n, D]`` of IDs ``[n]``, not pooled."""
        parts = [
            self.outputs[nearest(self._intermediate(part), self.centroids)] for part in ids.split(1 << 13)
        ]
        return torch.cat(parts) if parts else torch.empty(0, self.bag.embedding_dim)

    def forward(self, input: Tensor, offsets: Tensor, per_sample_weights: Tensor | None = None) -> Tensor:
        return ops.embedding_bag(
            torch.arange(len(input)),
            self.rows(input.to(torch.int64)),
            offsets,
            mode=self.bag.mode,
            per_sample_weights=per_sample_weights,
            include_last_offset=self.bag.include_last_offset,
        )
