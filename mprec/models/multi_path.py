"""One model, four paths: every feature has a table and a DHE, and one set of MLPs scores either.

A path says which of its two vectors each feature contributes to the interaction: ``table`` and ``dhe``
one of them, ``select`` the DHE for the largest features and the table for the others, ``hybrid`` the mean
of both. Where the paper keeps one model per representation, here the MLPs are shared and one checkpoint
holds everything.

It is trained along all paths at once (after the sandwich rule of slimmable networks, Yu and Huang,
arXiv:1903.05134): the embeddings of a batch are computed once, each path scores them, and the narrower
paths also learn from what the hybrid one predicts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from mprec.data import Batch
from mprec.layers import share_hooks
from mprec.models.dlrm import DLRM
from mprec.nn import EmbeddingBagCollection, FeatureConfig, with_representation
from mprec.representations import REPRESENTATIONS, SELECT

__all__ = ["PATHS", "MultiPathDLRM"]

_HYBRID = REPRESENTATIONS["hybrid"]
PATHS = (_HYBRID.name, *(part.name for part in _HYBRID.parts), SELECT)


class MultiPathDLRM(DLRM):
    """A :class:`DLRM` over hybrid features that can be asked for any of ``PATHS``.

    ``forward(dense, bags)`` is the hybrid path; ``path(name)`` gives any path as a DLRM that
    shares this model's parameters and computes only what that path needs. ``select_largest`` is the
    number of features that take their DHE on the ``select`` path.
    """

    def __init__(
        self,
        features: Sequence[FeatureConfig],
        num_dense: int,
        embedding_dim: int,
        bottom: Sequence[int] = (512, 256, 64),
        top: Sequence[int] = (512, 256),
        select_largest: int = 2,
    ) -> None:
        features = with_representation(features, "hybrid")
        self.select_largest = select_largest
        super().__init__(features, num_dense, embedding_dim, bottom, top, hybrid="mean")

    def _constants(self) -> dict[str, Tensor | None]:
        with torch.device("cpu"):
            mixings = {f"_mixing_{name}": self._path_mixing(name) for name in PATHS}
        return {**super()._constants(), **mixings}

    def path_features(self, name: str) -> list[FeatureConfig]:
        """The features as path ``name`` sees them."""
        if name not in PATHS:
            raise ValueError(f"path: expected one of {', '.join(PATHS)}, got {name!r}")
        return with_representation(self.features, name, select_largest=self.select_largest)

    def _path_mixing(self, name: str) -> Tensor:
        shares = {"table": [1.0, 0.0], "dhe": [0.0, 1.0], "hybrid": [0.5, 0.5]}
        rows = [torch.tensor([shares[feature.representation]]) for feature in self.path_features(name)]
        return torch.block_diag(*rows)

    def path(self, name: str) -> DLRM:
        """The model of one path: a DLRM whose parameters are this model's own, not copies.

        Its embeddings are a collection that has only what the path needs. Hooks on this model's
        ``embeddings`` are run by it, also those that are registered later; the output that they see has the
        path's columns. Hooks on this model itself are not run: the path is another one.

        Raises:
            ValueError: no such path.
            TypeError: this model's embeddings do more than a collection does, which the path's would not.
        """
        features = self.path_features(name)
        sizes = self.num_dense, self.embedding_dim, self.bottom_sizes, self.top_sizes
        model = DLRM(features, *sizes, hybrid="mean", device="meta")
        embeddings = self._plain_embeddings()
        for own, shared in (
            (embeddings.tables, model.embeddings.tables),
            (embeddings.dhe, model.embeddings.dhe),
        ):
            shared._modules.update({feature: own._modules[feature] for feature in shared._modules})
        model.bottom, model.top = self.bottom, self.top
        if not self.num_dense:
            model.constant = self.constant
        share_hooks(embeddings, model.embeddings)
        model._mixing = self._mixing if name == "hybrid" else None
        return model.train(self.training)

    def _plain_embeddings(self) -> EmbeddingBagCollection:
        """The embeddings as a collection whose members say all that it does, but for hooks."""
        embeddings = self.embeddings
        if isinstance(embeddings, EmbeddingBagCollection):
            embeddings = embeddings.fold()
        own = type(embeddings).forward is not EmbeddingBagCollection.forward
        if own or "forward" in embeddings.__dict__:
            raise TypeError(
                "embeddings: expected an EmbeddingBagCollection of plain tables and decoders, from which a "
                f"path takes what it needs, got {type(embeddings).__name__} with a forward pass of its own; "
                "change the embeddings of the path instead: path(name).embeddings"
            )
        return embeddings

    def logits(self, batch: Batch) -> dict[str, Tensor]:
        """Logits [B] along every path; the embeddings are computed once."""
        embedded = self.embeddings(batch.bags)
        mixings = {name: getattr(self, f"_mixing_{name}") for name in PATHS}
        return {name: self.score(batch.dense, self.mix(embedded, m)) for name, m in mixings.items()}

    def loss(self, batch: Batch, distillation: float = 0.5) -> Tensor:
        """Mean over the paths of the log-loss. All but the hybrid path are compared with a mix of
        the label and the hybrid's prediction, of which ``distillation`` is the share.
        """
        logits = self.logits(batch)
        teacher = logits["hybrid"].detach().sigmoid()
        total = binary_cross_entropy_with_logits(logits["hybrid"], batch.labels)
        for name in PATHS[1:]:
            target = torch.lerp(batch.labels, teacher, distillation)  # the log-loss is linear in its target
            total = total + binary_cross_entropy_with_logits(logits[name], target)
        return total / len(PATHS)

    def config(self) -> dict[str, Any]:
        config = super().config()
        del config["hybrid"]
        return {**config, "select_largest": self.select_largest}
