"""Features of a batch in feature-major CSR layout.

Bag b of feature f of F is ``indices[offsets[f * B + b] : offsets[f * B + b + 1]]``, and offsets has F * B + 1
entries.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mprec._native import _C
from mprec.errors import InvalidOffsetsError
from mprec.ops._common import ids, plain


class Csr(NamedTuple):
    indices: Tensor
    offsets: Tensor
    per_sample_weights: Tensor | None

    def for_kernels(self) -> "Csr":
        """As native kernels read them: int32 or int64, and weights in float32."""
        weights = self.per_sample_weights
        return Csr(
            ids(self.indices, "indices"),
            ids(self.offsets, "offsets"),
            None if weights is None else plain(weights.detach().to(torch.float32)),
        )


def batch_size(offsets: Tensor, num_features: int) -> int:
    """B, or ``InvalidOffsetsError`` if ``num_features`` does not divide the number of bags."""
    bags = offsets.shape[0] - 1
    if num_features < 1:
        raise ValueError(f"num_features: expected at least 1, got {num_features}")
    if bags < 0 or bags % num_features:
        raise InvalidOffsetsError(
            f"offsets: expected 1 + a multiple of the number of features, {num_features}, got "
            f"{offsets.shape[0]}"
        )
    return bags // num_features


def feature_slices(csr: Csr, features: Sequence[int], num_features: int) -> Iterator[tuple[int, int, Tensor]]:
    """Of each feature: where its indices begin and end, and its ``B + 1`` offsets counted from there."""
    batch = (csr.offsets.shape[0] - 1) // num_features
    bounds = csr.offsets[:: max(batch, 1)].tolist() if batch else [0] * (num_features + 1)
    for f in features:
        yield bounds[f], bounds[f + 1], csr.offsets[f * batch : (f + 1) * batch + 1] - bounds[f]


def select(csr: Csr, features: Sequence[int], num_features: int) -> Csr:
    """The batch of these features alone, in this order (CPU). ``InvalidOffsetsError`` on bad offsets."""
    if list(features) == list(range(num_features)):
        return csr
    indices, offsets, weights = (
        ids(csr.indices, "indices"),
        ids(csr.offsets, "offsets"),
        csr.per_sample_weights,
    )
    out_indices = torch.empty_like(indices)
    out_offsets = torch.empty(len(features) * batch_size(offsets, num_features) + 1, dtype=torch.int64)
    out_weights = None if weights is None else torch.empty_like(weights)
    if len(set(features)) != len(features):  # a feature served twice may need more room than there was
        out_indices = indices.new_empty(len(indices) * len(features))
        out_weights = None if weights is None else weights.new_empty(len(indices) * len(features))
    count = _C.select_features(
        indices, offsets, weights, features, num_features, out_indices, out_offsets, out_weights
    )
    return Csr(out_indices[:count], out_offsets, None if weights is None else out_weights[:count])
