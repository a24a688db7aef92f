"""Batches that are one object. Those by name: KeyedJaggedTensor in, KeyedTensor out, whoever's they are.

TorchRec is not imported. A KeyedJaggedTensor is what has its methods; the result is the KeyedTensor of the
module that its class comes from, or the one here if that has none.
"""

import itertools
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mprec.bags import Bags

__all__ = ["Jagged", "KeyedTensor", "embed_alone", "positions", "sibling"]


class KeyedTensor:
    """Vectors of several features side by side, as ``torchrec.KeyedTensor``: of those methods the ones that
    models use.

    Args:
        keys: names.
        length_per_key: columns of each.
        values: ``[B, sum(length_per_key)]``.
    """

    def __init__(self, keys: list[str], length_per_key: list[int], values: Tensor) -> None:
        self._keys, self._lengths, self._values = keys, length_per_key, values

    def keys(self) -> list[str]:
        return self._keys

    def values(self) -> Tensor:
        return self._values

    def key_dim(self) -> int:
        return 1

    def length_per_key(self) -> list[int]:
        return self._lengths

    def offset_per_key(self) -> list[int]:
        return [0, *itertools.accumulate(self._lengths)]

    def to_dict(self) -> dict[str, Tensor]:
        return dict(zip(self._keys, self._values.split(self._lengths, dim=1), strict=True))

    def __getitem__(self, key: str) -> Tensor:
        start = self.offset_per_key()[self._keys.index(key)]
        return self._values[:, start : start + self._lengths[self._keys.index(key)]]


class Jagged:
    """Vectors of the IDs of one feature, as ``torchrec.JaggedTensor``: ``values`` ``[n, D]`` of bags of
    ``lengths`` ``[B]``, and ``weights``, where :class:`mprec.nn.torchrec.EmbeddingCollection` puts the IDs if
    asked to."""

    def __init__(self, values: Tensor, lengths: Tensor, weights: Tensor | None = None) -> None:
        self._values, self._lengths, self._weights = values, lengths, weights

    def values(self) -> Tensor:
        return self._values

    def lengths(self) -> Tensor:
        return self._lengths

    def offsets(self) -> Tensor:
        return torch.nn.functional.pad(self._lengths.cumsum(0), (1, 0))

    def weights(self) -> Tensor:
        if self._weights is None:
            raise ValueError("weights: this jagged tensor has none")
        return self._weights

    def weights_or_none(self) -> Tensor | None:
        return self._weights


def sibling(batch: Any, name: str, default: type) -> type:
    """The class of this name in the module of the batch's own class."""
    return getattr(sys.modules.get(type(batch).__module__), name, default)


def positions(batch: Any, names: Sequence[str]) -> list[int]:
    """Where each of these features stands among the batch's keys.

    Raises:
        TypeError: not a KeyedJaggedTensor.
        KeyError: the batch lacks one of the features.
    """
    if not (hasattr(batch, "keys") and hasattr(batch, "offsets") and hasattr(batch, "values")):
        raise TypeError(
            f"expected a KeyedJaggedTensor, Bags, or indices with offsets, got {type(batch).__name__} alone"
        )
    keys = list(batch.keys())
    if missing := [name for name in names if name not in keys]:
        raise KeyError(f"the batch has no feature {missing[0]!r}; it has {', '.join(keys)}")
    return [keys.index(name) for name in names]


def embed_alone(collection: Any, batch: Any, per_sample_weights: Tensor | None, **options: Any) -> Any:
    """What a collection makes of a batch that is one object: of :class:`mprec.bags.Bags` of all features a
    tensor, of a KeyedJaggedTensor, whose keys are the names of the features in any order and may be more, a
    KeyedTensor. ``options`` are those of the collection's ``forward``.

    Raises:
        TypeError: neither of the two.
        KeyError: the batch lacks one of the features.
        ValueError: the features have batches of different sizes; bags of some features, or of other ones;
            weights beside a batch, which holds its own.
    """
    if per_sample_weights is not None:
        raise ValueError("per_sample_weights: expected None beside a batch that holds its own")
    if isinstance(batch, Bags):
        return collection.forward(*batch.arguments(len(collection.features)), **options)
    names = [feature.name for feature in collection.features]
    order = positions(batch, names)
    if getattr(batch, "variable_stride_per_key", bool)():
        raise ValueError(
            f"features have batches of different sizes, {batch.stride_per_key()}: that is for "
            "mprec.nn.torchrec.EmbeddingBagCollection"
        )
    if order != list(range(len(batch.keys()))):
        batch = batch.permute(order)
    values = collection(batch.values(), batch.offsets(), batch.weights_or_none(), **options)
    return sibling(batch, "KeyedTensor", KeyedTensor)(names, list(collection.output_dims), values)
