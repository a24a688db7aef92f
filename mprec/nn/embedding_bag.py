"""A table with pooling, on mprec's kernels."""

import torch
from torch import Tensor

from mprec import ops


class EmbeddingBag(torch.nn.EmbeddingBag):
    """``torch.nn.EmbeddingBag`` on mprec's kernels: the same constructor, state_dict, repr and exceptions.

    A swap is one line, and checkpoints go both ways. Differences are those of
    :func:`mprec.ops.embedding_bag`: weights per sample also with ``mode="mean"``, and errors where torch
    drops data.

    Shape: ``input`` ``[n]`` with ``offsets`` ``[B]``, or ``[B, L]``; output ``[B, embedding_dim]``.

    Example::

        >>> bag = mprec.nn.EmbeddingBag(10, 3, mode="sum")
        >>> bag(torch.tensor([1, 2, 4, 5, 4]), torch.tensor([0, 2])).shape
        torch.Size([2, 3])
    """

    def forward(
        self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None
    ) -> Tensor:
        return ops.embedding_bag(
            input,
            self.weight,
            offsets,
            self.max_norm,
            self.norm_type,
            self.scale_grad_by_freq,
            self.mode,
            self.sparse,
            per_sample_weights,
            self.include_last_offset,
            self.padding_idx,
        )
