"""A collection's decoders as tables."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from mprec.nn import EmbeddingBagCollection
from mprec.representations import TABLE

__all__ = ["materialize"]


@torch.no_grad()
def materialize(
    collection: EmbeddingBagCollection, names: Sequence[str] | None = None
) -> EmbeddingBagCollection:
    """The same function of IDs with plain tables: exact, and as large as the vocabularies.

    A *dhe* feature becomes a table of its decoded rows; a *hybrid* one a table of twice the width.

    Args:
        names: the features to turn into tables; default: all that are not.

    Raises:
        ValueError: an unknown name.
    """
    collection = collection.fold()
    others = [f.name for f in collection.features if f.parts != (TABLE,)]
    chosen = set(others if names is None else names)
    if unknown := sorted(chosen - set(others)):
        raise ValueError(f"names: no deep hash embedding {unknown[0]!r}; there are {', '.join(others)}")
    features = [
        replace(f, representation="table", dhe=None, embedding_dim=f.output_dim, parameters=())
        if f.name in chosen
        else f
        for f in collection.features
    ]
    made = EmbeddingBagCollection(features, collection.sparse, device="meta")
    tables: dict[str, Any] = {}
    for f in collection.features:
        if f.name in chosen:
            modules = [collection._modules[part.container]._modules[f.name] for part in f.parts]
            parts = [
                part.materialize(module, f.num_embeddings)
                for part, module in zip(f.parts, modules, strict=True)
            ]
            tables[f"tables.{f.name}.weight"] = torch.cat(parts, dim=1)
    shared = {k: v for k, v in collection.state_dict().items() if k.split(".")[1] not in chosen}
    made.load_state_dict({**shared, **tables}, assign=True)
    return made.requires_grad_(False)
