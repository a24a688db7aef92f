"""DLRM: dense numbers through a bottom MLP, categorical features through embeddings, all pairs of those
vectors through a dot product, and the products through a top MLP to one logit (Naumov et al.,
arXiv:1906.00091).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from mprec.bags import Bags
from mprec.data import Batch
from mprec.nn import EmbeddingBagCollection, FeatureConfig
from mprec.ops import dot_interaction

__all__ = ["DLRM"]


def mlp(sizes: Sequence[int], *, last_relu: bool, device=None) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in pairwise(sizes):
        layers += [nn.Linear(before, after, device=device), nn.ReLU()]
    return nn.Sequential(*(layers if last_relu else layers[:-1]))


class DLRM(nn.Module):
    """Scores batches of samples: ``forward(dense, bags) -> logits``.

    ``features`` are the categorical features; each contributes one vector of ``embedding_dim`` to the
    interaction; a hybrid one two, its table's and its DHE's (or, with ``hybrid="mean"``, their mean). The
    bottom MLP (hidden sizes ``bottom``) turns the ``num_dense`` numbers into one more vector; without
    dense numbers a learnt constant vector takes its place, so that every feature still has a first-order
    term. ``top`` are the hidden sizes of the MLP behind the interaction, which sees the bottom vector and
    the products of all pairs; with ``interaction="cat"`` it sees the vectors themselves, one after another,
    the bottom's first (as Facebook's DLRM does with that option).

    Shapes: ``dense`` float32 ``[B, num_dense]``; ``bags`` of all features, a :class:`mprec.bags.Bags` or
    their ``indices`` and ``offsets`` (see :class:`mprec.nn.EmbeddingBagCollection`); logits float32 ``[B]``.
    """

    def __init__(
        self,
        features: Sequence[FeatureConfig],
        num_dense: int,
        embedding_dim: int,
        bottom: Sequence[int] = (512, 256, 64),
        top: Sequence[int] = (512, 256),
        hybrid: str = "both",
        device: torch.device | str | None = None,
        *,
        interaction: str = "dot",
    ) -> None:
        super().__init__()
        if interaction not in ("dot", "cat"):
            raise ValueError(f"interaction: expected 'dot' or 'cat', got {interaction!r}")
        if hybrid not in ("both", "mean"):
            raise ValueError(f"hybrid: expected 'both' or 'mean', got {hybrid!r}")
        if num_dense < 0:
            raise ValueError(f"num_dense: expected at least 0, got {num_dense}")
        if wrong := [f for f in features if f.embedding_dim != embedding_dim]:
            raise ValueError(
                f"feature {wrong[0].name!r} has embedding_dim {wrong[0].embedding_dim}; the "
                f"interaction needs {embedding_dim} of every feature"
            )
        self.num_dense, self.embedding_dim = num_dense, embedding_dim
        self.bottom_sizes, self.top_sizes = tuple(bottom), tuple(top)
        self.embeddings = EmbeddingBagCollection(features, device=device)
        if num_dense:
            self.bottom = mlp([num_dense, *bottom, embedding_dim], last_relu=True, device=device)
        else:
            self.bottom = None
            self.constant = nn.Parameter(torch.full((embedding_dim,), embedding_dim**-0.5, device=device))
        self.hybrid, self.interaction = hybrid, interaction
        for name, value in self._constants().items():
            device_of = torch.empty(0, device=device).device
            self.register_buffer(name, None if value is None else value.to(device_of), persistent=False)
        vectors = self._num_vectors()
        inputs = vectors * embedding_dim
        if interaction == "dot":
            inputs = embedding_dim + vectors * (vectors - 1) // 2
        self.top = mlp([inputs, *top, 1], last_relu=False, device=device)

    def _parts(self) -> list[int]:
        """How many vectors each feature has."""
        return [width // self.embedding_dim for width in self.embeddings.output_dims]

    def _num_vectors(self) -> int:
        """Vectors that interact."""
        parts = self._parts()
        return 1 + (len(parts) if self.hybrid == "mean" else sum(parts))

    def _constants(self) -> dict[str, Tensor | None]:
        """Buffers that no training makes, on the CPU."""
        parts, mixing = self._parts(), None
        if self.hybrid == "mean" and max(parts) > 1:  # [T, all parts]: row t averages those of feature t
            with torch.device("cpu"):
                mixing = torch.block_diag(*(torch.full((1, count), 1 / count) for count in parts))
        return {"_mixing": mixing}

    def reset_parameters(self) -> None:
        """What is this module's own, as it starts; parts have methods of this name."""
        self._fill_constants()
        if self.bottom is None:
            nn.init.constant_(self.constant, self.embedding_dim**-0.5)

    def _apply(self, fn, recurse=True):
        was_meta = any(buffer is not None and buffer.is_meta for buffer in self._buffers.values())
        super()._apply(fn, recurse)
        if was_meta:  # to_empty: what no training makes is right at once
            self._fill_constants()
        return self

    @torch.no_grad()
    def _fill_constants(self) -> None:
        for name, value in self._constants().items():
            buffer = self._buffers[name]
            if buffer is not None and value is not None and not buffer.is_meta:
                buffer.copy_(value)

    @property
    def features(self) -> list[FeatureConfig]:
        return list(self.embeddings.features)

    def forward(self, dense: Tensor, indices: Bags | Tensor, offsets: Tensor | None = None) -> Tensor:
        if offsets is None and not isinstance(indices, Bags):
            raise TypeError(
                f"indices: expected Bags, or a tensor with offsets, got {type(indices).__name__} alone"
            )
        return self.score(dense, self.mix(self.embeddings(indices, offsets), self._mixing))

    def mix(self, embedded: Tensor, mixing: Tensor | None) -> Tensor:
        """The vectors [B, V*D] that interact: sums of the embedded [B, P*D] weighted by ``mixing`` [V, P]."""
        if mixing is None:
            return embedded
        return (mixing @ embedded.unflatten(1, (-1, self.embedding_dim))).flatten(1)

    def score(self, dense: Tensor, embedded: Tensor) -> Tensor:
        """Logits [B] from the dense numbers [B, num_dense] and the vectors [B, V*D] that interact."""
        if dense.dim() != 2 or dense.shape[1] != self.num_dense:
            raise ValueError(f"dense: expected [B, {self.num_dense}], got {list(dense.shape)}")
        if torch.compiler.is_compiling():  # a comparison would make the batch size a constant
            embedded = embedded.view(dense.shape[0], -1)
        elif len(dense) != len(embedded):
            raise ValueError(f"dense has {len(dense)} rows, the bags make {len(embedded)}")
        if self.bottom is None:
            first = self.constant.expand(len(embedded), -1)
        else:
            first = self.bottom(dense)
        if self.interaction == "cat":
            return self.top(torch.cat([first, embedded], dim=1)).squeeze(1)
        vectors = embedded.unflatten(1, (-1, self.embedding_dim))
        return self.top(dot_interaction(vectors, first=first)).squeeze(1)

    def loss(self, batch: Batch) -> Tensor:
        """Mean log-loss over a batch, in nats: what training minimises."""
        logits = self(batch.dense, batch.bags)
        return binary_cross_entropy_with_logits(logits, batch.labels)

    def config(self) -> dict[str, Any]:
        """What ``from_config`` needs to build the same model (with fresh weights); JSON-able."""
        return {
            "features": [feature.to_dict() for feature in self.features],
            "num_dense": self.num_dense,
            "embedding_dim": self.embedding_dim,
            "bottom": list(self.bottom_sizes),
            "top": list(self.top_sizes),
            "hybrid": self.hybrid,
        } | ({} if self.interaction == "dot" else {"interaction": self.interaction})

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> DLRM:
        features = [FeatureConfig.from_dict(feature) for feature in config["features"]]
        return cls(features, **{key: value for key, value in config.items() if key != "features"})
