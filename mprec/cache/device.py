"""The encoder stage on a GPU: a fixed set of hot IDs before the decoder, probed by the device itself."""

import torch
from torch import Tensor

from mprec import ops
from mprec.cache.budget import Counts, hottest
from mprec.names import MODES
from mprec.nn import DeepHashEmbeddingBag
from mprec.nn.deep_hash import check_bound

__all__ = ["DeviceCachedDeepHashEmbeddingBag"]


class DeviceCachedDeepHashEmbeddingBag(DeepHashEmbeddingBag):
    """A :class:`mprec.nn.DeepHashEmbeddingBag` on a GPU with the vectors of its hottest IDs in a hash table.

    Shares the parameters of ``bag`` and stands in for it. Look-ups, the list of misses and their decoding
    stay on the device (``torch.ops.mprec.cached_dhe_bag``): the host waits for nothing, and a captured CUDA
    graph serves any number of hits. Which IDs are held is fixed here; their vectors are decoded again when a
    parameter has changed. Calls that need gradients run as in ``bag``. Not thread-safe while weights change.

    Args:
        bag: the module to speed up; on any device.
        counts: how often its IDs were seen, as for :func:`mprec.cache.split_budget`.
        rows: how many of the most frequent to hold.

    Raises:
        ValueError: ``rows`` below 1.
    """

    keys: Tensor
    rows: Tensor
    slots: Tensor

    def __init__(self, bag: DeepHashEmbeddingBag, counts: Counts, rows: int) -> None:
        if rows < 1:
            raise ValueError(f"rows: expected at least 1, got {rows}")
        super().__init__(
            bag.embedding_dim,
            bag.config,
            bag.mode,
            bag.include_last_offset,
            bag.padding_idx,
            bag.num_embeddings,
            device="meta",
        )
        from mprec.triton_kernels import row_cache  # imports triton: only where it is needed

        self.register_buffer("coefficients", bag.coefficients)
        self.decoder = bag.decoder
        weight = self.decoder[-1].weight
        ids = hottest(counts, "counts").ids[:rows].to(torch.int64)
        held = row_cache.build(ids.cpu(), weight.new_zeros(len(ids), self.embedding_dim).detach())
        self.probes = held.probes
        # not saved with the model: they follow from its parameters and from data
        self.register_buffer("keys", held.keys, persistent=False)
        self.register_buffer("rows", held.rows, persistent=False)
        self.register_buffer("slots", torch.nonzero(held.keys >= 0).flatten(), persistent=False)
        self._versions: tuple = ()

    def forward(
        self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None
    ) -> Tensor:
        if offsets is None or (torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())):
            return super().forward(input, offsets, per_sample_weights)
        if self.num_embeddings is not None:
            check_bound(input, offsets, self.include_last_offset, self.num_embeddings)
        self.refresh()
        kind = self.config
        return torch.ops.mprec.cached_dhe_bag(
            self.keys,
            self.rows,
            self.probes,
            input,
            offsets,
            *self.stack(),
            kind.family,
            kind.activation,
            kind.last_activation,
            MODES[self.mode],
            per_sample_weights,
            self.include_last_offset,
            -1 if self.padding_idx is None else self.padding_idx,
        )

    @torch.no_grad()
    def refresh(self) -> None:
        """Decode the held IDs again if a parameter has changed since they were."""
        tensors = [self.rows, *self.weights, *self.biases]
        versions = tuple((id(tensor), tensor._version) for tensor in tensors)
        if versions == self._versions:
            return
        ids = self.keys[self.slots]
        starts = torch.arange(len(ids) + 1, device=ids.device)
        kind = self.config
        self.rows[self.slots] = ops.dhe_bag(
            ids,
            starts,
            *self.stack(),
            kind.family,
            kind.activation,
            kind.last_activation,
            include_last_offset=True,
        )
        self._versions = tuple((id(tensor), tensor._version) for tensor in tensors)
