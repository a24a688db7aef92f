"""The forms that the embeddings of a path can have, as plain data.

| form | module |
|---|---|
| ``plain`` | :class:`mprec.nn.EmbeddingBagCollection` |
| ``quantised`` | :class:`mprec.nn.QuantizedEmbeddingBagCollection`: rows and decoders in fewer bits |
| ``low_rank`` | :class:`mprec.nn.LowRankEmbeddingBagCollection` |

A form names the features with their representations. These need not be the features of the model's own
config: a model with hybrid features may be served from rows of twice the width.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from mprec.models import DLRM
from mprec.nn import (
    DheConfig,
    EmbeddingBagCollection,
    FeatureConfig,
    LowRankEmbeddingBagCollection,
    QuantizedEmbeddingBagCollection,
)

__all__ = ["build", "embedding_bytes", "embedding_weights", "form_of", "with_embeddings"]


def form_of(collection: EmbeddingBagCollection) -> dict[str, Any]:
    """The form of a collection (JSON types). ``TypeError`` for one that has none here."""
    kind = type(collection)
    features = [feature.to_dict() for feature in collection.features]
    if kind is EmbeddingBagCollection:
        return {"form": "plain", "features": features}
    if kind is QuantizedEmbeddingBagCollection:
        return {
            "form": "quantised",
            "features": features,
            "tables": dict(collection.table_precision),
            "decoders": dict(collection.decoder_precision),
        }
    if kind is LowRankEmbeddingBagCollection:
        return {
            "form": "low_rank",
            "features": features,
            "rank": collection.rank,
            "precision": collection.precision,
        }
    raise TypeError(f"embeddings: expected one of the forms of mprec.paths.forms, got {kind}")


def _empty(form: dict[str, Any]) -> EmbeddingBagCollection:
    """A collection of a form without weights: on the meta device, or zeros."""
    features = [FeatureConfig.from_dict(feature) for feature in form["features"]]
    match form["form"]:
        case "plain":
            return EmbeddingBagCollection(features, device="meta")
        case "quantised":
            plain = EmbeddingBagCollection(features, device="meta")
            return QuantizedEmbeddingBagCollection(plain, form["tables"], form["decoders"])
        case "low_rank":
            return LowRankEmbeddingBagCollection(features, rank=form["rank"], precision=form["precision"])
        case other:
            raise ValueError(f"form: expected plain, quantised or low_rank, got {other!r}")


def with_embeddings(model: nn.Module, collection: EmbeddingBagCollection) -> nn.Module:
    """A twin of a model with other embeddings; it shares all other modules and parameters."""
    twin = copy.copy(model)
    twin._modules = {**model._modules, "embeddings": collection}
    return twin


def build(config: dict[str, Any], form: dict[str, Any], state: dict[str, Any]) -> DLRM:
    """The DLRM of this config with embeddings of a form, in eval mode. The tensors of ``state`` are taken as
    they are, not copied: what two states share stays shared.

    ``KeyError``, ``TypeError``, ``ValueError`` or ``RuntimeError`` where the parts do not fit.
    """
    embeddings, dim = _empty(form), config["embedding_dim"]
    # Embeddings of one row each, to be replaced at once: what counts is whether a feature gives one vector or
    # two, be they of a table and a decoder or of rows of twice the width.
    kinds = ["table" if width == dim else "hybrid" for width in embeddings.output_dims]
    least = DheConfig(k=1, hidden=())
    features = [
        FeatureConfig(f.name, 1, dim, kind, least) for f, kind in zip(embeddings.features, kinds, strict=True)
    ]
    model = DLRM(features, **{key: value for key, value in config.items() if key != "features"})
    if embeddings.output_dims != model.embeddings.output_dims:
        raise ValueError(f"embeddings of {embeddings.output_dims} columns do not fit vectors of {dim}")
    model.embeddings = embeddings
    model.load_state_dict(state, assign=True)
    return model.requires_grad_(False).eval()


def embedding_weights(collection: EmbeddingBagCollection) -> dict[tuple[int, ...], int]:
    """Bytes of a collection's weights by where they lie, so that what two collections share is told; they
    add up to :func:`embedding_bytes`."""
    tensors = {(t.data_ptr(),): t.nbytes for t in collection.state_dict().values()}
    total = embedding_bytes(collection)
    if sum(tensors.values()) == total:
        return tensors
    return {tuple(sorted(where for (where,) in tensors)): total}  # decoders are packed into other bytes


def embedding_bytes(collection: EmbeddingBagCollection) -> int:
    """Bytes of tables, decoders and hash coefficients, each tensor counted once."""
    if hasattr(collection, "nbytes"):
        return collection.nbytes
    tensors = {tensor.data_ptr(): tensor.nbytes for tensor in collection.state_dict().values()}
    return sum(tensors.values())
