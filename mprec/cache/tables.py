"""A collection's decoders as tables."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from mprec.nn import EmbeddingBagCollection

__all__ = ["materialize"]


@torch.no_grad()
def materialize(
    collection: EmbeddingBagCollection, names: Sequence[str] | None = None
) -> EmbeddingBagCollection:
    """The same function of IDs with tables in place of decoders: exact, and as large as the vocabularies.

    A *dhe* feature becomes a table of its decoded rows; a *hybrid* one a table of twice the width.

    Args:
        names: the features to turn into tables; default: all that have a decoder.

    Raises:
        ValueError: an unknown name.
    """
    collection = collection.fold()
    hashed = [f.name for f in collection.features if f.has_dhe]
    chosen = set(hashed if names is None else names)
    if unknown := sorted(chosen - set(hashed)):
        raise ValueError(f"names: no deep hash embedding {unknown[0]!r}; there are {', '.join(hashed)}")
    features = [
        replace(f, representation="table", dhe=None, embedding_dim=f.output_dim) if f.name in chosen else f
        for f in collection.features
    ]
    made = EmbeddingBagCollection(features, collection.sparse, device="meta")
    tables: dict[str, Any] = {}
    for f in collection.features:
        if f.name in chosen:
            parts = [collection.dhe._modules[f.name].materialize(f.num_embeddings)]
            if f.has_table:
                parts.insert(0, collection.tables._modules[f.name].weight)
            tables[f"tables.{f.name}.weight"] = torch.cat(parts, dim=1)
    shared = {k: v for k, v in collection.state_dict().items() if k.split(".")[1] not in chosen}
    made.load_state_dict({**shared, **tables}, assign=True)
    return made.requires_grad_(False)
